"""Steps as graphs: every value is that of ordinary steps, in whichever way a step runs."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from recorded_graph import RecordedGraph
from torch import Tensor
from torch.nn.functional import cross_entropy

from air_plugin.utils.cuda_graph import GraphedStep

CPU = torch.device("cpu")


class Training:
    """Two layers with an optimiser; `run` is a step, as the runner gets it."""

    def __init__(self, optimizer: str = "AdamW", *, inside: bool = True) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 3))
        options = {"AdamW": {"fused": True}, "SGD": {"momentum": 0.9}}[optimizer]
        self.optimizer = getattr(torch.optim, optimizer)(self.model.parameters(), lr=0.1, **options)
        self.inside = inside
        self.calls = 0

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        self.calls += 1
        logits = self.model(inputs["features"])
        loss = cross_entropy(logits, inputs["label"])
        loss.backward()
        if self.inside:
            self.optimizer.step()
        return {"loss": loss, "logits": logits}

    def state(self) -> list[Tensor]:
        kept = [value.detach().clone() for value in self.model.parameters()]
        for state in self.optimizer.state.values():
            kept += [value.clone() for value in state.values() if isinstance(value, Tensor)]
        return kept


def batches(*sizes: int) -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(1)
    return [
        {"features": torch.randn(size, 4, generator=rng), "label": torch.randint(3, (size,), generator=rng)}
        for size in sizes
    ]


def runner_of(training: Training, graph: RecordedGraph | None = None, **options: bool | int) -> GraphedStep:
    parameters = list(training.model.parameters())
    return GraphedStep(training.run, parameters, device=CPU, name="Test", graph=graph, **options)


def train(training: Training, step: Callable, data: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The outputs of all steps, kept to the end, and each step's gradients."""
    results = []
    for batch in data:
        outputs = step(batch)
        gradients = {f"gradient {i}": value.grad.clone() for i, value in enumerate(training.model.parameters())}
        results.append({**outputs, **gradients})
        if not training.inside:
            training.optimizer.step()
    return results


def plainly(optimizer: str, inside: bool, data: list[dict[str, Tensor]]) -> tuple[Training, list[dict[str, Tensor]]]:
    """The reference: a loop that anybody would write."""
    training = Training(optimizer, inside=inside)

    def step(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        training.optimizer.zero_grad()
        return training.run(batch)

    return training, train(training, step, data)


def require_equal(one: Training, results: list, other: Training, references: list) -> None:
    for number, (a, b) in enumerate(zip(results, references, strict=True)):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), (number, name)
    assert len(one.state()) == len(other.state()) > 4
    assert all(torch.equal(a, b) for a, b in zip(one.state(), other.state(), strict=True))


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("inside", [True, False])
def test_steps_as_a_graph_are_bit_by_bit_those_of_a_plain_loop(optimizer: str, inside: bool):
    data = batches(*[5] * 8)
    graph, training = RecordedGraph(), Training(optimizer, inside=inside)
    runner = runner_of(training, graph)
    results = train(training, runner, data)
    assert runner.captured and graph.log == ["warm up"] * 3 + ["capture"] + ["replay"] * 5
    assert training.calls == 4  # the replays do not run Python
    require_equal(training, results, *plainly(optimizer, inside, data))
    assert len({float(one["loss"]) for one in results}) == 8  # outputs that were kept are not overwritten
    assert not any(value.requires_grad for value in results[0].values())


def test_the_capture_itself_changes_no_state():
    training, graph = Training(), RecordedGraph()
    runner = runner_of(training, graph, warm_up=1)
    data = batches(5, 5)
    runner(data[0])
    before, replay = training.state(), graph.replay
    at_replay: list[list[Tensor]] = []

    def looking() -> None:
        at_replay.append(training.state())
        replay()

    graph.replay = looking  # type: ignore[method-assign]
    runner(data[1])
    assert all(torch.equal(a, b) for a, b in zip(before, at_replay[0], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before, training.state(), strict=True))


