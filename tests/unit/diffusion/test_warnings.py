"""Warnings of other libraries on the terminal: a process that loads, trains and generates leaves stderr empty."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_generators import make_pipeline, save_lcm_lora, save_pipeline
from small_models import write_pictures

from air_plugin.diffusion.pipeline import _takes_dtype

ROOT = Path(__file__).resolve().parents[3]

EVERY_STAGE = """
import sys
from pathlib import Path
from small_models import air_settings
from air_plugin.diffusion.generate import generate
from air_plugin.diffusion.jobs import plan_jobs
from air_plugin.diffusion.lora import adapter_loaded, train_lora
from air_plugin.diffusion.pipeline import load_generator
from air_plugin.utils.store import Store

root, settings = Path(sys.argv[1]), air_settings()
generator = load_generator(str(root / "sd15"), scheduler="lcm", lcm_lora=str(root / "lcm"), safety_checker=True)
pictures = sorted((root / "pictures").iterdir())
folder, _, _ = train_lora(
    generator, pictures, ["a", "b"], settings=settings.lora, size=16, seed=0, store=Store(root / "store")
)
jobs = plan_jobs(["a"], template="{}", images_per_class=1, seed=0, steps=2, guidance=1, size=16, weights="")
with adapter_loaded(generator.pipeline, folder, accelerator=generator.accelerator):
    generate(generator.pipeline, jobs, root / "images", batch_size=2)
print(generator.pipeline.unet.dtype, len(list((root / "images").glob("*.png"))))
"""

MODELS_OF_THE_PACKAGE = """
from benchmarks.prompt_step import random_backbone
from air_plugin.clip.loading import load_backbone
from air_plugin.diffusion.pipeline import load_generator
random_backbone()
load_backbone("mini")
load_generator("mini")
"""


def run(script: str, *arguments: Path) -> tuple[str, str]:
    """What a new process writes to stdout and stderr."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "compat")])}
    environment.pop("PYTHONWARNINGS", None)
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.full
def test_neither_a_few_step_generator_nor_a_model_without_pretrained_weights_warns(tmp_path: Path) -> None:
    """The generator's U-Net gets two adapters, of which peft would warn; open_clip would warn of missing weights."""
    save_pipeline("sd15", tmp_path / "sd15", safety_checker=True)
    save_lcm_lora(tmp_path / "lcm", make_pipeline("sd15").unet)
    write_pictures(tmp_path / "pictures", 2)
    assert run(EVERY_STAGE + MODELS_OF_THE_PACKAGE, tmp_path) == ("torch.float32 1\n", "")


@pytest.mark.parametrize(
    ("version", "newer"), [("0.32.0", False), ("0.39.0.dev0", False), ("0.40.0", True), ("1.0", True)]
)
def test_older_diffusers_do_not_know_the_argument_dtype(version: str, newer: bool) -> None:
    assert _takes_dtype(version) is newer
