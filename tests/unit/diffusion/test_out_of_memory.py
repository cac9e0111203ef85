"""Too little memory: the batch halves itself, and one image that does not fit is an error for people."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_pipeline import FakePipeline, plan
from small_generators import make_pipeline

from air_plugin.diffusion import generate as module
from air_plugin.diffusion.generate import generate
from air_plugin.utils.errors import exit_code, explain, is_out_of_memory


def contents(report: Any) -> list[bytes]:
    return [path.read_bytes() for path in report.paths]


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, logger="air_plugin")
    return caplog


@pytest.mark.parametrize(
    ("fits", "sizes", "line"),
    [
        (8, [8, 7], None),
        (4, [8, 4, 4, 4, 3], "out of memory with 8 images at once: continues with 4 (AIR.BATCH)"),
        (3, [8, 4, 2, 2, 2, 2, 2, 2, 2, 1], "out of memory with 8 images at once: continues with 2 (AIR.BATCH)"),
        (1, [8, 4, 2, *[1] * 15], "out of memory with 8 images at once: continues with 1 (AIR.BATCH)"),
    ],
)
def test_the_batch_halves_itself_once_and_says_so(
    tmp_path: Path, warnings: pytest.LogCaptureFixture, fits: int, sizes: list[int], line: str | None
):
    jobs, pipeline = plan(images=5), FakePipeline(fits=fits)
    expected = contents(generate(FakePipeline(), jobs, tmp_path / "roomy", batch_size=8))
    report = generate(pipeline, jobs, tmp_path / "tight", batch_size=8)
    assert pipeline.sizes == sizes and pipeline.generated == report.generated == 15
    assert contents(report) == expected
    assert warnings.messages == ([line] if line else [])


def test_an_odd_batch_is_halved_upwards(tmp_path: Path):
    pipeline = FakePipeline(fits=3)
    generate(pipeline, plan(images=2), tmp_path, batch_size=5)
    assert pipeline.sizes == [5, 3, 2, 1]


def test_memory_that_gets_smaller_later_costs_no_finished_image(tmp_path: Path, warnings: pytest.LogCaptureFixture):
    """Another program takes some of it after the first batch; images that fail are generated again in small batches."""
    jobs = plan(images=4)
    bad = {job.seed for job in jobs[4:8]}

    class Shrinking(FakePipeline):
        def __call__(self, **arguments: Any) -> Any:
            self.fits = 2 if self.seeds else 4
            return super().__call__(**arguments)

    def spoil(seed: int, image: torch.Tensor) -> torch.Tensor:
        return image * 0 if seed in bad else image

    expected = generate(FakePipeline(spoil), jobs, tmp_path / "roomy", batch_size=4)
    pipeline = Shrinking(spoil)
    report = generate(pipeline, jobs, tmp_path / "tight", batch_size=4)
    assert contents(report) == contents(expected) and report.failed == 4
    assert pipeline.sizes == [4, 4, *[2] * 6]
    assert warnings.messages == ["out of memory with 4 images at once: continues with 2 (AIR.BATCH)"]


@pytest.mark.parametrize(("ahead", "precision"), [(0, torch.float32), (1, torch.bfloat16)])
def test_one_image_that_does_not_fit_is_an_error_for_people(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ahead: int,
    precision: torch.dtype,
):
    """Exit code 2, one line, and images of earlier batches are kept, also of one that a GPU has just computed."""
    monkeypatch.setattr(module, "_batches_ahead", lambda device: ahead)
    jobs = plan(images=3)

    class Full(FakePipeline):
        def __call__(self, **arguments: Any) -> Any:
            self.fits = 0 if len(self.seeds) == 2 else 4
            return super().__call__(**arguments)

    def command() -> int:
        pipeline = Full()
        pipeline.unet.dtype = precision
        generate(pipeline, jobs, tmp_path, batch_size=4)
        return 0

    assert exit_code(command) == 2
    out, error = capsys.readouterr()
    lines = [line for line in error.splitlines() if line.startswith("error")]
    assert out == "" and len(lines) == 1
    assert all(part in lines[0] for part in ("AIR.SIZE (now 16)", "AIR.GENERATOR", "images are kept"))
    assert ("AIR.PRECISION bf16" in lines[0]) is (precision == torch.float32)
    again = FakePipeline()
    assert generate(again, jobs, tmp_path, batch_size=4).generated == again.generated == 1  # of nine


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_decoding_that_does_not_fit_halves_the_batch_too(
    tmp_path: Path, architecture: str, warnings: pytest.LogCaptureFixture
):
    """SDXL's decoder is in fp32 at that moment, where the pipeline is in fp16; it gets its type back."""
    jobs, pipeline = plan(), make_pipeline(architecture)
    expected = contents(generate(make_pipeline(architecture), jobs, tmp_path / "roomy", batch_size=2))
    decode, tried = pipeline.vae.decode, []

    def small(latents: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        tried.append(len(latents))
        if len(latents) > 2:
            pipeline.vae.to(torch.float64)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return decode(latents, *arguments, **named)

    pipeline.vae.decode = small
    report = generate(pipeline, jobs, tmp_path / "tight", batch_size=4)
    assert tried == [4, 2, 2, 2] and pipeline.vae.dtype == torch.float32
    assert contents(report) == expected and "4 images at once: continues with 2" in warnings.text


def test_nothing_of_the_failed_batch_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither the error's frames nor the text's keys: else the halved batch would not fit either."""
    pipeline, kept = make_pipeline("sd15"), []
    layer = next(layer for name, layer in pipeline.unet.named_modules() if name.endswith("attn2.to_k"))
    unet = pipeline.unet.forward

    def small(sample: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        if len(sample) > 4:
            unet(sample, *arguments, **named)
            kept.append(layer.forward.output)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        kept.append(layer.forward.output)
        return unet(sample, *arguments, **named)

    monkeypatch.setattr(pipeline.unet, "forward", small)
    generate(pipeline, plan(images=1), tmp_path, batch_size=3)
    assert kept[0] is not None and kept[1] is None


def test_other_errors_are_not_taken_for_it(tmp_path: Path):
    class Broken(FakePipeline):
        def __call__(self, **arguments: Any) -> Any:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        generate(Broken(), plan(), tmp_path, batch_size=4)


def test_too_little_memory_anywhere_is_an_error_for_people():
    """For instance in a step of LoRA."""
    line = explain(torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried"))
    assert line is not None and "\n" not in line
    assert all(part in line for part in ("AIR.LORA.BATCH", "AIR.SIZE", "finished work is kept"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: out of memory\nCompile with ..."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (MemoryError(), False),
        (ValueError("CUDA error: out of memory"), False),
    ],
)
def test_what_counts_as_too_little_memory(error: Any, expected: bool):
    assert is_out_of_memory(error) is expected
