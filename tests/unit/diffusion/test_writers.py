"""Threads that write images: order, errors, Ctrl-C, and SIGKILL at any moment."""

from __future__ import annotations

import errno
import json
import multiprocessing
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_pipeline import FakePipeline, plan
from PIL import Image

from air_plugin.diffusion import writers as module
from air_plugin.diffusion.generate import generate
from air_plugin.diffusion.writers import MANIFEST, ImageWriter, Records
from air_plugin.utils.errors import explain


def picture(value: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(value).integers(0, 256, (size, size, 3), dtype=np.uint8)


def keys_in(folder: Path) -> list[str]:
    return [json.loads(line)["key"] for line in (folder / MANIFEST).read_text().splitlines()]


def test_lines_follow_their_files_in_the_order_of_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first image is the slowest, and no line is there before its file."""
    jobs, write, recorded = plan(images=4), module.write_image, []

    def slowly(path: Path, pixels: np.ndarray) -> str:
        time.sleep(0.2 if path.stem == jobs[0].key else 0.0)
        return write(path, pixels)

    class Noting(dict):
        def __setitem__(self, key: str, line: Any) -> None:
            recorded.append((key, (tmp_path / f"{key}.png").exists()))
            super().__setitem__(key, line)

    monkeypatch.setattr(module, "write_image", slowly)
    records: Records = Noting()
    with ImageWriter(tmp_path, records, waiting=3) as writer:
        for number, job in enumerate(jobs):
            writer.put(job, picture(number), 0)
    assert keys_in(tmp_path) == [job.key for job in jobs] == [key for key, _ in recorded]
    assert all(there for _, there in recorded)
    for number, job in enumerate(jobs):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"{job.key}.png")), picture(number))


def test_images_are_written_while_the_next_batch_is_generated(tmp_path: Path):
    """The second batch is not generated until the first one is on the disk: without threads it would never be."""
    jobs, pipeline = plan(), FakePipeline()
    call = type(pipeline).__call__

    class Waiting(FakePipeline):
        def __call__(self, **arguments: Any) -> Any:
            if self.seeds:
                end = time.monotonic() + 20
                while not (tmp_path / MANIFEST).exists() or len(keys_in(tmp_path)) < 3:
                    assert time.monotonic() < end, "the first batch is not written"
                    time.sleep(0.005)
            return call(self, **arguments)

    assert generate(Waiting(), jobs, tmp_path, batch_size=3).generated == 6


def test_few_images_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a slow disk `put` waits: memory does not fill up."""
    release, started = threading.Event(), []

    def blocked(path: Path, pixels: np.ndarray) -> str:
        started.append(path)
        release.wait(20)
        return ""

    monkeypatch.setattr(module, "write_image", blocked)
    jobs, handed_over = plan(images=20), []

    def hand_over() -> None:
        with ImageWriter(tmp_path, {}, waiting=5) as writer:
            for job in jobs:
                writer.put(job, picture(0), 0)
                handed_over.append(job)

    thread = threading.Thread(target=hand_over)
    thread.start()
    while len(started) < module.THREADS:
        time.sleep(0.005)
    time.sleep(0.1)
    assert len(handed_over) <= 5 + 1  # those in the queue, and the one whose line is next
    release.set()
    thread.join(20)
    assert len(handed_over) == len(jobs) == len(keys_in(tmp_path))


@pytest.mark.parametrize("what", ["image", "manifest"])
def test_a_full_disk_is_the_error_that_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str):
    """And what was finished before counts."""
    jobs, pipeline = plan(images=6), FakePipeline()
    full = OSError(errno.ENOSPC, "No space left on device")
    write, as_json, done = module.write_image, module.to_json, []

    def counting(function: Any, limit: int) -> Any:
        def call(*arguments: Any) -> Any:
            done.append(1)
            if len(done) == limit + 1:  # once: what comes afterwards does not count either
                raise full
            return function(*arguments)

        return call

    if what == "image":
        monkeypatch.setattr(module, "THREADS", 1)
        monkeypatch.setattr(module, "write_image", counting(write, 4))
    else:
        monkeypatch.setattr(module, "to_json", counting(as_json, 4))
    with pytest.raises(OSError) as raised:
        generate(pipeline, jobs, tmp_path, batch_size=3)
    assert explain(raised.value) == "the disk is full; free some space and run again, finished work is kept"
    assert keys_in(tmp_path) == [job.key for job in jobs[:4]]
    monkeypatch.undo()
    again = FakePipeline()
    assert generate(again, jobs, tmp_path, batch_size=3).generated == 18 - 4
    assert again.generated == 15  # the first batch is not generated again


