"""LoRA's step as on a GPU, on a CPU: master weights, and operations that are recorded and replayed as a graph."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_graph import RecordedGraph, tensors_in
from safetensors.torch import load_file
from small_generators import make_pipeline
from small_models import make_generator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from air_plugin.config import LoraSettings
from air_plugin.diffusion import lora
from air_plugin.diffusion.family import Conditioning
from air_plugin.diffusion.lora import CHECKPOINT, WEIGHTS, train_lora
from air_plugin.diffusion.lora_step import AdapterWeights, LoraStep, Losses, MasterWeights, _train_on
from air_plugin.diffusion.pipeline import Generator, _fingerprint, encode_prompts
from air_plugin.utils.errors import UserError
from air_plugin.utils.store import Store

CAPTIONS = ["a dog", "a cat", "a dog", "a sea", "a cat", "a dog", "a sea"]
SETTINGS: dict[str, Any] = {"rank": 2, "steps": 9, "lr": 0.02, "batch": 3, "checkpoint": 2}


def generator_of(architecture: str, dtype: torch.dtype = torch.bfloat16) -> Generator:
    pipeline = make_pipeline(architecture)
    for part in (value for value in pipeline.components.values() if isinstance(value, torch.nn.Module)):
        part.requires_grad_(False).eval()
    pipeline.to(dtype)
    return Generator(pipeline, _fingerprint(pipeline))


class Ways:
    """Trains adapters, each in a store of its own, with LoraStep as on a GPU or otherwise."""

    def __init__(self, pictures: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pictures, self.folder, self.monkeypatch = pictures, folder, monkeypatch
        self.graphs: list[RecordedGraph] = []

    def train(self, name: str, generator: Generator, *, graph: bool = False, fails: bool = False, **options: Any):
        """The folder of the adapter; `options` are LoraStep's master, and settings."""
        steps = {key: options.pop(key) for key in ("master", "graphs") if key in options}
        make = partial(LoraStep, **steps)

        def step(*arguments: Any, **named: Any) -> LoraStep:
            if not graph:
                return make(*arguments, **named | steps)
            self.graphs.append(RecordedGraph(fails=fails))
            return make(*arguments, **named | steps, graph=self.graphs[-1])

        self.monkeypatch.setattr(lora, "LoraStep", step)
        settings = LoraSettings(**SETTINGS | options)
        store = Store(self.folder / name)
        return train_lora(generator, self.pictures, CAPTIONS, settings=settings, size=16, seed=0, store=store)[0]