@pytest.mark.parametrize("sizes", [(5, 5, 2, 5, 5, 2, 5, 5, 2), (2, 5, 5, 5, 5, 2, 2, 5), (1, 2, 3, 4, 5)])
def test_other_shapes_run_kernel_by_kernel_with_the_same_state(sizes: tuple[int, ...]):
    data = batches(*sizes)
    graph, training = RecordedGraph(), Training()
    runner = runner_of(training, graph, warm_up=2)
    results = train(training, runner, data)
    require_equal(training, results, *plainly("AdamW", True, data))
    assert graph.log.count("capture") == (1 if sizes.count(5) > 2 else 0)
    assert graph.log.count("replay") == max(0, sizes.count(5) - 2)


def test_another_type_or_another_input_runs_kernel_by_kernel():
    training, graph = Training(), RecordedGraph()
    runner = runner_of(training, graph, warm_up=1)
    first, second, third = batches(5, 5, 5)
    runner(first)
    runner(second)
    assert graph.log == ["warm up", "capture", "replay"]
    runner({**third, "weight": torch.ones(5)})
    assert graph.log == ["warm up", "capture", "replay"] and training.calls == 3


@pytest.mark.parametrize("inside", [True, False])
def test_a_capture_that_fails_is_one_line_and_training_goes_on(inside: bool, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="air_plugin")
    data = batches(*[5] * 6)
    graph, training = RecordedGraph(fails=True), Training(inside=inside)
    runner = runner_of(training, graph)
    results = train(training, runner, data)
    require_equal(training, results, *plainly("AdamW", inside, data))
    assert graph.log == ["warm up"] * 3 + ["capture"] and not runner.captured
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("Test: not captured as a CUDA graph") and line.endswith("(CUDA error: out of luck)")


def test_a_step_that_waits_for_the_device_cannot_be_captured(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="air_plugin")
    training, losses = Training(), []

    def waiting(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = training.run(inputs)
        losses.append(outputs["loss"].item())
        return outputs

    graph = RecordedGraph()
    runner = GraphedStep(waiting, list(training.model.parameters()), device=CPU, name="Test", graph=graph)
    data = batches(*[5] * 5)
    results = train(training, runner, data)
    require_equal(training, results, *plainly("AdamW", True, data))
    assert len(losses) == 5 and "not permitted" in caplog.text


def test_a_step_that_is_wrong_raises():
    training = Training()

    def wrong(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if training.calls == 3:
            raise ValueError("wrong")
        return training.run(inputs)

    runner = GraphedStep(wrong, list(training.model.parameters()), device=CPU, name="Test", graph=RecordedGraph())
    with pytest.raises(ValueError, match="wrong"):
        train(training, runner, batches(*[5] * 5))


@pytest.mark.parametrize("options", [{}, {"enabled": False}])
def test_without_a_gpu_or_where_it_is_off_every_step_is_an_ordinary_one(options: dict[str, bool]):
    graph = RecordedGraph() if options else None
    data, training = batches(*[5] * 6), Training()
    runner = runner_of(training, graph, **options)
    results = train(training, runner, data)
    require_equal(training, results, *plainly("AdamW", True, data))
    assert training.calls == 6 and not runner.captured and (graph is None or not graph.log)
    assert runner_of(training, device_graph := RecordedGraph())(data[0]) and device_graph.log == ["warm up"]


def test_what_is_no_input_stays_as_it_was_at_the_capture():
    """So the stand-in for a CUDA graph would show a learning rate that is a number; a tensor follows its schedule."""
    weight, factor, number = torch.nn.Parameter(torch.ones(1)), torch.ones(1), [1.0]

    def step(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        (weight * inputs["x"]).sum().backward()
        return {"by tensor": inputs["x"] * factor, "by number": inputs["x"] * number[0]}

    runner = GraphedStep(step, [weight], device=CPU, name="Test", graph=RecordedGraph(), warm_up=1)
    seen = []
    for count in range(1, 5):
        factor.fill_(count)
        number[0] = float(count)
        outputs = runner({"x": torch.tensor([10.0])})
        seen.append((float(outputs["by tensor"]), float(outputs["by number"])))
    assert seen == [(10, 10), (20, 20), (30, 20), (40, 20)]
