"""Runs side by side: their order, what becomes of killed and failed ones, progress, and that none affects another.

The runs are fakes: the workers are copies of this process, so they find `train.run` replaced.
"""

from __future__ import annotations

import ast
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sources import ROOT

import scripts.display
import scripts.parallel
import scripts.worker
import train
from air_plugin.utils.errors import UserError
from air_plugin.utils.processes import Processes
from air_plugin.utils.progress import Event, report
from air_plugin.utils.units import Reporter
from scripts.display import Display
from scripts.parallel import SideBySide, number_at_once, run_all
from scripts.worker import GENERATING, Run, work

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers do not inherit the fakes")


def make_run(name: str, *, trainer: str = "CPL", seed: int = 1, per_seed: bool = True, prototypes: str = "synthetic"):
    lora = SimpleNamespace(ENABLED=True)
    air = SimpleNamespace(GENERATOR="mini", LORA=lora, GENERATION_PER_SEED=per_seed, PROTOTYPES=prototypes)
    return Run(name, SimpleNamespace(TRAINER=SimpleNamespace(NAME=trainer), AIR=air, SEED=seed), name)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], int]], None]:
    """`fake(do)`: runs become `do(label)`, in copies of this process."""

    def use(do: Callable[[str], int]) -> None:
        monkeypatch.setattr(train, "run", lambda cfg, label: do(label))

    monkeypatch.setattr(scripts.parallel, "may_copy", lambda: True)
    monkeypatch.setattr(scripts.parallel, "import_libraries", lambda names: None)
    monkeypatch.setattr(scripts.parallel, "set_up", int)
    return use


def note(folder: Path, label: str, text: str = "") -> None:
    (folder / label).write_text(text)


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


# What becomes of runs


def test_each_run_is_a_process_of_its_own_and_some_go_on_at_once(fake, tmp_path: Path, capsys):
    def do(label: str) -> int:
        note(tmp_path, label, str(os.getpid()))
        if label in "ab":  # each of the first two ends only if the other one goes on meanwhile
            wait_for(tmp_path / ("b" if label == "a" else "a"))
        print("never shown")
        return 0

    fake(do)
    assert run_all([make_run(name) for name in "abcde"], at_once=2) == 0
    pids = {(tmp_path / name).read_text() for name in "abcde"}
    assert len(pids) == 5 and str(os.getpid()) not in pids
    out, err = capsys.readouterr()
    assert out.startswith("5 runs, 2 at a time") and err == "" and "never shown" not in out
    assert sorted(line.split()[1] for line in out.splitlines()[1:]) == list("abcde")
    assert [line.split("(")[1] for line in out.splitlines()[1:]] == [f"{n} of 5)" for n in range(1, 6)]
    assert multiprocessing.active_children() == []


def test_a_killed_run_costs_no_other(fake, tmp_path: Path, capsys):
    def do(label: str) -> int:
        if label == "b":
            os.kill(os.getpid(), signal.SIGKILL)
        note(tmp_path, label)
        return 0

    fake(do)
    with pytest.raises(UserError, match=r"^run b: 3 workers died of it, .* for lack of memory; use fewer .*JOBS"):
        run_all([make_run(name) for name in "abcd"], at_once=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "d"]
    assert capsys.readouterr().out.count("== ") == 3 and multiprocessing.active_children() == []


def test_a_killed_run_resumes_in_another_worker(fake, tmp_path: Path, caplog):
    def do(label: str) -> int:
        if label == "b" and not (tmp_path / "b").exists():
            note(tmp_path, "b")
            os.kill(os.getpid(), signal.SIGKILL)
        note(tmp_path, label, "whole")
        return 0

    fake(do)
    assert run_all([make_run(name) for name in "abc"], at_once=2) == 0
    assert {(tmp_path / name).read_text() for name in "abc"} == {"whole"}
    assert caplog.messages == ["the worker of run b was killed by signal 9; another one does it again"]


