"""Generating images: what a job decides, interruptions, damage, and images that are none."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_pipeline import NAMES, FakePipeline, plan
from PIL import Image
from small_generators import ARCHITECTURES, make_pipeline, save_lcm_lora
from torch import Tensor

from air_plugin.diffusion import generate as module
from air_plugin.diffusion.generate import ATTEMPTS, GenerationReport, generate
from air_plugin.diffusion.jobs import ImageJob
from air_plugin.diffusion.lora import adapter_loaded
from air_plugin.diffusion.pipeline import Generator, _make_scheduler
from air_plugin.diffusion.sampling import Batch, to_levels
from air_plugin.diffusion.writers import MANIFEST, ImageWriter
from air_plugin.utils.errors import UserError
from air_plugin.utils.progress import handled_by


def contents(report: GenerationReport) -> list[bytes]:
    return [path.read_bytes() for path in report.paths]


def pixels(report: GenerationReport) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in report.paths])


# plan_jobs


def test_jobs_by_a_loop():
    jobs = plan(["dog", "annual_crop land"], images=3)
    assert [(job.classname, job.number, job.prompt) for job in jobs] == [
        (name, number, prompt)
        for number in range(3)
        for name, prompt in (("dog", "a photo of a dog."), ("annual_crop land", "a photo of a annual crop land."))
    ]
    assert {(job.steps, job.guidance, job.size, job.weights) for job in jobs} == {(2, 3.0, 16, "w")}


@pytest.mark.parametrize("fewer", [1, 2, 4])
def test_fewer_images_a_class_are_a_prefix(fewer: int):
    assert plan(images=5)[: fewer * len(NAMES)] == plan(images=fewer)


def test_an_image_does_not_depend_on_the_other_classes():
    alone = {job.key: job for job in plan(["sea"], images=3)}
    together = {job.key: job for job in plan(["river", "sea", "forest"], images=3)}
    assert alone.items() <= together.items()


def test_seeds_and_keys_are_unique():
    jobs = plan(["dog", "dogs", "annual crop", "annual_crop", "1", "11"], images=20)
    assert len({job.key for job in jobs}) == len({job.seed for job in jobs}) == 120


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"steps": 3}, {"guidance": 3.5}, {"size": 24}, {"weights": "v"}, {"template": "{}"}]
)
def test_whatever_decides_an_image_is_in_its_key(change: dict):
    assert not {job.key for job in plan()} & {job.key for job in plan(**change)}


def test_seeds_come_from_seed_class_and_number_alone():
    assert [job.seed for job in plan()] == [job.seed for job in plan(steps=9, guidance=1.0, weights="v")]
    assert not {job.seed for job in plan()} & {job.seed for job in plan(seed=1)}


def test_another_attempt_has_another_seed():
    job = plan()[0]
    seeds = [job.seed_of_attempt(attempt) for attempt in range(ATTEMPTS)]
    assert seeds[0] == job.seed and len(set(seeds)) == ATTEMPTS


# generate


def test_images_are_those_of_the_jobs_in_their_order(tmp_path: Path):
    pipeline, jobs = FakePipeline(), plan()
    report = generate(pipeline, jobs, tmp_path, batch_size=4)
    assert (report.generated, report.failed) == (6, 0)
    assert [len(seeds) for seeds in pipeline.seeds] == [4, 2]
    assert pipeline.prompts == [job.prompt for job in jobs]
    for job, path in zip(jobs, report.paths, strict=True):
        noise = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(job.seed))
        expected = (noise.permute(1, 2, 0) * 255).round().numpy()
        assert path.stem == job.key and np.array_equal(np.asarray(Image.open(path)), expected)


def test_the_real_pipeline_gives_the_same_images_twice(tiny_generator: Generator, tmp_path: Path):
    reports = [generate(tiny_generator.pipeline, plan(), tmp_path / name, batch_size=4) for name in ("one", "two")]
    assert contents(reports[0]) == contents(reports[1])
    assert len(set(contents(reports[0]))) == 6


def test_batch_size_changes_rounding_at_the_most(tiny_generator: Generator, tmp_path: Path):
    one, many = (
        pixels(generate(tiny_generator.pipeline, plan(), tmp_path / str(size), batch_size=size)) for size in (1, 32)
    )
    assert np.abs(one - many).max() <= 1
    assert np.abs(one[0] - one[1]).max() > 10  # images differ by far more than that


def test_prompt_and_guidance_reach_the_real_pipeline(tiny_generator: Generator, tmp_path: Path):
    def make_images(name: str, **changes: Any) -> np.ndarray:
        return pixels(generate(tiny_generator.pipeline, plan(["sea"], **changes), tmp_path / name, batch_size=2))

    plain = make_images("plain")
    assert np.abs(plain - make_images("template", template="sea sea sea {}")).max() > 0
    assert np.abs(plain - make_images("guidance", guidance=9.0)).max() > 0
    assert np.abs(plain - make_images("steps", steps=4)).max() > 0
    assert make_images("size", size=32).shape == (2, 32, 32, 3)


def test_second_call_draws_nothing(tmp_path: Path):
    pipeline = FakePipeline()
    first = generate(pipeline, plan(), tmp_path, batch_size=4)
    second = generate(pipeline, plan(), tmp_path, batch_size=4)
    assert second.generated == 0 and pipeline.generated == 6 and second.paths == first.paths


def test_more_images_draw_only_what_is_new(tmp_path: Path):
    pipeline = FakePipeline()
    generate(pipeline, plan(images=2), tmp_path, batch_size=3)
    report = generate(pipeline, plan(images=5), tmp_path, batch_size=3)
    assert report.generated == 9 and pipeline.generated == 15
    assert generate(pipeline, plan(["sea"], images=5), tmp_path, batch_size=3).generated == 0


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_an_interrupted_run_ends_bit_identical(tiny_generator: Generator, tmp_path: Path, batches: int, monkeypatch):
    whole = generate(tiny_generator.pipeline, plan(), tmp_path / "whole", batch_size=2)
    start, calls = module.start_batch, []

    def counting(pipeline: Any, jobs: Sequence[ImageJob], *others: Any) -> Batch:
        calls.append(len(jobs))
        if len(calls) == batches + 1:
            raise KeyboardInterrupt
        return start(pipeline, jobs, *others)

    monkeypatch.setattr(module, "start_batch", counting)
    with pytest.raises(KeyboardInterrupt):
        generate(tiny_generator.pipeline, plan(), tmp_path / "cut", batch_size=2)
    calls[:] = [0] * 100
    resumed = generate(tiny_generator.pipeline, plan(), tmp_path / "cut", batch_size=2)
    assert resumed.generated == sum(calls) == 6 - 2 * batches
    assert contents(resumed) == contents(whole)


def test_a_kill_within_a_batch_ends_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Among four images the second fails at first, and the kill comes between two files."""
    bad = plan()[1].seed

    def spoil(seed: int, image: Tensor) -> Tensor:
        return image * 0 if seed == bad else image

    whole = generate(FakePipeline(spoil), plan(), tmp_path / "whole", batch_size=4)
    put, kept = ImageWriter.put, []

    def killed(self: ImageWriter, *arguments: Any) -> None:
        if len(kept) == 2:
            raise KeyboardInterrupt
        kept.append(1)
        put(self, *arguments)

    monkeypatch.setattr(ImageWriter, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        generate(FakePipeline(spoil), plan(), tmp_path / "cut", batch_size=4)
    monkeypatch.setattr(ImageWriter, "put", put)
    resumed = generate(FakePipeline(spoil), plan(), tmp_path / "cut", batch_size=4)
    assert resumed.generated == 4 and resumed.failed == whole.failed == 1
    assert contents(resumed) == contents(whole)


@pytest.mark.parametrize("damage", ["cut short", "another image", "emptied"])
def test_a_damaged_image_is_made_again_and_said(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="air_plugin")
    first = generate(FakePipeline(), plan(), tmp_path, batch_size=4)
    before, path = contents(first), first.paths[2]
    if damage == "another image":
        shutil.copyfile(first.paths[3], path)
    else:
        path.write_bytes(path.read_bytes()[: 100 if damage == "cut short" else 0])
    second = generate(FakePipeline(), plan(), tmp_path, batch_size=4)
    assert caplog.messages == [f"cache: {path} is thrown away and made again: its content does not match its key"]
    assert second.generated == 1 and contents(second) == before
    assert generate(FakePipeline(), plan(), tmp_path, batch_size=4).generated == 0


def test_a_missing_image_is_made_again(tmp_path: Path):
    first = generate(FakePipeline(), plan(), tmp_path, batch_size=4)
    before = contents(first)
    first.paths[5].unlink()
    pipeline = FakePipeline()
    assert contents(generate(pipeline, plan(), tmp_path, batch_size=4)) == before
    assert pipeline.generated == 2  # its batch, no other


def test_the_manifest_says_how_each_image_was_made(tmp_path: Path):
    jobs = plan()
    generate(FakePipeline(), jobs, tmp_path, batch_size=4)
    lines = [json.loads(line) for line in (tmp_path / MANIFEST).read_text().splitlines()]
    assert [line["key"] for line in lines] == [job.key for job in jobs]
    assert lines[1]["prompt"] == jobs[1].prompt and lines[1]["seed"] == jobs[1].seed and lines[1]["attempt"] == 0


@pytest.mark.parametrize("cut", [1, 30, 600])
def test_a_manifest_line_cut_short_costs_its_image_alone(tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="air_plugin")
    first = generate(FakePipeline(), plan(), tmp_path, batch_size=1)
    before, manifest = contents(first), tmp_path / MANIFEST
    text = manifest.read_text()
    lines = text.splitlines(keepends=True)
    kept = text[:-cut]
    lost = sum(kept.count(line.rstrip("\n")) == 0 for line in lines)
    manifest.write_text(kept)
    second = generate(FakePipeline(), plan(), tmp_path, batch_size=1)
    assert second.generated == lost and contents(second) == before
    assert caplog.text.count("a damaged line in") == (0 if cut == 1 else 1)
    assert generate(FakePipeline(), plan(), tmp_path, batch_size=1).generated == 0


@pytest.mark.parametrize("line", ["5", "[]", "null", '"text"', '{"no": "key"}', "\x00\x01", '{"key": "other"}'])
def test_foreign_lines_in_the_manifest_do_no_harm(tmp_path: Path, line: str):
    first = generate(FakePipeline(), plan(), tmp_path, batch_size=4)
    manifest = tmp_path / MANIFEST
    manifest.write_text(line + "\n" + manifest.read_text())
    second = generate(FakePipeline(), plan(), tmp_path, batch_size=4)
    assert second.generated == 0 and second.paths == first.paths


def test_an_image_that_the_manifest_does_not_know_is_not_trusted(tmp_path: Path):
    job = plan()[0]
    Image.new("RGB", (16, 16), "red").save(tmp_path / f"{job.key}.png")
    report = generate(FakePipeline(), plan(), tmp_path, batch_size=4)
    assert report.generated == 6 and pixels(report)[0].std() > 10


# Every architecture


@pytest.fixture(params=[*ARCHITECTURES, "lcm"])
def pipeline(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """A pipeline of each kind with the scheduler that it is generated with."""
    made = make_pipeline("sd15" if request.param == "lcm" else request.param)
    kind = {"lcm": "LCMScheduler", "sd_turbo": "EulerDiscreteScheduler"}.get(
        request.param, "DPMSolverMultistepScheduler"
    )
    made.scheduler = _make_scheduler(kind, made.scheduler)
    lcm = save_lcm_lora(tmp_path / "lcm", made.unet, strength=0.1) if request.param == "lcm" else None
    with adapter_loaded(made, None, accelerator=lcm and lcm / "pytorch_lora_weights.safetensors"):
        yield made


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_every_architecture_draws_an_image_by_its_seed_alone(pipeline: Any, tmp_path: Path, guidance: float):
    """Alone or with others, the first time or the second, forwards or backwards."""
    jobs = plan(guidance=guidance)
    together = pixels(generate(pipeline, jobs, tmp_path / "together", batch_size=6))
    again = pixels(generate(pipeline, jobs, tmp_path / "again", batch_size=6))
    alone = pixels(generate(pipeline, jobs[::-1], tmp_path / "alone", batch_size=1))[::-1]
    assert np.array_equal(together, again)
    assert np.abs(together - alone).max() <= 1
    apart = [np.abs(together[i] - together[k]).max() for i in range(6) for k in range(i)]
    assert min(apart) > 5  # images differ by far more than that


def test_every_architecture_draws_what_it_is_told(pipeline: Any, tmp_path: Path):
    def generated(name: str, **changes: Any) -> np.ndarray:
        return pixels(generate(pipeline, plan(["sea"], **changes), tmp_path / name, batch_size=2))

    plain = generated("plain")
    for name, change in (("template", {"template": "sea sea {}"}), ("steps", {"steps": 4}), ("seed", {"seed": 1})):
        assert np.abs(plain - generated(name, **change)).max() > 0, name
    assert generated("size", size=24).shape == (2, 24, 24, 3)


def test_an_interrupted_run_of_every_architecture_ends_bit_identical(pipeline: Any, tmp_path: Path):
    whole = generate(pipeline, plan(), tmp_path / "whole", batch_size=2)
    generate(pipeline, plan()[:2], tmp_path / "cut", batch_size=2)
    resumed = generate(pipeline, plan(), tmp_path / "cut", batch_size=2)
    assert resumed.generated == 4 and contents(resumed) == contents(whole)


# Images that are none


BLANKS = {
    "black": lambda image: image * 0,
    "white": lambda image: image * 0 + 1,
    "a colour": lambda image: image * 0 + torch.tensor([0.2, 0.4, 0.9])[:, None, None],
    "nearly uniform": lambda image: 0.5 + 1e-4 * image,
    "nan": lambda image: image * float("nan"),
    "one nan": lambda image: torch.where(image == image.max(), float("nan"), image),
}


@pytest.mark.parametrize("kind", BLANKS)
def test_images_that_are_none_are_drawn_again_with_the_next_seed(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, logger="air_plugin")
    jobs = plan()
    bad = {jobs[1].seed, jobs[4].seed, jobs[4].seed_of_attempt(1)}
    pipeline = FakePipeline(lambda seed, image: BLANKS[kind](image) if seed in bad else image)
    report = generate(pipeline, jobs, tmp_path, batch_size=6)
    assert pipeline.seeds == [
        [job.seed for job in jobs],
        [jobs[1].seed_of_attempt(1), jobs[4].seed_of_attempt(1)],
        [jobs[4].seed_of_attempt(2)],
    ]
    assert (report.generated, report.failed) == (6, 3)
    assert "images: 3 attempts" in caplog.text
    noise = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(jobs[4].seed_of_attempt(2)))
    assert np.array_equal(pixels(report)[4], (noise.permute(1, 2, 0) * 255).round().numpy())
    lines = map(json.loads, (tmp_path / MANIFEST).read_text().splitlines())
    attempts = {line["key"]: line["attempt"] for line in lines}
    assert [attempts[job.key] for job in jobs] == [0, 1, 0, 0, 2, 0]


def test_a_generator_that_never_gives_an_image_is_an_error_for_people(tmp_path: Path):
    jobs = plan()
    bad = {jobs[1].seed_of_attempt(attempt) for attempt in range(ATTEMPTS)}
    pipeline = FakePipeline(lambda seed, image: image * 0 if seed in bad else image)
    with pytest.raises(UserError, match="annual crop land") as raised:
        generate(pipeline, jobs, tmp_path, batch_size=3)
    assert str(ATTEMPTS) in str(raised.value) and "\n" not in str(raised.value)
    assert pipeline.generated == 3 + ATTEMPTS - 1
    assert generate(FakePipeline(), jobs, tmp_path, batch_size=3).generated == 4  # what was good is kept


@pytest.mark.parametrize(
    ("values", "blank"),
    [
        (np.zeros((4, 4, 3)), True),
        (np.full((4, 4, 3), 0.7), True),
        (np.broadcast_to(np.array([0.1, 0.5, 0.9]), (4, 4, 3)), True),
        (np.eye(4)[..., None].repeat(3, 2), False),
        (np.linspace(0, 1, 48).reshape(4, 4, 3), False),
        (np.where(np.arange(48).reshape(4, 4, 3) == 7, np.nan, np.eye(4)[..., None]), True),
    ],
)
def test_blank_images(values: np.ndarray, blank: bool):
    """Next to one that is not blank, so that an image is judged by itself."""
    good = np.linspace(0, 1, 48).reshape(4, 4, 3)[::-1]
    images = torch.from_numpy(np.stack([values, good])).permute(0, 3, 1, 2)
    levels, found = to_levels(images)
    assert found.tolist() == [blank, False]
    if not blank:
        assert np.array_equal(levels[0].numpy(), np.round(values.astype(np.float32) * 255))


class Checker(torch.nn.Module):
    """Blackens the images whose turn is in `bad`, as the real one does with what it flags."""

    device, dtype = torch.device("cpu"), torch.float32  # diffusers asks every part

    def __init__(self, bad: set[int]) -> None:
        super().__init__()
        self.bad, self.turn = bad, 0

    def forward(self, *, images: Tensor, clip_input: Tensor) -> tuple[Tensor, list[bool]]:
        flags = [self.turn + row in self.bad for row in range(len(images))]
        self.turn += len(images)
        for row, flagged in enumerate(flags):
            if flagged:
                images[row] = 0
        return images, flags


def test_what_the_safety_checker_blackens_is_drawn_again_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="air_plugin")
    jobs, pipeline = plan(), make_pipeline("sd15", safety_checker=True)
    plain = pixels(generate(pipeline, jobs, tmp_path / "plain", batch_size=6))
    assert caplog.messages == []
    pipeline.safety_checker = Checker({1, 4, 6})  # the seventh is the second image's next attempt
    report = generate(pipeline, jobs, tmp_path / "checked", batch_size=6)
    assert report.failed == 3
    note = "images: 3 attempts gave black (as a safety checker leaves them), uniform or non-finite images; each was "
    assert caplog.messages == [note + "generated again with the next seed"]
    checked = pixels(report)
    assert np.array_equal(checked[[0, 2, 3, 5]], plain[[0, 2, 3, 5]])
    for row in (1, 4):
        assert checked[row].std() > 5 and np.abs(checked[row] - plain[row]).max() > 5
    lines = [json.loads(line) for line in (tmp_path / "checked" / MANIFEST).read_text().splitlines()]
    attempts = {line["key"]: line["attempt"] for line in lines}
    assert [attempts[job.key] for job in jobs] == [0, 2, 0, 0, 1, 0]


def test_a_safety_checker_that_lets_nothing_through_is_an_error_for_people(tmp_path: Path):
    pipeline = make_pipeline("sd15", safety_checker=True)
    pipeline.safety_checker.concept_embeds_weights.data.fill_(-2.0)  # a threshold below every cosine
    with pytest.raises(UserError, match=r"AIR\.SAFETY_CHECKER False"):
        generate(pipeline, plan(), tmp_path, batch_size=6)


def test_every_image_moves_the_bar(tmp_path: Path):
    """Events of a resumed run: the images that are there, then each new one."""
    generate(FakePipeline(), plan()[:2], tmp_path, batch_size=2)
    events: list[tuple[str, int, int]] = []
    with handled_by(lambda event: events.append((event.stage, event.done, event.total))):
        generate(FakePipeline(), plan(), tmp_path, batch_size=2)
    assert events == [("images", done, 6) for done in range(2, 7)]
