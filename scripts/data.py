"""The data of a script's runs, fetched where it is missing and may be fetched; and which weights they will download."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

from air_plugin.utils.downloads import announce_backbone, announce_generator
from air_plugin.utils.errors import UserError
from air_plugin.utils.offline import is_offline
from air_plugin.utils.progress import handled_by
from scripts.compose import config_file, facts_of, resolve, uses_generator
from scripts.display import Display


def require_data(name: str, options: Sequence[str], *, root: Path, display: Display) -> None:
    """Fetch what a data set lacks, unless PREPARE=0 or AIR_OFFLINE forbid it; then an error names the command.

    Args:
        name: of a file in configs/datasets.
        options: of the script, KEY, VALUE, KEY, VALUE ...; those of the data set count.
        root: of all data sets.
        display: of the script; shows how far a download is.

    Raises:
        UserError: something is missing and is not or cannot be fetched.
    """
    pairs = zip(options[::2], options[1::2], strict=False)
    own = [part for pair in pairs if pair[0].startswith("DATASET.") for part in pair]
    dataset_file = config_file("datasets", name, "data set")
    cfg, _ = resolve([], dataset_file=dataset_file, options=own, flags={"DATASET.ROOT": str(root)})
    kind = facts_of(cfg)
    folder = root / kind.dataset_dir
    if not kind.source.files and not kind.source.needed:  # generated, or a person's own
        return
    from datasets.download import fetch, is_missing

    if not is_missing(kind.source, folder) or _is_usable(kind, cfg):
        return
    by_hand = [item for item in kind.source.needed if not item.drive and not (folder / item.puts).exists()]
    missing = [] if by_hand else _fetch(partial(fetch, name, kind.source, folder), name, display)
    if rest := [*by_hand, *missing]:
        more = f" and {len(rest) - 1} more" if len(rest) > 1 else ""
        raise UserError(
            f"{name}: {rest[0].what}{more} must be fetched by hand; where from and where to: {kind.command_at(root)}"
        )


def announce_weights(configs: Iterable[Any]) -> None:
    """Log which weights the runs of these configs will download, once for all of them."""
    backbones: dict[str, None] = {}
    generators: dict[tuple[Any, ...], None] = {}
    for cfg in configs:
        backbones |= {cfg.MODEL.BACKBONE.NAME: None}
        if uses_generator(cfg.TRAINER.NAME):
            backbones |= {cfg.AIR.BACKBONE: None} if cfg.AIR.BACKBONE else {}
            if cfg.AIR.PROTOTYPES == "synthetic":
                air = cfg.AIR
                generators |= {(air.GENERATOR, air.REVISION, air.VARIANT, air.SAFETY_CHECKER, air.LCM_LORA): None}
    for name in backbones:
        announce_backbone(name)
    for name, revision, variant, checker, adapter in generators:
        announce_generator(name, revision=revision, variant=variant, safety_checker=checker, lcm_lora=adapter)


def _is_usable(kind: Any, cfg: Any) -> bool:
    """Whether a data set can be loaded although something that is published with it is missing.

    Raises:
        UserError: it cannot, and nothing may be fetched.
    """
    try:
        kind(cfg)
    except UserError:
        if os.environ.get("PREPARE", "") == "0" or is_offline():
            raise  # the message names the command
        return False
    return True


def _fetch(fetch: Any, name: str, display: Display) -> list[Any]:
    """Fetch a data set; on a terminal the display has the bar."""
    if not display.live:
        return list(fetch())
    messages = io.StringIO()
    display.show([name])
    try:
        with redirect_stderr(messages), handled_by(partial(display.update, name)):
            return list(fetch())
    finally:
        display.show([])
        sys.stderr.write(messages.getvalue())
