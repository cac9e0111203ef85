"""Every benchmark runs, in small, and finds that the fast way and the plain one agree. Speed is measured elsewhere."""

from __future__ import annotations

import importlib
import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from air_plugin.utils.errors import UserError
from benchmarks import lora_step, same_results, transformer_flops
from benchmarks.generator_flops import lora_cost
from benchmarks.scaling_work import Finish, Timing, share, steady


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("auxiliary_head", "--backbone mini --classes 10 --batch 4 --repeats 1"),
        ("em", "--images 300 --dimensions 8 --classes 3 --chunk 64"),
        ("rivals", "--images 300 --dimensions 8 --classes 3"),
        ("lora_step", "--size tiny --batch 2 --turns 1 --steps 1"),
        ("generation", "--batch 4 --batches 1 --turns 1 --steps 2"),
        ("features", "--images 6 --views 3 --repeats 1 --workers 2"),
        ("visual_prompts", "--images 6 --batch 3 --repeats 1 --size 60x40 --workers 2"),
        ("selection", "--images 500 --classes 5 --subset 200 --repeat 1 --per-class 4"),
    ],
)
def test_a_benchmark_runs_and_agrees(name: str, options: str, capsys: pytest.CaptureFixture[str]):
    benchmark = importlib.import_module(f"benchmarks.{name}")
    assert benchmark.main([*options.split(), "--threads", "1"]) == 0
    out, error = capsys.readouterr()
    assert "1 threads" in out and error == ""


def test_the_operations_of_a_lora_step_are_those_that_are_counted_for_the_published_architecture():
    options = Namespace(device="meta", size="sd15", precision="bf16", rank=16, batch=None)
    case = lora_step.make_case(options)
    assert (case.settings.batch, case.pixels) == (16, 256)
    assert lora_step.flops_of(case) == lora_cost("sd15", 256, 16).flops