@pytest.fixture
def ways(pictures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ways:
    return Ways(pictures, tmp_path, monkeypatch)


def require_same_files(one: Path, other: Path) -> None:
    for name in (WEIGHTS, "losses.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize(
    ("architecture", "dtype", "master"),
    [
        ("sd15", torch.bfloat16, True),
        ("sd21", torch.bfloat16, True),
        ("sdxl", torch.bfloat16, True),
        ("sdxl", torch.float16, False),
        ("sd15", torch.float32, False),
    ],
)
def test_steps_as_a_graph_train_bit_by_bit_what_plain_steps_train(
    ways: Ways, architecture: str, dtype: torch.dtype, master: bool
):
    graph = ways.train("graph", generator_of(architecture, dtype), graph=True, master=master)
    assert ways.graphs[0].log == ["warm up"] * 3 + ["capture"] + ["replay"] * 6
    plain = ways.train("plain", generator_of(architecture, dtype), graph=True, master=master, graphs=False)
    assert ways.graphs[1].log == []
    require_same_files(graph, plain)
    assert len(set(load_file(graph / "losses.safetensors")["loss"].tolist())) == 9


def test_a_capture_that_fails_is_one_line_and_training_goes_on(ways: Ways, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="air_plugin")
    failed = ways.train("failed", generator_of("sd15"), graph=True, master=True, fails=True)
    (line,) = [record.getMessage() for record in caplog.records if "graph" in record.getMessage()]
    assert line.startswith("LoRA: not captured")
    require_same_files(failed, ways.train("plain", generator_of("sd15"), master=True))


@pytest.mark.parametrize("crash_at", [3, 4, 8])
@pytest.mark.parametrize("graph", [True, False])
def test_a_resumed_training_with_master_weights_equals_an_undisturbed_one(
    ways: Ways, crash_at: int, graph: bool, monkeypatch: pytest.MonkeyPatch
):
    whole = ways.train("whole", generator_of("sd15"), graph=graph, master=True)
    call, calls = LoraStep.__call__, []

    def crashing(self: LoraStep, batch: dict[str, Tensor]) -> Tensor:
        if len(calls) == crash_at:
            raise KeyboardInterrupt
        calls.append(1)
        return call(self, batch)

    generator = generator_of("sd15")
    with monkeypatch.context() as patch:
        patch.setattr(LoraStep, "__call__", crashing)
        with pytest.raises(KeyboardInterrupt):
            ways.train("cut", generator, graph=graph, master=True)
    assert _fingerprint(generator.pipeline) == generator.fingerprint
    require_same_files(ways.train("cut", generator, graph=graph, master=True), whole)


def test_master_weights_train_what_autocast_trains(ways: Ways):
    """Both round weights and gradients to bf16 where a layer computes. The rest of the U-Net is in bf16 throughout."""
    options: dict[str, Any] = {"steps": 30, "lr": 0.005}
    exact = ways.train("fp32", generator_of("sd15", torch.float32), **options)
    autocast = ways.train("autocast", generator_of("sd15"), master=False, **options)
    master = ways.train("master", generator_of("sd15"), master=True, **options)
    losses = {way: load_file(way / "losses.safetensors")["loss"] for way in (exact, autocast, master)}
    for way in (autocast, master):
        assert torch.allclose(losses[way], losses[exact], rtol=0.02), (losses[way] / losses[exact]).sort()
    weights = {way: load_file(way / WEIGHTS) for way in (exact, autocast, master)}
    largest = max(float(value.abs().max()) for name, value in weights[exact].items() if "lora_B" in name)

    def distance(one: Path, other: Path) -> float:
        differences = [(weights[one][name] - weights[other][name]).flatten() for name in weights[one]]
        return float(torch.cat(differences).square().mean().sqrt())

    assert largest > 0.05  # they have left their first values, which are 0
    assert distance(master, autocast) < 0.1 * distance(autocast, exact)


def test_the_file_holds_the_master_weights(ways: Ways):
    weights = load_file(ways.train("master", generator_of("sd15"), master=True) / WEIGHTS)
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in weights.values())


