"""`python -m air_plugin.mini.training clip|vae|unet|vit|all --out DIR [--steps N] [--fonts matplotlib]`."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from pathlib import Path

from air_plugin.utils.errors import exit_code
from air_plugin.utils.extras import require_extra
from air_plugin.utils.logs import show_logs

log = logging.getLogger("air_plugin.mini.training")

STAGES = ("clip", "vae", "unet", "vit")  # the U-Net needs the two before it; the ViT, the shipped CLIP


def main(arguments: list[str] | None = None) -> int:
    """Train one stage or all, in order."""
    parser = argparse.ArgumentParser(prog="python -m air_plugin.mini.training", description=__doc__)
    parser.add_argument("stage", choices=(*STAGES, "all"))
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and metrics")
    parser.add_argument("--steps", type=int, help="instead of the number that made the shipped weights")
    parser.add_argument("--fonts", choices=("debian", "matplotlib"), default="debian")
    parser.add_argument("--threads", type=int, help="torch threads")
    chosen = parser.parse_args(arguments)
    show_logs()
    require_extra("train", purpose="the training of mini")
    if chosen.threads:
        import torch

        torch.set_num_threads(chosen.threads)
    chosen.out.mkdir(parents=True, exist_ok=True)
    for stage in STAGES if chosen.stage == "all" else (chosen.stage,):
        module = importlib.import_module(f"air_plugin.mini.training.train_{stage}")
        options = {} if chosen.steps is None else {"steps": chosen.steps}
        log.info("%s %s", stage, module.main(chosen.out, fonts=chosen.fonts, **options))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