def test_a_gpu_that_is_not_there_is_an_error_of_the_command(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit:
        lora_step.main(["--device", "cuda"])
    assert exit.value.code == 2 and "torch finds no GPU" in capsys.readouterr().err


def test_the_rate_of_generation_by_one_and_two_workers(capsys: pytest.CaptureFixture[str]):
    scaling = importlib.import_module("benchmarks.scaling")
    options = ["--part", "generation", "--generated", "20", "--batch", "2", "--steps", "1"]
    assert scaling.main(options) == 0
    out = capsys.readouterr().out
    assert re.search(r"1 worker: [\d.e+]+ images/s; 2 workers: [\d.e+]+ images/s", out)
    assert len(re.findall(r"s in all; \d+\.\d\d s of processor time each", out)) == 2


def test_a_rate_is_counted_from_the_first_unit_of_each_worker_to_the_last_one():
    # Each of two workers generates 6 images in 4 seconds.
    together = [Finish(at, 6, cpu=3.0) for at in (12, 12.5, 16, 16.5, 20, 20.5)]
    assert steady(together, begin=2.0, end=21.0, workers=2) == Timing(6 * 4 / 8.0, 10.5, 19.0, 0.5)
    waits = [Finish(at, 6, cpu=3.0) for at in (12, 12.5, 16, 16.5, 20)]  # nobody shares the last unit
    assert steady(waits, begin=2.0, end=21.0, workers=2).rate == pytest.approx(18 / 7.5)
    assert steady(together, begin=2.0, end=21.0, workers=1).rate == pytest.approx(30 / 8.5)
    with pytest.raises(UserError, match=r"^2 runs or batches are too few to measure 2 workers"):
        steady(together[:2], begin=0.0, end=25.0, workers=2)
    assert share(range(11), 2) == range(10) and share(range(11), 4) == range(8)


def test_the_cost_of_a_data_set_follows_from_the_rates(capsys: pytest.CaptureFixture[str]):
    rates = ["--lora-seconds", "360", "--image-rate", "10", "--view-rate", "100", "--image-bytes", "1000"]
    assert importlib.import_module("benchmarks.scaling").main(["--part", "cost", "--per-class", "72", *rates]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| EuroSAT"))
    encoded = 13_500 * 8 + 720
    parts = [360 / 3600, 720 / 10 / 3600, encoded / 100 / 3600]
    assert [float(part) for part in re.findall(r"\d+\.\d+(?= [+=|]|$)", row)[:3]] == [round(part, 2) for part in parts]
    assert f"= {sum(parts):.2f} |" in row and "| 720 |" in row
    assert f"0.01 GB + 0.00 GB + {4 * 512 * encoded / 1e9:.2f} GB = " in row


def write_results(root: Path, **changes: Any) -> Path:
    """A folder of results of two runs; the second one with changes."""
    for seed in (1, 2):
        folder = root / "digits" / f"seed{seed}"
        (folder / "bundle").mkdir(parents=True)
        result = {"accuracy": 90.5, "stages": str(root), "provenance": {"host": str(root)}}
        (folder / "result.json").write_text(json.dumps(result | (changes if seed == 2 else {})))
        (folder / "bundle" / "prompts.safetensors").write_bytes(b"weights")
    return root


def test_results_that_differ_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one, same, other = (write_results(tmp_path / name, **({"accuracy": 91} if name == "c" else {})) for name in "abc")
    assert same_results.main([str(one), str(same)]) == 0
    assert capsys.readouterr().out == "2 results are the same\n"
    (other / "digits" / "seed1" / "bundle" / "prompts.safetensors").write_bytes(b"weighty")
    (same / "digits" / "seed1" / "result.json").unlink()
    assert same_results.main([str(one), str(other)]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("prompts.safetensors: the weights differ")
    assert second == "digits/seed2/result.json: accuracy differs"
    assert same_results.main([str(one), str(same)]) == 1
    assert capsys.readouterr().out == "digits/seed1/result.json is in one of the folders only\n"
    with pytest.raises(UserError, match="has no results"):
        same_results.main([str(one), str(tmp_path / "nowhere")])


@pytest.mark.full
def test_generation_is_compared_with_its_parts(capsys: pytest.CaptureFixture[str]):
    """Loose limits: a share far from 1 or above the peak would be a mistake in what is measured."""
    generation = importlib.import_module("benchmarks.generation")
    options = ["--threads", "1", "--batch", "8", "16", "--batches", "2", "--turns", "2", "--steps", "6"]
    assert generation.main(options) == 0
    out = capsys.readouterr().out
    assert re.findall(r"batch (\d+):", out) == ["8", "16"]
    assert re.findall(r"difference of a pixel (\d+)", out) == ["0", "0"]
    assert all(0.6 < float(share) < 1.2 for share in re.findall(r"share ([\d.]+)", out))
    assert all(0.05 < float(peak) < 1 for peak in re.findall(r"(\S+) of the peak", out))
    assert all(0.8 < float(ratio) < 2 for ratio in re.findall(r"(\S+) times as fast", out))


def test_images_that_are_not_those_of_the_former_way_are_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    generation = importlib.import_module("benchmarks.generation")
    write = generation.write_image
    monkeypatch.setattr(generation, "write_image", lambda path, pixels: write(path, pixels ^ 1))
    assert generation.main(["--threads", "1", "--batch", "2", "--batches", "1", "--turns", "1", "--steps", "1"]) == 1
    assert "not those of the former way" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [1, 5])
def test_arithmetic_of_an_image_is_that_of_its_generation(steps: int):
    """Against a count of the operations that really run: of all steps, both passes, and the text's keys once."""
    from torch.utils.flop_counter import FlopCounterMode

    generation = importlib.import_module("benchmarks.generation")
    options = generation.parse(["--batches", "1", "--steps", str(steps)])
    task = generation.embedded(options)
    with FlopCounterMode(display=False) as counted:
        generation.run_alone(task, 3, options)
    text = task.pipeline.encode_prompt
    with FlopCounterMode(display=False) as prompts:
        text(prompt=["sea"], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    found = (counted.get_total_flops() - prompts.get_total_flops()) / 3
    assert found == pytest.approx(task.flops, rel=0.015)  # attention's products are not counted on a CPU


def test_the_benchmark_of_features_notices_wrong_features(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    benchmark = importlib.import_module("benchmarks.features")
    monkeypatch.setattr(benchmark, "stable_seed", lambda *parts: 0)  # of the plain way: other views
    assert benchmark.main(["--images", "2", "--views", "2", "--repeats", "1", "--threads", "1"]) == 1
    assert "error: they differ" in capsys.readouterr().err


def test_the_benchmark_of_features_needs_the_device_that_it_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        importlib.import_module("benchmarks.features").main(["--device", "cuda"])
    assert "this machine has no GPU" in capsys.readouterr().err


def test_the_transformers_are_counted_at_their_published_size(capsys: pytest.CaptureFixture):
    """Sizes of the files on the hub: Sana's transformer has 3.21 GB in fp16, its autoencoder 1.25 GB in fp32."""
    counts = transformer_flops.parameters("sana")
    assert round(2 * counts["transformer"] / 1e9, 2) == 3.21 and round(4 * counts["vae"] / 1e9, 2) == 1.25
    assert counts["text"] == 2_614_341_888  # Gemma 2 2B
    assert transformer_flops.parameters("flux_dev")["transformer"] == pytest.approx(11.9e9, rel=0.001)
    plain, small = (transformer_flops.step_cost("sana", 512, int8=int8) for int8 in (False, True))
    assert plain.flops == small.flops > 2 * 256 * 1e9 and plain.peak - small.peak > 0.4 * counts["transformer"]
    assert transformer_flops.main(["--models", "sana", "--sizes", "512", "--int8", "--batch", "1"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| sana")]
    assert f"{small.flops / 1e12:.2f}" in row