def test_a_failed_run_ends_the_script_after_those_that_go_on(fake, tmp_path: Path, capsys):
    def do(label: str) -> int:
        if label == "good":
            wait_for(tmp_path / "bad")
            time.sleep(0.3)
        note(tmp_path, label)
        if label == "bad":
            raise UserError("no such thing")
        return 0

    fake(do)
    assert run_all([make_run(name) for name in ("good", "bad", "later")], at_once=2) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "good"]
    out, err = capsys.readouterr()
    assert err == "error: no such thing\n" and out.splitlines()[1:] == ["== bad (1 of 3)", "== good (2 of 3)"]


def test_messages_of_several_runs_are_shown_once_with_a_name(fake, capsys):
    def do(label: str) -> int:
        print("warning: odd", file=sys.stderr)
        print(f"only of {label}", file=sys.stderr)
        return 0

    fake(do)
    run_all([make_run("a"), make_run("b")], at_once=2)
    lines = capsys.readouterr().err.splitlines()
    assert sorted(lines)[:2] == ["only of a", "only of b"] and sorted(lines)[2] in (
        "warning: odd (a)",
        "warning: odd (b)",
    )
    assert len(lines) == 3


def test_an_interruption_ends_every_worker(fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def do(label: str) -> int:
        note(tmp_path, label)
        time.sleep(600)
        return 0

    def interrupt(self: Any, names: Any) -> None:
        if len(list(tmp_path.iterdir())) == 2:
            raise KeyboardInterrupt

    fake(do)
    monkeypatch.setattr(Display, "show", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_all([make_run("a"), make_run("b")], at_once=2)
    assert multiprocessing.active_children() == []


# Order


def started(runs: list[Run], at_once: int, ends: list[str]) -> list[str]:
    """The names of runs in the order in which they begin, where they end in a given order."""
    side, order = SideBySide(runs, at_once), []
    side.imported = True
    waiting, active, ends = list(range(len(runs))), list[int](), list(ends)
    while waiting or active:
        while waiting and len(active) < at_once:
            index = side.choose(waiting, active)
            assert index is not None
            waiting.remove(index)
            active.append(index)
            order.append(side.runs[index].name)
        index = next(index for index in active if side.runs[index].name == ends[0])
        ends.pop(0)
        active.remove(index)
        side.made.add(side.runs[index].generates)
    return order


def test_the_longest_runs_begin_first():
    runs = [make_run(f"CPL{seed}", seed=seed) for seed in (1, 2, 3)]
    runs += [make_run(f"AiR{seed}", trainer="AiR", seed=seed) for seed in (1, 2, 3)]
    ends = ["AiR1", "AiR2", "CPL1", "CPL2", "CPL3", "AiR3"]
    assert started(runs, 2, ends) == ["AiR1", "AiR2", "AiR3", "CPL1", "CPL2", "CPL3"]


def test_one_run_makes_a_shared_adapter_while_others_fill_the_time():
    runs = [make_run(f"CPL{seed}", seed=seed) for seed in (1, 2, 3)]
    runs += [make_run(f"AiR{seed}", trainer="AiR", seed=seed, per_seed=False) for seed in (1, 2, 3)]
    runs += [make_run("real", trainer="AiR", prototypes="real")]
    ends = ["CPL1", "CPL2", "AiR1", "CPL3", "AiR2", "AiR3", "real"]
    assert started(runs, 2, ends) == ["AiR1", "CPL1", "CPL2", "CPL3", "AiR2", "AiR3", "real"]


def test_where_nothing_else_is_left_they_wait_for_each_other():
    runs = [make_run(f"AiR{seed}", trainer="AiR", seed=seed, per_seed=False) for seed in (1, 2)]
    assert started(runs, 2, ["AiR1", "AiR2"]) == ["AiR1", "AiR2"]


def test_a_simple_run_goes_on_while_the_libraries_of_the_others_are_imported(fake, tmp_path: Path, monkeypatch, capsys):
    def import_libraries(names: tuple[str, ...]) -> None:
        if names == GENERATING:
            wait_for(tmp_path / "CPL2")
            note(tmp_path, "imported")

    def do(label: str) -> int:
        note(tmp_path, label)
        if label != "CPL2":
            assert (tmp_path / "imported").exists()
        return 0

    fake(do)
    monkeypatch.setattr(scripts.parallel, "import_libraries", import_libraries)
    runs = [make_run("CPL1"), make_run("CPL2")]
    runs += [make_run(f"AiR{seed}", trainer="AiR", seed=seed) for seed in (1, 2)]
    assert run_all(runs, at_once=2) == 0
    assert capsys.readouterr().out.count("== ") == 4


@pytest.mark.parametrize(
    ("runs", "cores", "expected"),
    [(1, 2, 2), (2, 2, 2), (3, 2, 3), (4, 2, 2), (5, 2, 3), (6, 2, 2), (9, 2, 3), (4, 3, 4), (9, 4, 4), (3, 1, 1)],
)
def test_the_number_at_once_leaves_no_core_without_work_for_long(runs: int, cores: int, expected: int):
    def duration(number: int) -> float:
        """Group by group: a group's runs share the cores until all of them have ended."""
        waiting, time = runs, 0.0
        while waiting:
            group = min(number, waiting)
            waiting, time = waiting - group, time + max(1.0, group / cores)
        return time

    mixed = [make_run(f"CPL{seed}", seed=seed) for seed in range(5)]
    mixed += [make_run(f"AiR{seed}", trainer="AiR", seed=seed) for seed in range(runs)]
    found = number_at_once(mixed, cores=cores, most=4)
    assert found == expected and duration(found) == min(duration(number) for number in range(cores, 5))


def test_the_number_at_once_without_long_runs_and_with_a_shared_adapter():
    assert number_at_once([make_run("", seed=seed) for seed in range(3)], cores=2, most=4) == 3
    shared = [make_run("", trainer="AiR", seed=seed, per_seed=False) for seed in range(3)]
    assert number_at_once(shared, cores=2, most=4) == 2


# Progress


def test_every_run_that_goes_on_is_a_line_from_time_to_time(fake, tmp_path: Path, monkeypatch, capsys):
    show, seen = Display.show, tmp_path / "seen"

    def do(label: str) -> int:
        report("lora", 30, 300, loss=0.25)
        if label == "b":
            report("features of train")
        wait_for(seen)
        return 0

    def show_always(self: Display, names: list[str]) -> None:
        self.due = 0.0
        show(self, names)
        if {name: line.event.stage for name, line in self.lines.items()} == {"a": "lora", "b": "features of train"}:
            seen.touch()

    fake(do)
    monkeypatch.setattr(Display, "show", show_always)
    assert run_all([make_run("a"), make_run("b")], at_once=2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("-- a: lora 30 of 300 (10 %), loss 0.2500, ") for line in lines)
    assert any(line.startswith("-- b: features of train, ") for line in lines)


def test_one_run_in_this_process_is_shown_as_well(fake, monkeypatch, capsys):
    """Its own output stays in log.txt; what the display shows does not go there."""
    monkeypatch.setattr(scripts.display, "STATUS", 0.0)

    def do(label: str) -> int:
        print("never shown")
        print(f"warning: of {label}", file=sys.stderr)
        report("lora", 30, 300, loss=0.25)
        time.sleep(1.2)
        return 0

    fake(do)
    assert run_all([make_run("a")], at_once=1) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].startswith("1 run, 1 at a time") and out.splitlines()[-1] == "== a (1 of 1)"
    assert "-- a: lora 30 of 300 (10 %), loss 0.2500, " in out and "never shown" not in out
    assert err == "warning: of a (a)\n"


def test_an_interruption_of_a_run_in_this_process_is_not_shown_twice(fake, capsys):
    def do(label: str) -> int:
        raise KeyboardInterrupt

    fake(do)
    with pytest.raises(KeyboardInterrupt):
        run_all([make_run("a"), make_run("b")], at_once=1)
    out, err = capsys.readouterr()
    assert err == "" and "== " not in out


def test_a_reporter_sends_new_stages_at_once_and_one_stage_now_and_then():
    sent: list[Event] = []
    reporter = Reporter(sent.append)
    reporter(Event("lora", 0, 9, time=1.0))
    reporter(Event("lora", 1, 9, loss=0.5, time=1.1))
    reporter(Event("lora", 2, 9, time=1.2))
    reporter(Event("lora", 3, 9, time=1.6))
    reporter(Event("generation", time=1.7))
    assert [(event.stage, event.done, event.loss) for event in sent] == [
        ("lora", 0, None),
        ("lora", 3, 0.5),
        ("generation", 0, None),
    ]


def test_a_script_that_has_ended_does_not_disturb_a_run():
    def send(event: Event) -> None:
        raise BrokenPipeError

    Reporter(send)(Event("lora"))


# One run does not affect another


def state() -> tuple[Any, ...]:
    return (
        dict(os.environ),
        warnings.filters[:],
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.backends.cudnn.benchmark,
        sys.stdout,
        sys.stderr,
    )


def change_everything(label: str) -> None:
    os.environ["AIR_OFFLINE"] = label
    del os.environ["PATH"]
    warnings.simplefilter("error")
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    torch.backends.cudnn.benchmark = True
    sys.stdout = io.StringIO()  # as Dassl's logger does


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_leaves_its_process_as_it_was(fake, fails: bool):
    def do(label: str) -> int:
        change_everything(label)
        if fails:
            raise UserError("bad")
        return 0

    fake(do)
    before = state()
    assert work(make_run("a")).code == (2 if fails else 0)
    assert state() == before


def test_a_worker_that_does_several_runs_begins_each_with_the_same_state(fake, tmp_path: Path, monkeypatch):
    """As where processes cannot be copied."""

    def do(label: str) -> int:
        note(tmp_path, label, repr((os.getpid(), repr(state()[:5]))))
        change_everything(label)
        return 0

    fake(do)
    monkeypatch.setattr(scripts.parallel, "may_copy", lambda: False)
    monkeypatch.setattr(Processes, "method", "fork")
    assert run_all([make_run(name) for name in "abcd"], at_once=2) == 0
    found = [ast.literal_eval((tmp_path / name).read_text()) for name in "abcd"]
    assert len({pid for pid, _ in found}) <= 2 and len({rest for _, rest in found}) == 1
    assert multiprocessing.active_children() == []


def test_copies_are_made_before_anything_has_threads_or_uses_a_gpu():
    """In a new process: what libraries do when they are imported shows in no other."""
    code = """
import os, sys, threading
import torch
used = []
torch._C._cuda_init = lambda: used.append("init")
if hasattr(torch._C, "_cuda_getDeviceCount"):
    torch._C._cuda_getDeviceCount = lambda: used.append("count") or 0
torch.cuda._device_count_nvml = lambda: 4  # as on a machine with GPUs
import scripts.worker
libraries = (*scripts.worker.LIBRARIES, *scripts.worker.GENERATING)
scripts.worker.import_libraries(libraries)
assert all(name in sys.modules for name in libraries)
assert used == [] and scripts.worker.may_copy() and "PYTORCH_NVML_BASED_CUDA_CHECK" not in os.environ
count = []
os.register_at_fork(after_in_parent=lambda: count.append(len(os.listdir("/proc/self/task"))))
if not os.fork():
    os._exit(0)
assert count == [1], count  # numpy's BLAS ends its threads before a copy; nothing else has any
torch.cuda._device_count_nvml = lambda: -1
torch.cuda.device_count = lambda: 1
assert not scripts.worker.may_copy()  # GPUs were counted by using them
torch.cuda.device_count = lambda: 0
assert scripts.worker.may_copy()
end = threading.Event()
thread = threading.Thread(target=end.wait)
thread.start()
assert not scripts.worker.may_copy()
end.set()
thread.join()
torch.cuda.is_initialized = lambda: True
assert not scripts.worker.may_copy()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
