"""A training step as a CUDA graph: one call starts all of its kernels, which the host otherwise starts one by one."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]


class Graph(Protocol):
    """What `GraphedStep` needs of a CUDA graph; tests have one that works on a CPU (tests/recorded_graph.py)."""

    def warm_up(self, call: Callable[[], Tensors]) -> Tensors:
        """Run `call` where it may be captured later, and return its result."""

    def capture(self, call: Callable[[], Tensors]) -> Tensors:
        """Record the kernels of `call` without running them; return its result, the tensors that `replay` fills."""

    def replay(self) -> None:
        """Run the recorded kernels: they read and write the memory that they had when they were recorded."""


class CudaGraph:
    """A `torch.cuda.CUDAGraph` with its own stream and memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._graph = torch.cuda.CUDAGraph()

    def warm_up(self, call: Callable[[], Tensors]) -> Tensors:
        """Run `call` on the graph's stream: what is allocated on the usual stream cannot be captured."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = call()
        current.wait_stream(self._stream)
        return outputs

    def capture(self, call: Callable[[], Tensors]) -> Tensors:
        current = torch.cuda.current_stream(self._device)
        generator = torch.cuda.default_generators[current.device.index]
        random_state = generator.clone_state()
        gc.collect()  # a graph that is freed during the capture would break it
        try:
            # thread_local: other threads may copy and allocate meanwhile
            with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
                return call()
        except BaseException:  # torch leaves its stream and the generator as they are during a capture
            torch.cuda.set_stream(current)
            with suppress(RuntimeError):
                generator.graphsafe_set_state(random_state)
            raise

    def replay(self) -> None:
        self._graph.replay()


class GraphedStep:
    """Runs a training step: first kernel by kernel, then, on a CUDA device, as a graph.

    The first `warm_up` steps of a shape are ordinary steps and count as such, so no state has to be restored. The next
    one is captured, which runs nothing, and replayed, as all later ones are. The step runs kernel by kernel wherever
    that is impossible: on other devices, for inputs of other shapes than the captured ones (a last, smaller batch), and
    for good where the capture fails, which is logged. The same kernels compute the same values either way; results
    may differ by rounding where a library chooses another kernel during a capture.

    Args:
        step: from inputs to outputs, by name: forward, loss, backward; the optimiser's step may be part of it. It must
            not wait for the device (`item()`, copies to the CPU). Whatever differs between two steps is an input, or a
            tensor that is changed in place: other values stay those of the capture. An optimiser in it is
            `capturable`, and has a tensor as learning rate if that has a schedule.
        parameters: those whose gradient `step` computes. It begins with no gradient (None); after a call, `grad` is the
            gradient of this step. Replays write it to the same memory.
        device: where the step runs.
        name: of the step, for the log.
        enabled: False: never capture.
        warm_up: steps before the capture; at least 1, so that an optimiser has its state.
        graph: for tests; default: a CUDA graph on a CUDA device.

    Example:
        >>> runner = GraphedStep(step, parameters, device=device, name="LoRA", enabled=cfg.AIR.CUDA_GRAPHS)
        >>> for batch in batches:
        ...     losses.append(runner(batch)["loss"])
    """

    def __init__(
        self,
        step: Callable[[Tensors], Tensors],
        parameters: Sequence[torch.nn.Parameter],
        *,
        device: torch.device,
        name: str,
        enabled: bool = True,
        warm_up: int = 3,
        graph: Graph | None = None,
    ) -> None:
        self._step, self._parameters, self._device, self._name = step, list(parameters), device, name
        self._warm_up, self._runs = warm_up, Counter[object]()
        if graph is None and enabled and device.type == "cuda" and torch.cuda.is_available():
            graph = CudaGraph(device)
        self._graph = graph if enabled else None
        self._shapes: object = None  # of the captured inputs
        self._inputs: Tensors = {}
        self._outputs: Tensors = {}
        self._gradients: list[Tensor | None] = []

    @property
    def captured(self) -> bool:
        return self._shapes is not None

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensors:
        """Run a step on inputs, on `device` or pinned on the CPU; the outputs are copies and have no gradient."""
        if self._graph is None:
            return self._run(inputs)
        shapes = tuple((name, value.shape, value.dtype) for name, value in sorted(inputs.items()))
        if not self.captured:
            self._runs[shapes] += 1
            if self._runs[shapes] <= self._warm_up:
                return self._graph.warm_up(lambda: self._run(inputs))
            self._capture(self._graph, inputs, shapes)
        if shapes != self._shapes:  # other ones were captured, or the capture has failed
            return self._run(inputs)
        for name, buffer in self._inputs.items():
            buffer.copy_(inputs[name], non_blocking=True)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return {name: value.clone() for name, value in self._outputs.items()}

    def _run(self, inputs: Mapping[str, Tensor]) -> Tensors:
        """Kernel by kernel, from no gradient."""
        self._forget_gradients()
        on_gpu = self._device.type == "cuda"
        outputs = self._step({name: value.to(self._device, non_blocking=on_gpu) for name, value in inputs.items()})
        return {name: value.detach() for name, value in outputs.items()}

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _capture(self, graph: Graph, inputs: Mapping[str, Tensor], shapes: object) -> None:
        buffers = {name: value.to(self._device, copy=True) for name, value in inputs.items()}
        self._forget_gradients()
        try:
            self._outputs = graph.capture(lambda: self._run(buffers))
        except Exception as error:  # whatever is wrong with the step itself, the next ordinary step raises again
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.info("%s: not captured as a CUDA graph, the steps run kernel by kernel (%s)", self._name, reason)
            self._graph = None
            return
        self._inputs, self._shapes = buffers, shapes
        self._gradients = [parameter.grad for parameter in self._parameters]
