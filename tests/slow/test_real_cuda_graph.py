"""What the stand-in for a CUDA graph cannot show: the real one. Needs a GPU; has not run on one yet."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from air_plugin.utils.cuda_graph import GraphedStep, Tensors

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICE = torch.device("cuda")


def train(*, enabled: bool, waits: bool = False) -> tuple[GraphedStep, list[Tensor]]:
    """Train two layers on batches of which one is smaller; returns all losses and the weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True, capturable=True)

    def step(inputs: Tensors) -> Tensors:
        loss = mse_loss(model(inputs["x"]), inputs["y"])
        loss.backward()
        optimizer.step()
        return {"loss": loss if not waits else loss * loss.item() / loss.item()}

    runner = GraphedStep(step, list(model.parameters()), device=DEVICE, name="Test", enabled=enabled)
    rng = torch.Generator().manual_seed(1)
    losses = []
    for size in (16, 16, 16, 16, 16, 5, 16, 16):
        batch = {name: torch.randn(size, 8, generator=rng).pin_memory() for name in ("x", "y")}
        losses.append(runner(batch)["loss"])
    return runner, [*losses, *(value.detach() for value in model.parameters())]


def test_a_real_graph_trains_what_plain_steps_train():
    captured, results = train(enabled=True)
    plain, expected = train(enabled=False)
    assert captured.captured and not plain.captured
    for value, other in zip(results, expected, strict=True):
        assert torch.allclose(value, other, rtol=1e-4, atol=1e-6)


def test_after_a_capture_that_fails_the_device_works_as_before(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="air_plugin")
    stream = torch.cuda.current_stream()
    failed, results = train(enabled=True, waits=True)
    assert not failed.captured and "not captured as a CUDA graph" in caplog.text
    assert torch.cuda.current_stream() == stream
    assert torch.randn(4, device=DEVICE).isfinite().all()  # the generator is in no capture any more
    for value, other in zip(results, train(enabled=False)[1], strict=True):
        assert torch.allclose(value, other, rtol=1e-4, atol=1e-6)
