"""The store: keys, whole files or none, damage, and two processes at once."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from air_plugin.utils import store as store_module
from air_plugin.utils.digests import content_digest
from air_plugin.utils.files import file_digest, write_atomically
from air_plugin.utils.store import NotStored, Store, key_of
from air_plugin.utils.tensors import load_tensors, save_tensors, tensor_digest

SETTINGS = {"recipe": 1, "seed": 3, "names": ["dog", "cät"]}


def make(store: Store, settings: dict = SETTINGS, *, value: float = 1.0) -> bool:
    """Take or make a small artifact; whether it was there."""
    with store.open("things", settings) as entry:
        was_there = entry.complete
        if not was_there:
            save_tensors(entry.path / "a.safetensors", {"x": torch.full((3,), value)})
            write_atomically(entry.path / "sub" / "b.txt", b"text")
            entry.finish(["a.safetensors", "sub/b.txt"])
        assert torch.equal(entry.tensors("a.safetensors")["x"], torch.full((3,), value))
        return was_there


def folder_of(store: Store, settings: dict = SETTINGS) -> Path:
    return store.root / "things" / key_of(settings)


# Large files


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps is Linux's")
def test_large_files_are_mapped_and_small_ones_are_read(store: Store, monkeypatch: pytest.MonkeyPatch):
    make(store)
    with store.open("things", SETTINGS) as entry:
        path = entry.path / "a.safetensors"
        small = entry.tensors(path.name)["x"]
        assert not is_mapped(path)
        monkeypatch.setattr(store_module, "LARGE", path.stat().st_size - 1)
        large = entry.tensors(path.name)["x"]
        assert is_mapped(path)
    assert torch.equal(small, large)


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1])
def test_the_digest_of_a_file_is_that_of_its_content(tmp_path: Path, size: int):
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "x").write_bytes(content[:size])
    assert file_digest(tmp_path / "x") == hashlib.sha256(content[:size]).hexdigest()


# Keys


def test_keys_depend_on_values_and_not_on_their_order():
    assert key_of({"a": 1, "b": [1, 2]}) == key_of({"b": [1, 2], "a": 1})
    different = [{"a": 1}, {"a": 2}, {"a": "1"}, {"b": 1}, {"a": [1]}, {"a": None}, {"a": 1.5}, {"a": True}, {}]
    assert len({key_of(settings) for settings in different}) == len(different)


def test_keys_are_the_same_everywhere():
    text = '{"names": ["dog", "c\\u00e4t"], "recipe": 1, "seed": 3}'
    assert key_of(SETTINGS) == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_tuples_and_lists_are_the_same_settings(store: Store):
    assert not make(store, {"a": (1, 2)}) and make(store, {"a": [1, 2]})


def test_digests_tell_names_types_shapes_and_values_apart():
    x = torch.arange(4.0)
    variants = [
        {"x": x},
        {"y": x},
        {"x": x + 1},
        {"x": x.double()},
        {"x": x.reshape(2, 2)},
        {"x": x.int()},
        {"x": x, "y": x},
        {"x": x[:3]},
        {"x": x.half()},
        {"x": x.bfloat16()},
        {},
    ]
    assert len({tensor_digest(variant) for variant in variants}) == len(variants)
    assert tensor_digest({"x": x, "y": x}) == tensor_digest({"y": x, "x": x.clone().requires_grad_()})
    assert tensor_digest({"x": torch.zeros(2, 3).T}) == tensor_digest({"x": torch.zeros(3, 2)})
    assert tensor_digest({"x": torch.tensor(1.0)}) != tensor_digest({"x": torch.tensor([1.0])})


def test_file_digests_see_content_and_order_only(tmp_path: Path):
    for name, text in (("a", "one"), ("b", "two"), ("c", "one")):
        (tmp_path / name).write_text(text)
    a, b, c = (tmp_path / name for name in "abc")
    assert content_digest([a, b]) == content_digest([c, b]) != content_digest([b, a])
    (tmp_path / "d").write_text("onetwo")
    (tmp_path / "e").write_text("")
    assert content_digest([a, b]) != content_digest([tmp_path / "d", tmp_path / "e"])


# Whole files or none


def test_atomic_write_leaves_the_old_file_where_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import os

    path = tmp_path / "deep" / "file.txt"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_atomic_write_overwrites_and_others_may_read(tmp_path: Path):
    path = tmp_path / "file.txt"
    write_atomically(path, b"old and longer", durable=True)
    write_atomically(path, b"new", durable=True)
    (tmp_path / "plain").write_bytes(b"")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("length", [0, 4, 8, 50, -1])
def test_tensors_cut_short_are_none(tmp_path: Path, length: int):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"x": torch.arange(6).reshape(2, 3).T, "y": torch.tensor(2.5, requires_grad=True)})
    loaded = load_tensors(path)
    assert torch.equal(loaded["x"], torch.arange(6).reshape(2, 3).T) and loaded["y"].item() == 2.5
    path.write_bytes(path.read_bytes()[:length])
    assert load_tensors(path) is None


def test_tensors_that_are_not_there_are_none(tmp_path: Path):
    assert load_tensors(tmp_path / "nothing.safetensors") is None


# Artifacts


def test_an_artifact_is_made_once_for_its_settings(store: Store):
    assert not make(store) and make(store)
    assert make(Store(store.root), dict(reversed(SETTINGS.items())))
    assert not make(store, {**SETTINGS, "seed": 4})
    with store.open("other things", SETTINGS) as entry:
        assert not entry.complete


def test_unfinished_work_is_kept_for_resuming(store: Store, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="air_plugin")
    with pytest.raises(KeyboardInterrupt), store.open("things", SETTINGS) as entry:
        (entry.path / "part").write_text("so far")
        raise KeyboardInterrupt
    with store.open("things", SETTINGS) as entry:
        assert not entry.complete and (entry.path / "part").read_text() == "so far"
        (entry.path / "a").write_text("whole")
        entry.finish(["a"])
        assert entry.complete
    assert sorted(path.name for path in entry.path.iterdir()) == ["a", "entry.json"]  # what was in progress is gone
    assert caplog.messages == []


def test_the_mark_comes_after_the_files(store: Store):
    with store.open("things", SETTINGS) as entry, pytest.raises(FileNotFoundError):
        entry.finish(["never written"])
    assert not (entry.path / "entry.json").exists() and not entry.complete


def test_the_mark_names_settings_and_checksums(store: Store):
    make(store)
    mark = json.loads((folder_of(store) / "entry.json").read_text())
    assert mark["settings"] == SETTINGS
    assert set(mark["files"]) == {"a.safetensors", "sub/b.txt"} and all(len(v) == 64 for v in mark["files"].values())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "a bit": (lambda folder: flip(folder / "a.safetensors"), "the content of a.safetensors does not match its key"),
    "cut short": (lambda folder: (folder / "sub" / "b.txt").write_bytes(b"te"), "the content of sub/b.txt does not"),
    "emptied": (lambda folder: (folder / "a.safetensors").write_bytes(b""), "the content of a.safetensors does not"),
    "missing": (lambda folder: (folder / "sub" / "b.txt").unlink(), "sub/b.txt is missing"),
    "swapped": (
        lambda folder: (folder / "a.safetensors").write_bytes((folder / "sub" / "b.txt").read_bytes()),
        "the content of a.safetensors does not",
    ),
    "mark cut short": (
        lambda folder: (folder / "entry.json").write_bytes((folder / "entry.json").read_bytes()[:40]),
        "entry.json is damaged",
    ),
    "mark empty": (lambda folder: (folder / "entry.json").write_bytes(b""), "entry.json is damaged"),
    "mark binary": (lambda folder: (folder / "entry.json").write_bytes(b"\xff\xfe\x00"), "entry.json is damaged"),
    "mark a list": (lambda folder: (folder / "entry.json").write_text("[1]"), "entry.json is damaged"),
    "mark a number": (lambda folder: (folder / "entry.json").write_text("5"), "entry.json is damaged"),
    "mark without files": (
        lambda folder: (folder / "entry.json").write_text(json.dumps({"settings": SETTINGS})),
        "entry.json is damaged",
    ),
    "files a list": (
        lambda folder: (folder / "entry.json").write_text(json.dumps({"settings": SETTINGS, "files": ["a"]})),
        "entry.json is damaged",
    ),
    "of other settings": (
        lambda folder: (folder / "entry.json").write_text(json.dumps({"settings": {}, "files": {}})),
        "its settings are not those of its key",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_said_and_repaired(store: Store, kind: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="air_plugin")
    damage, message = DAMAGE[kind]
    make(store)
    damage(folder_of(store))
    (folder_of(store) / "left over").touch()
    assert not make(store, value=2.0)  # made anew, nothing of the old one is used
    (note,) = caplog.messages
    assert note.startswith(f"cache: {folder_of(store)} is thrown away and made again: {message}")
    assert not (folder_of(store) / "left over").exists()
    assert make(store, value=2.0) and len(caplog.messages) == 1


def make_slowly(root: str, start: Any, made: Any) -> None:
    start.wait(60)
    with Store(root).open("things", SETTINGS) as entry:
        if not entry.complete:
            made.put(1)
            time.sleep(0.5)  # without a lock the other one is in here by now
            (entry.path / "a").write_text("whole")
            entry.finish(["a"])
        assert (entry.path / "a").read_text() == "whole"


def test_two_processes_make_an_artifact_once(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    start, made = context.Barrier(2), context.Queue()
    workers = [context.Process(target=make_slowly, args=(str(tmp_path), start, made)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert made.get(timeout=10) == 1 and made.empty()


@pytest.mark.public_reports
def test_a_store_that_is_only_read_gives_what_is_whole_and_nothing_else(tmp_path: Path) -> None:
    """Number 27: an evaluation makes nothing."""
    read_only = Store(tmp_path, read_only=True)
    with pytest.raises(NotStored, match="has no things"):
        make(read_only)
    assert not list(tmp_path.iterdir())
    make(Store(tmp_path))
    assert make(read_only)
    (folder_of(read_only) / "sub" / "b.txt").write_text("damaged")
    with pytest.raises(NotStored, match=r"the content of sub/b.txt does not match"):
        make(read_only)
    assert (folder_of(read_only) / "a.safetensors").exists()
