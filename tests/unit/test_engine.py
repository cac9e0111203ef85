"""Units that workers of this machine do; tests/integration/test_ray.py has the same for Ray."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import units_of_work as of_work

from air_plugin.engine import LocalEngine, RayEngine, Team, chosen
from air_plugin.utils import nodes, processes, spreading
from air_plugin.utils.errors import UserError, exit_code
from air_plugin.utils.progress import Event


def may_copy() -> bool:
    return True


def spread(work, folder: Path, units=range(5), **options):
    options = {"workers": 2, "title": "number"} | options
    found = LocalEngine(copies=options.pop("copies", None))
    return list(found.map(partial(of_work.set_up, folder), work, list(units), **options))


def test_one_worker_is_this_process(tmp_path: Path):
    results = spread(of_work.square, tmp_path, workers=1)
    assert results == [(unit, (unit**2 + 100, os.getpid())) for unit in range(5)]
    assert [path.name for path in tmp_path.iterdir()] == [f"setup-{os.getpid()}"]
    assert spread(of_work.square, tmp_path, units=[]) == []


def test_several_workers_are_set_up_once_each(tmp_path: Path):
    results = dict(spread(of_work.square, tmp_path, units=range(8)))
    assert {unit: value for unit, (value, _) in results.items()} == {unit: unit**2 + 100 for unit in range(8)}
    workers = {process for _, process in results.values()}
    assert os.getpid() not in workers and 1 <= len(workers) <= 2
    assert workers <= {int(path.name.split("-")[1]) for path in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) <= 2 and not multiprocessing.active_children()


@pytest.mark.skipif(sys.platform != "linux", reason="processes are not copied")
class TestCopies:
    """Copies of this process start at once; the rules are those of all workers."""

    def test_a_copy_does_one_unit(self, tmp_path: Path):
        results = dict(spread(of_work.square, tmp_path, copies=may_copy))
        assert len({process for _, process in results.values()}) == 5
        assert [results[unit][0] for unit in range(5)] == [100, 101, 104, 109, 116]

    def test_a_killed_workers_unit_is_done_again(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        results = dict(spread(of_work.die_once, tmp_path, copies=may_copy))
        assert (tmp_path / "died").exists()
        assert [results[unit][0] for unit in range(5)] == [100, 101, 104, 109, 116]
        assert caplog.messages == ["the worker of number 3 of 5 was killed by signal 9; another one does it again"]

    def test_a_unit_that_kills_its_workers_is_given_up_and_the_others_are_done(self, tmp_path: Path):
        done: list[int] = []
        setup = partial(of_work.set_up, tmp_path)
        with pytest.raises(
            UserError, match=r"^number 3 of 5: 3 workers died of it, the last one was killed by signal 9"
        ):
            for index, _ in LocalEngine(copies=may_copy).map(
                setup, of_work.die_always, range(5), workers=2, title="number"
            ):
                done.append(index)
        assert sorted(done) == [0, 1, 3, 4]
        assert (tmp_path / "deaths").read_text() == "x" * (spreading.RETRIES + 1)

    def test_an_error_of_the_work_arrives_as_it_is(self, tmp_path: Path):
        with pytest.raises(UserError, match=r"^AIR.LAMBDA is 2; it must be at most 1$") as caught:
            spread(of_work.refuse, tmp_path, copies=may_copy)
        assert "in refuse" in str(caught.value.__cause__)
        assert not multiprocessing.active_children()

    def test_an_error_that_cannot_be_sent_arrives_as_text(self, tmp_path: Path):
        with pytest.raises(RuntimeError, match=r"^Odd: odd$"):
            spread(of_work.raise_odd, tmp_path, copies=may_copy)

    def test_workers_that_cannot_begin_end_the_work(self, tmp_path: Path):
        with pytest.raises(UserError, match=r"^unit 1 of 5: 3 workers died of it, the last one was killed by signal 9"):
            list(LocalEngine(copies=may_copy).map(of_work.kill_me, of_work.square, range(5), workers=2))

    def test_progress_arrives_with_the_unit(self, tmp_path: Path):
        seen: list[tuple[int, Event]] = []

        def look(index: int, event: Event) -> None:
            seen.append((index, event))
            (tmp_path / f"seen-{index}").touch()

        spread(of_work.report_and_wait, tmp_path, units=range(3), copies=may_copy, progress=look)
        assert {(index, event.stage, event.done, event.total) for index, event in seen} == {
            (index, "lora", index, 10) for index in range(3)
        }

    def test_the_caller_chooses_the_order_and_the_end(self, tmp_path: Path):
        def choose(waiting, active):
            assert len(active) <= 1
            return None if len(waiting) == 2 else waiting[-1]

        results = spread(of_work.square, tmp_path, copies=may_copy, choose=choose)
        assert sorted(index for index, _ in results) == [2, 3, 4]
        assert [index for index, _ in spread(of_work.square, tmp_path, workers=1, choose=choose)] == [4, 3, 2]

    def test_a_driver_that_stops_ends_its_workers(self, tmp_path: Path):
        setup = partial(of_work.set_up, tmp_path)
        (tmp_path / "died").touch()
        results = LocalEngine(copies=may_copy).map(setup, of_work.sleep_unless_first, range(3), workers=2)
        assert next(results)[0] == 0
        results.close()
        assert not multiprocessing.active_children()

    def test_a_worker_spreads_nothing_further(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("ENGINE", "ray")
        found = LocalEngine(copies=may_copy).map(partial(int, 0), of_work.describe_process, [0], workers=2)
        assert next(iter(found))[1]["alone"]

    def test_cards_are_handed_out_in_turn(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(processes, "visible_cards", lambda: ["0", "1", "5"])
        for gpus, expected in ((1, ["0", "1", "5"]), (0.5, ["0", "0", "1"]), (2, ["0,1", "5,0", "1,5"])):
            crew = processes.Processes(processes.Task(partial(int, 0), of_work.describe_process), gpus=gpus)
            assert [crew._cards_of(slot) for slot in range(3)] == expected
        found = LocalEngine(copies=may_copy).map(partial(int, 0), of_work.describe_process, [0], workers=2, gpus=0.5)
        assert next(iter(found))[1]["cards"] == "0"


def test_a_worker_that_is_ended_cleans_up(tmp_path: Path):
    """It gets SIGTERM more than once."""
    task = processes.Task(partial(of_work.set_up, tmp_path), of_work.clean_up_slowly)
    crew = processes.Processes(task)
    crew.hire(1)
    crew.begin(1, 0)
    of_work.wait_for(tmp_path / "began")
    process = crew.workers[1].process
    process.terminate()
    time.sleep(0.3)
    crew.close(now=True)
    assert process.exitcode == 1 and (tmp_path / "cleaned").exists()


class TestTeam:
    """Workers that stay from one work to the next."""

    def work(self, team: Team, folder: Path, do=of_work.square, units=range(6)):
        folder.mkdir(exist_ok=True)
        return dict(team.map(partial(of_work.set_up, folder), do, list(units)))

    def test_the_same_workers_do_all_works_and_are_set_up_once_for_each(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ):
        with Team(LocalEngine(), workers=2) as team:
            first = self.work(team, tmp_path / "first")
            second = self.work(team, tmp_path / "second", of_work.die_once)
            third = self.work(team, tmp_path / "third")
            hired = team.staff.hired
        assert not multiprocessing.active_children()
        for results in (first, second, third):
            assert [results[unit][0] for unit in range(6)] == [100, 101, 104, 109, 116, 125]
        assert len(caplog.messages) == 1 and "another one does it again" in caplog.text
        assert hired <= 3  # two, and another one in the place of the one that was killed
        workers = [{process for _, process in results.values()} for results in (first, second, third)]
        assert len(set.union(*workers)) <= 3 and os.getpid() not in set.union(*workers)
        for name, found in zip(("first", "third"), (workers[0], workers[2]), strict=True):
            assert {int(path.name.split("-")[1]) for path in (tmp_path / name).glob("setup-*")} == found

    def test_after_an_error_other_workers_do_the_next_work(self, tmp_path: Path):
        with Team(LocalEngine(), workers=2) as team:
            with pytest.raises(UserError, match=r"^AIR.LAMBDA is 2; it must be at most 1$"):
                self.work(team, tmp_path, of_work.refuse)
            assert not multiprocessing.active_children()
            assert self.work(team, tmp_path)[5][0] == 125

    def test_a_team_of_one_is_this_process(self, tmp_path: Path):
        with Team(LocalEngine(), workers=1) as team:
            assert {process for _, process in self.work(team, tmp_path).values()} == {os.getpid()}


def test_more_gpus_than_there_are_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(UserError, match=r"^2 GPUs are asked for each worker, and this machine has 1$"):
        list(LocalEngine().map(partial(int, 0), of_work.os_pid, [1, 2], workers=2, gpus=2))


# What the environment names


@pytest.mark.parametrize(("name", "kind"), [(None, LocalEngine), ("", LocalEngine), ("ray", RayEngine)])
def test_the_environment_names_the_engine(name: str | None, kind: type, monkeypatch: pytest.MonkeyPatch):
    if name is None:
        monkeypatch.delenv("ENGINE", raising=False)
    else:
        monkeypatch.setenv("ENGINE", name)
    assert isinstance(chosen(), kind)


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    """The line that a command ends with where its engine cannot be used."""
    assert exit_code(lambda: len(list(chosen().map(partial(int, 0), of_work.os_pid, [1], workers=1)))) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1
    return error


def test_another_engine_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("ENGINE", "rya")
    assert refused(capsys) == "error: unknown ENGINE 'rya'; did you mean ray?\n"


def test_without_ray_the_error_has_the_command(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("ENGINE", "ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert refused(capsys) == (
        'error: ENGINE=ray needs the package ray, which is not installed; run: pip install -e ".[ray]"\n'
    )


HERE = {"version": "0.3.0", "root": "/here", "sources": {"air_plugin": "a", "train": "b"}, "unseen": []}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"version": None}, "node 10.0.0.2:1 of the cluster has no package air_plugin"),
        ({**HERE, "version": "0.2.0"}, "has version 0.2.0 of air_plugin, this machine 0.3.0"),
        (
            {**HERE, "root": "/there", "sources": {"air_plugin": "a", "train": "c"}},
            "other source files of train, in /there",
        ),
        ({**HERE, "unseen": ["/data/store"]}, "does not see /data/store as this machine does"),
    ],
)
def test_a_node_that_differs_is_named(found, message: str):
    with pytest.raises(UserError) as caught:
        nodes.require_same("10.0.0.2:1", found, HERE)
    assert message in str(caught.value) and "10.0.0.2:1" in str(caught.value) and "\n" not in str(caught.value)


def test_a_node_that_is_the_same_passes():
    nodes.require_same("10.0.0.2:1", {**HERE, "root": "/there"}, HERE)


def test_a_probe_is_a_file_for_a_while(tmp_path: Path):
    inspect = nodes.inspector()
    with nodes.probes([tmp_path / "new"]) as expected:
        (name,) = expected
        assert inspect(["air_plugin"], expected)["unseen"] == []
        Path(name).write_text("of another file system")
        assert inspect(["air_plugin"], expected)["unseen"] == [str(tmp_path / "new")]
    assert list((tmp_path / "new").iterdir()) == []
