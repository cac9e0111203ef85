"""AIR.COMPILE: when the U-Net is compiled, for which batches, and what happens where torch cannot compile."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_pipeline import plan
from PIL import Image
from small_generators import make_pipeline

from air_plugin.diffusion.compile import PAYS_FROM, compiled, is_worth_compiling
from air_plugin.diffusion.generate import generate

ROOT = Path(__file__).resolve().parents[3]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("setting", "device", "images", "expected"),
    [
        (None, CPU, 10 * PAYS_FROM, False),
        (None, CUDA, PAYS_FROM - 1, False),
        (None, CUDA, PAYS_FROM, True),
        (True, CPU, 1, True),
        (True, CUDA, 1, True),
        (False, CUDA, 10 * PAYS_FROM, False),
    ],
)
def test_when_it_is_worth_it(setting: bool | None, device: torch.device, images: int, expected: bool):
    assert is_worth_compiling(setting, device, images) is expected


class Compiler:
    """torch.compile's stand-in: notes the batch sizes of what it compiled; its first calls raise the faults."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, faults: list[Exception | None] | None = None) -> None:
        self.sizes: list[int] = []
        self.formats: set[bool] = set()
        self.made, self.faults = 0, faults or []
        monkeypatch.setattr(torch, "compile", self)

    def __call__(self, forward: Callable[..., Any], *, dynamic: bool) -> Callable[..., Any]:
        self.made += 1
        assert dynamic is False

        def fast(sample: torch.Tensor, *arguments: Any, **named: Any) -> Any:
            if self.faults and (fault := self.faults.pop(0)):
                raise fault
            self.sizes.append(len(sample))
            unet = forward.__self__  # type: ignore[attr-defined]
            self.formats.add(unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last))
            return forward(sample, *arguments, **named)

        return fast


def contents(report: Any) -> list[bytes]:
    return [path.read_bytes() for path in report.paths]


def pixels(files: list[bytes]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(data))).astype(int) for data in files])


def make(folder: Path, **options: Any) -> tuple[list[bytes], Any]:
    pipeline = make_pipeline("sd_turbo")
    return contents(generate(pipeline, plan(guidance=1.0), folder, batch_size=4, **options)), pipeline


def test_full_batches_are_compiled_and_the_last_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another batch size would be compiled anew, which takes longer than it saves."""
    plain, _ = make(tmp_path / "plain")
    compiler = Compiler(monkeypatch)
    found, pipeline = make(tmp_path / "compiled", compile_unet=True)
    assert (compiler.made, compiler.sizes, compiler.formats) == (1, [4, 4], {True})  # a batch of 4, in 2 steps
    assert np.abs(pixels(found) - pixels(plain)).max() <= 1  # channels_last may round otherwise
    assert "forward" not in vars(pipeline.unet)
    assert all(value.is_contiguous() for value in pipeline.unet.parameters())


def test_nothing_is_compiled_unless_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compiler = Compiler(monkeypatch)
    make(tmp_path / "auto"), make(tmp_path / "off", compile_unet=False)
    assert compiler.made == 0


def test_where_torch_cannot_compile_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    plain, _ = make(tmp_path / "plain")
    compiler = Compiler(monkeypatch, [RuntimeError("Failed to find C compiler.\nPlease specify via CC")] * 9)
    caplog.set_level(logging.INFO, logger="air_plugin")
    found, _ = make(tmp_path / "compiled", compile_unet=True)
    assert found == plain and compiler.sizes == []
    reason = "RuntimeError: Failed to find C compiler."
    assert caplog.messages == [f"AIR.COMPILE: torch.compile fails here ({reason}); images are generated without it"]


def test_an_error_of_the_unet_itself_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Compiler(monkeypatch)
    unet = make_pipeline("sd15").unet
    with pytest.raises(RuntimeError, match="channels"), compiled(unet):
        unet(torch.zeros(1, 3, 8, 8), 1, encoder_hidden_states=torch.zeros(1, 3, 16))
    assert "forward" not in vars(unet)


@pytest.mark.parametrize(("calls", "sizes"), [(0, [2] * 12), (2, [4, 4, *[2] * 8])])
def test_a_batch_that_is_too_large_is_compiled_for_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, calls: int, sizes: list[int]
):
    """At once, or in the second batch."""
    compiler = Compiler(monkeypatch, [*[None] * calls, torch.cuda.OutOfMemoryError("CUDA out of memory.")])
    jobs = plan(images=4, guidance=1.0)
    generate(make_pipeline("sd_turbo"), jobs, tmp_path, batch_size=4, compile_unet=True)
    assert compiler.sizes == sizes
    assert caplog.messages == ["out of memory with 4 images at once: continues with 2 (AIR.BATCH)"]


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["", "/nowhere/c++"])
def test_torch_compiles_or_not(tmp_path: Path, compiler: str):
    """The real thing on the CPU: images differ by rounding at most; without a compiler one line is logged."""
    script = """
import sys
from pathlib import Path
import numpy as np
from fake_pipeline import plan
from PIL import Image
from small_generators import make_pipeline
from air_plugin.diffusion.generate import generate
from air_plugin.utils.logs import show_logs
show_logs()
made = []
for asked in (False, True):
    report = generate(make_pipeline("sd15"), plan(), Path(sys.argv[1], str(asked)), batch_size=3, compile_unet=asked)
    made.append(np.stack([np.asarray(Image.open(path)).astype(int) for path in report.paths]))
print(np.abs(made[0] - made[1]).max())
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), **({"CXX": compiler} if compiler else {})}
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) <= (0 if compiler else 1)  # after the progress of a busy machine
    lines = [line for line in done.stderr.splitlines() if "AIR.COMPILE" in line]  # torch, too, may log some
    assert len(lines) == bool(compiler)
