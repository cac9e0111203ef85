"""Several processes that fill one folder of images at the same time."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_pipeline import FakePipeline, plan

from air_plugin.diffusion import image_set
from air_plugin.diffusion.generate import generate
from air_plugin.diffusion.image_set import Claims, ImageSet
from air_plugin.diffusion.writers import MANIFEST, add_line, write_image
from air_plugin.utils.errors import UserError

NAMES = ["dog", "sea", "annual_crop land"]


@pytest.fixture
def start() -> Any:
    """Starts processes, which are copies of this one; they are killed at the end."""
    context = multiprocessing.get_context("fork")
    started: list[Any] = []

    def begin(work: Callable[..., None], *arguments: Any) -> Any:
        started.append(context.Process(target=work, args=arguments))
        started[-1].start()
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.join()


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def fill(folder: Path, images: int, size: int, mark: Path, delay: float) -> None:
    """Generate slowly, with a mark when it has begun and one with the number of images at the end."""
    pipeline = FakePipeline()
    call = type(pipeline).__call__

    class Slow(FakePipeline):
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            mark.touch()
            time.sleep(delay)
            return call(self, *arguments, **options)

    report = generate(Slow(), plan(NAMES, images), folder, batch_size=size)
    mark.with_suffix(".count").write_text(str(report.generated))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.mark.parametrize("sizes", [(2, 2), (2, 3)])
def test_two_processes_generate_every_image_once(start, tmp_path: Path, sizes: tuple[int, int]):
    """Also where they have other batches, and one of them needs more images."""
    folder = tmp_path / "images"
    numbers = (6, 6) if sizes[0] == sizes[1] else (6, 8)
    both = [
        start(fill, folder, number, size, tmp_path / f"{name}.mark", 0.05)
        for name, number, size in zip("ab", numbers, sizes, strict=True)
    ]
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    lines = [json.loads(line)["key"] for line in (folder / MANIFEST).read_text().splitlines()]
    assert Counter(lines) == dict.fromkeys([job.key for job in plan(NAMES, max(numbers))], 1)
    counts = [int((tmp_path / f"{name}.count").read_text()) for name in "ab"]
    assert sum(counts) == 3 * max(numbers) and min(counts) > 0
    alone = tmp_path / "alone"
    generate(FakePipeline(), plan(NAMES, max(numbers)), alone, batch_size=sizes[0])
    assert contents(folder) == contents(alone)


def test_images_of_a_killed_process_are_generated_by_the_other_one(start, tmp_path: Path, caplog):
    caplog.set_level(logging.INFO, logger="air_plugin")
    folder, mark = tmp_path / "images", tmp_path / "a.mark"
    other = start(fill, folder, 2, 6, mark, 600)
    wait_for(mark)  # it has claimed everything
    images = ImageSet(folder, plan(NAMES), 6)
    with images:
        assert images.take() is None
        os.kill(other.pid, signal.SIGKILL)
        other.join()
        assert images.take() == plan(NAMES)
    assert generate(FakePipeline(), plan(NAMES), folder, batch_size=6).generated == 6


def test_a_process_waits_for_what_another_one_generates(start, tmp_path: Path, caplog):
    caplog.set_level(logging.INFO, logger="air_plugin")
    folder, mark = tmp_path / "images", tmp_path / "a.mark"
    start(fill, folder, 2, 6, mark, 1.0)
    wait_for(mark)
    report = generate(FakePipeline(), plan(NAMES), folder, batch_size=6)
    assert report.generated == 0 and len(contents(folder)) == 6
    assert caplog.messages.count("images: another process generates 6 of them") == 1


def claim(folder: Path, keys: list[str], mark: Path) -> None:
    claims = Claims(folder)
    assert claims.take(keys)
    mark.touch()
    time.sleep(600)


def test_claims_are_taken_together_or_not_at_all(start, tmp_path: Path):
    other = start(claim, tmp_path, ["b"], tmp_path / "mark")
    wait_for(tmp_path / "mark")
    mine = Claims(tmp_path)
    assert not mine.take(["a", "b"])
    start(claim, tmp_path, ["a"], tmp_path / "second")  # "a" was let go
    wait_for(tmp_path / "second")
    assert mine.take(["c"])
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    assert mine.take(["b"]) and not mine.take(["a"])


def test_what_appeared_before_the_claim_is_not_generated_again(tmp_path: Path):
    """Another process generated it between the first look and the claim."""
    jobs, donor = plan(NAMES), tmp_path / "donor"
    generate(FakePipeline(), jobs, donor, batch_size=6)
    with ImageSet(tmp_path / "images", jobs, 6) as images:
        for job in jobs[:4]:
            (tmp_path / "images" / f"{job.key}.png").write_bytes((donor / f"{job.key}.png").read_bytes())
            line = next(json.loads(text) for text in (donor / MANIFEST).read_text().splitlines() if job.key in text)
            add_line(tmp_path / "images", job, 0, line["sha256"])
        assert images.take() == jobs and images.claimed == {job.key for job in jobs[4:]}


def test_a_line_that_another_process_is_writing_is_read_later(tmp_path: Path):
    import numpy as np

    job, other = plan(NAMES)[:2]
    with ImageSet(tmp_path, [job, other], 1) as images:
        sha256 = write_image(tmp_path / f"{job.key}.png", np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
        text = json.dumps({"key": job.key, "sha256": sha256}) + "\n"
        for part, missing in ((text[:20], 2), (text[20:], 1)):
            with open(tmp_path / MANIFEST, "a") as manifest:
                manifest.write(part)
            images.refresh()
            assert len(images.missing) == missing


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*arguments: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(image_set.fcntl, "lockf", refuse)
    with pytest.raises(UserError, match=r"has no file locks \(Function not implemented\)"):
        generate(FakePipeline(), plan(NAMES), tmp_path, batch_size=2)