def test_an_error_on_the_last_images_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(path: Path, pixels: np.ndarray) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(module, "write_image", broken)
    with pytest.raises(PermissionError), ImageWriter(tmp_path, {}, waiting=9) as writer:
        writer.put(plan()[0], picture(0), 0)


def test_generation_stops_soon_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not when hours of images are made that cannot be written."""

    def broken(path: Path, pixels: np.ndarray) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(module, "write_image", broken)
    handed_over = 0
    with pytest.raises(PermissionError), ImageWriter(tmp_path, {}, waiting=9) as writer:
        for job in plan(images=1000):
            writer.put(job, picture(0), 0)
            handed_over += 1
            time.sleep(0.005)
    assert 0 < handed_over < 3000


def test_after_ctrl_c_what_waits_is_written_and_no_thread_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write, before = module.write_image, threading.active_count()

    def slowly(path: Path, pixels: np.ndarray) -> str:
        time.sleep(0.05)
        return write(path, pixels)

    monkeypatch.setattr(module, "write_image", slowly)
    pipeline, jobs = FakePipeline(), plan(images=5)
    pipeline.break_at = 2
    with pytest.raises(KeyboardInterrupt):
        generate(pipeline, jobs, tmp_path, batch_size=4)
    assert keys_in(tmp_path) == [job.key for job in jobs[:8]]
    assert threading.active_count() == before
    assert generate(FakePipeline(), jobs, tmp_path, batch_size=4).generated == 15 - 8


# SIGKILL


class Slow(FakePipeline):
    """Takes some time for each batch, as a generator does."""

    def __call__(self, **arguments: Any) -> Any:
        time.sleep(0.02)
        return super().__call__(**arguments)


def jobs_to_kill() -> Sequence[Any]:
    return plan(images=20, size=96)


def generate_slowly(folder: Path) -> None:
    """What the process does that is killed."""
    generate(Slow(), jobs_to_kill(), folder, batch_size=6)


def test_killed_at_any_moment_and_started_again(tmp_path: Path):
    """Three times in a row; every image is there bit by bit, counts once, and was generated once more at most."""
    jobs, folder = jobs_to_kill(), tmp_path / "killed"
    whole = generate(FakePipeline(), jobs, tmp_path / "whole", batch_size=6)
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["air_plugin.diffusion.generate", "fake_pipeline"])
    for lines in (1, 17, 34):
        process = server.Process(target=generate_slowly, args=[folder])
        process.start()
        manifest = folder / MANIFEST
        while process.is_alive() and (not manifest.exists() or manifest.read_bytes().count(b"\n") < lines):
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -9
    finished = {key for key in keys_in_part(folder) if (folder / f"{key}.png").exists()}
    assert 34 <= len(finished) < len(jobs)
    last = FakePipeline()
    resumed = generate(last, jobs, folder, batch_size=6)
    assert resumed.generated == len(jobs) - len(finished)
    assert last.generated <= resumed.generated + 5  # the batch that was cut is generated as a whole
    assert [path.read_bytes() for path in resumed.paths] == [path.read_bytes() for path in whole.paths]
    counted = keys_in_part(folder)
    assert len(counted) == len(set(counted)) == len(jobs)  # no image was written twice


def keys_in_part(folder: Path) -> list[str]:
    """The keys of whole lines: a kill may cut the last one."""
    keys = []
    for line in (folder / MANIFEST).read_text().splitlines():
        try:
            keys.append(json.loads(line)["key"])
        except ValueError:
            continue
    return keys
