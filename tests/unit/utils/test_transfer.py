"""Copies to and from a GPU: their order by stand-ins, and on a GPU, where there is one, what arrives."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from air_plugin.utils.transfer import Upload, begin_download

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_on_the_cpu_nothing_is_copied():
    upload, tensor = Upload(torch.device("cpu")), torch.arange(6).view(2, 3)
    assert not upload.overlaps and upload(tensor) is tensor
    upload.borrow(tensor)
    assert begin_download(tensor)() is tensor


class StandIn:
    """A tensor on a GPU, or what becomes of it; it records what is done to it."""

    shape, dtype, device = (2, 3), torch.uint8, torch.device("cuda:1")

    def __init__(self, events: list[Any]) -> None:
        self.events = events

    def __getattr__(self, name: str) -> Any:
        def record(*args: Any, **options: Any) -> StandIn:
            values = [arg for arg in args if not isinstance(arg, StandIn)]
            self.events.append((name, *values, *options.items()))
            return self

        return record


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked of the GPU, in order."""
    events: list[Any] = []

    @contextmanager
    def stream(one: Any):
        events.append("own stream")
        yield
        events.append("other stream")

    class Event:
        def record(self, current: str) -> None:
            events.append(("event", current))

        def synchronize(self) -> None:
            events.append("event reached")

    own = SimpleNamespace(synchronize=lambda: events.append("copied"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: own)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: StandIn(events))
    return events


def test_a_batch_is_pinned_and_copied_in_a_stream_of_its_own(events: list[Any]):
    upload, device = Upload(torch.device("cuda:1")), torch.device("cuda:1")
    copy = upload(StandIn(events))  # type: ignore[arg-type]
    pinned = [("pin_memory",), ("to", device, ("non_blocking", True))]
    assert upload.overlaps and events == ["own stream", *pinned, "other stream", "copied"]
    events.clear()
    upload.borrow(copy)
    assert events == [("record_stream", "stream of cuda:1")]


def test_a_result_is_awaited_only_when_it_is_asked_for(events: list[Any]):
    wait = begin_download(StandIn(events))  # type: ignore[arg-type]
    assert events == [("copy_", ("non_blocking", True)), ("event", "stream of cuda:1")]
    wait()
    assert events[2:] == ["event reached", ("clone",)]


@GPU
def test_what_is_copied_to_a_gpu_and_back_arrives():
    device = torch.device("cuda", torch.cuda.current_device())
    upload, waits = Upload(device), []
    batches = [torch.full((8, 3, 64, 64), number, dtype=torch.uint8) for number in range(20)]
    for batch in batches:
        copy = upload(batch)
        upload.borrow(copy)
        waits.append(begin_download(copy.float() * 2))
        del copy
    assert all(torch.equal(wait(), batch.float() * 2) for wait, batch in zip(waits, batches, strict=True))
