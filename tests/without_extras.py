"""`python tests/without_extras.py FOLDER MODULE ...`: a drop-in's work where these modules are not installed.

An auxiliary classifier of two classes is made with the embedded models; LoRA, images and features lie below FOLDER.
"""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER, *HIDDEN = sys.argv[1:]
ROOT = Path(__file__).resolve().parents[1]
sys.path[0:1] = [str(ROOT), str(ROOT / "compat")]
for hidden in HIDDEN:
    sys.modules[hidden] = None  # type: ignore[assignment]  # an import of it fails as if it were not installed

from dassl.config import get_cfg_default  # noqa: E402
from PIL import Image  # noqa: E402

import air_plugin  # noqa: E402
from air_plugin import (  # noqa: E402
    AuxiliaryMixin,
    Store,
    add_air_config,
    augment,
    build_auxiliary,
    load_backbone,
    look_at_unlabelled,
)
from air_plugin.config import AirSettings, merge_file  # noqa: E402
from air_plugin.utils.provenance import Stages  # noqa: E402

NAMES = ["zero", "one"]


class Trainer:
    """Anybody's."""


def main() -> None:
    assert all(getattr(air_plugin, name) is not None for name in air_plugin.__all__)
    mixed = augment(Trainer)
    assert issubclass(mixed, AuxiliaryMixin) and mixed.__name__ == "Trainer+AiR"

    cfg = get_cfg_default()
    add_air_config(cfg)
    merge_file(cfg, ROOT / "air_plugin" / "mini" / "settings.yaml")
    cfg.AIR.merge_from_list(["M", 2, "K", 1, "STEPS", 1, "LORA.STEPS", 1, "LORA.BATCH", 2])
    paths = [str(Path(FOLDER) / f"{shade}.png") for shade in range(4)]
    for shade, path in enumerate(paths):
        Image.new("RGB", (32, 32), (60 * shade, 0, 0)).save(path)

    backbone, store = load_backbone("mini"), Store(Path(FOLDER) / "store")
    texts = backbone.encode_texts([f"a photo of the digit {name}." for name in NAMES])
    unlabelled, _ = look_at_unlabelled(backbone, paths, texts, store=store)
    settings = AirSettings.from_cfg(cfg)
    auxiliary = build_auxiliary(backbone, NAMES, unlabelled, settings=settings, store=store, stages=Stages())
    print(tuple(auxiliary.classifier.probs(unlabelled.features).shape))


if __name__ == "__main__":
    main()