class Elsewhere(TorchDispatchMode):
    """Notes operations that touch a tensor on the CPU: on a GPU they are copies, which no graph may contain."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = operation(*arguments, **(named or {}))
        self.calls += 1
        if any(value.device.type == "cpu" for value in tensors_in((arguments, named, result))):
            self.found.append(str(operation))
        return result


@pytest.mark.parametrize("architecture", ["sd15", "sd21", "sdxl"])
def test_after_the_first_step_nothing_is_copied_between_devices(architecture: str, monkeypatch: pytest.MonkeyPatch):
    """On the meta device, where tensors have a device and no content."""
    from diffusers import DDPMScheduler

    pipeline = generator_of(architecture).pipeline
    texts = encode_prompts(pipeline, ["a dog", "a cat"])
    layers = lora.add_adapter(pipeline.unet, LoraSettings(**SETTINGS), 0)
    torch.nn.Module.to(pipeline.unet, "meta")
    texts = Conditioning(texts.states.to("meta"), None if texts.pooled is None else texts.pooled.to("meta"))
    updates: list[int] = []
    monkeypatch.setattr(AdapterWeights, "update", lambda self: updates.append(1))  # no AdamW for this device
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    step = partial(
        _train_on,
        denoiser=pipeline.unet,
        scheduler=scheduler,
        weights=AdapterWeights(layers, 0.1),
        texts=texts,
        added=texts.added(16),
        autocast=False,
    )
    latents, index = torch.empty(3, 4, 8, 8, device="meta"), torch.zeros(3, dtype=torch.long, device="meta")
    batch = {"latents": latents, "noise": latents, "steps": index, "captions": index}
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    with Elsewhere() as first:
        step(batch)
    for name in ("tensor", "as_tensor", "from_numpy"):  # below the mode's sight
        monkeypatch.setattr(torch, name, lambda *_, **__: pytest.fail("a tensor of numbers: a copy to the device"))
    with Elsewhere() as second:
        step(batch)
    assert first.found and second.calls > 100  # the scheduler's table is moved in the first step
    assert second.found == [] and len(updates) == 2


# Weights


def layers_of(dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    rng = torch.Generator().manual_seed(0)
    shapes = {"a": (2, 5), "b": (7, 2), "c": (3, 2, 1, 1)}
    return {name: torch.nn.Parameter(torch.randn(shape, generator=rng).to(dtype)) for name, shape in shapes.items()}


def train_weights(weights: AdapterWeights, steps: range) -> None:
    """Each step has gradients of its own, which are exact in bf16."""
    for step in steps:
        rng = torch.Generator().manual_seed(step)
        for value in weights.layers.values():
            value.grad = torch.randn(value.shape, generator=rng).bfloat16().to(value.dtype)
        weights.update()


def test_master_weights_are_adamw_and_layers_hold_them_rounded():
    plain = AdapterWeights(layers_of(), 0.1)
    master = MasterWeights(layers_of(), 0.1, torch.bfloat16)
    for weights in (plain, master):
        train_weights(weights, range(5))
    for name, value in plain.layers.items():
        assert master.layers[name].dtype == torch.bfloat16 and master.layers[name].requires_grad
        assert torch.equal(master.layers[name], master.state()[f"parameter.{name}"].bfloat16())
        assert torch.allclose(master.state()[f"parameter.{name}"], value, atol=1e-6)
    layers = master.layers
    master.finalize()
    for name, value in layers.items():
        assert value.dtype == torch.float32 and torch.equal(value, master.state()[f"parameter.{name}"])


@pytest.mark.parametrize("before", ["plain", "master"])
@pytest.mark.parametrize("after", ["plain", "master"])
def test_a_checkpoint_of_either_kind_is_read_by_either(before: str, after: str, tmp_path: Path):
    def make(kind: str) -> AdapterWeights:
        return AdapterWeights(layers_of(), 0.1) if kind == "plain" else MasterWeights(layers_of(), 0.1, torch.bfloat16)

    whole, cut, resumed = make(before), make(before), make(after)
    train_weights(whole, range(6))
    train_weights(cut, range(3))
    lora._save_checkpoint(tmp_path / CHECKPOINT, cut, [1.0, 2.0, 3.0])
    assert lora._load_checkpoint(tmp_path / CHECKPOINT, resumed) == [1.0, 2.0, 3.0]
    train_weights(resumed, range(3, 6))
    assert whole.state().keys() == resumed.state().keys() and len(whole.state()) == 12
    for name, value in whole.state().items():
        if before == after:
            assert torch.equal(value, resumed.state()[name]), name
        else:
            assert torch.allclose(value, resumed.state()[name], atol=1e-6), name


def test_a_layer_without_a_gradient_has_a_gradient_of_zero():
    weights = MasterWeights(layers_of(), 0.1, torch.bfloat16)
    before = (
        {name: value.clone() for name, value in weights.state().items()} if weights.optimizer.state else layers_of()
    )
    weights.layers["a"].grad = torch.ones(2, 5, dtype=torch.bfloat16)
    weights.update()
    state = weights.state()
    assert torch.allclose(state["parameter.b"], before["b"].detach() * (1 - 0.1 * 0.01))  # AdamW's decay alone
    assert not state["exp_avg.b"].any() and state["exp_avg.a"].all()


# Losses


def test_losses_are_read_now_and_then_and_all_are_checked():
    losses = Losses([5.0], lr=0.1, every=3)
    losses.add(torch.tensor(4.0))
    losses.add(torch.tensor(3.0))
    assert losses.values == [5.0]
    losses.add(torch.tensor(2.0))
    assert losses.values == [5.0, 4.0, 3.0, 2.0]
    losses.add(torch.tensor(float("nan")))
    losses.add(torch.tensor(1.0))
    with pytest.raises(UserError, match=r"AIR\.LORA\.LR \(now 0\.1\)"):
        losses.read()


def test_a_loss_that_is_not_finite_is_found_before_the_checkpoint(ways: Ways, monkeypatch: pytest.MonkeyPatch):
    """On a GPU losses are read late; what a resumed run starts from is finite nevertheless."""
    monkeypatch.setattr(lora, "Losses", lambda *arguments, **named: Losses(*arguments, **named | {"every": 100}))
    monkeypatch.setattr(lora, "_save_checkpoint", lambda *_: pytest.fail("a checkpoint of weights that are not finite"))
    with pytest.raises(UserError, match=r"AIR\.LORA\.LR"):
        ways.train("high", make_generator(), lr=1e30)
