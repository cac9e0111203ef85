"""A data set of tiny images and a tiny trainer for the tests of the Dassl API."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("dassl") is None:
    sys.path.append(str(ROOT / "compat"))

import dassl  # noqa: E402
import torch  # noqa: E402
from dassl.config import get_cfg_default  # noqa: E402
from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum  # noqa: E402
from dassl.engine import TRAINER_REGISTRY, TrainerX  # noqa: E402
from dassl.metrics import compute_accuracy  # noqa: E402
from dassl.optim import build_lr_scheduler, build_optimizer  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

IS_STANDIN = "standin" in dassl.__version__
standin_only = pytest.mark.skipif(
    not IS_STANDIN,
    reason=f"Dassl {dassl.__version__} is installed at {dassl.__file__}; this is about AiR's stand-in for it",
)

CLASSNAMES = ["red", "green", "blue"]


def write_images(root: Path, *, per_class: int = 4) -> None:
    """PNG files of 12 x 10 pixels: a colour for each class, a shade for each image, and a dark right side."""
    from PIL import Image

    root.mkdir(parents=True, exist_ok=True)
    for label, name in enumerate(CLASSNAMES):
        for number in range(per_class):
            colour = [20 * number] * 3
            colour[label] = 255
            image = Image.new("RGB", (12, 10), tuple(colour))
            image.paste((0, 0, 0), (8, 0, 12, 10))  # so that crops and flips of it differ
            image.save(root / f"{name}_{number}.png")


def read_items(root: Path, *, label: int | None = None) -> list[Datum]:
    """A Datum for each image, ordered by class; `label` replaces the true labels."""
    items = []
    for true_label, name in enumerate(CLASSNAMES):
        for path in sorted(root.glob(f"{name}_*.png")):
            items.append(Datum(str(path), true_label if label is None else label, classname=name))
    return items


@DATASET_REGISTRY.register()
class TinyColours(DatasetBase):
    """12 training images, the same as unlabelled ones (label -1), 6 for validation, 6 for testing."""

    def __init__(self, cfg):
        root = Path(cfg.DATASET.ROOT)
        items = read_items(root)
        super().__init__(train_x=items, train_u=read_items(root, label=-1), val=items[::2], test=items[1::2])


@DATASET_REGISTRY.register()
class TinyColoursBare(DatasetBase):
    """Only what every data set has: labelled training data and test data."""

    def __init__(self, cfg):
        items = read_items(Path(cfg.DATASET.ROOT))
        super().__init__(train_x=items, test=items[1::2])


@DATASET_REGISTRY.register()
class TinyApart(DatasetBase):
    """12 training images, the same as unlabelled ones (label -1), and 6 others below `apart` to validate and test."""

    def __init__(self, cfg):
        root = Path(cfg.DATASET.ROOT)
        others = read_items(root / "apart")
        super().__init__(
            train_x=read_items(root), train_u=read_items(root, label=-1), val=others[::2], test=others[1::2]
        )


@DATASET_REGISTRY.register()
class TinyApartBare(DatasetBase):
    """The same with labelled training data and test data only."""

    def __init__(self, cfg):
        root = Path(cfg.DATASET.ROOT)
        super().__init__(train_x=read_items(root), test=read_items(root / "apart")[1::2])


class TinyNet(nn.Module):
    """Mean colour -> scores."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(3, num_classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.classifier(image.mean((2, 3)))


@TRAINER_REGISTRY.register()
class TinyTrainer(TrainerX):
    """As CoOp's trainers are written."""

    def build_model(self):
        self.model = TinyNet(self.num_classes).to(self.device)
        self.optim = build_optimizer(self.model, self.cfg.OPTIM)
        self.sched = build_lr_scheduler(self.optim, self.cfg.OPTIM)
        self.register_model("tiny_net", self.model, self.optim, self.sched)

    def parse_batch_train(self, batch):
        return batch["img"].to(self.device), batch["label"].to(self.device)

    def forward_backward(self, batch):
        image, label = self.parse_batch_train(batch)
        output = self.model(image)
        loss = F.cross_entropy(output, label)
        self.model_backward_and_update(loss)
        if (self.batch_idx + 1) == self.num_batches:
            self.update_lr()
        return {"loss": loss.item(), "acc": compute_accuracy(output, label)[0].item()}


@TRAINER_REGISTRY.register()
class TinyZeroShot(TrainerX):
    """As CoOp's zero-shot trainer is written: it registers no model and cannot be trained."""

    def build_model(self):
        pass

    def model_inference(self, image):
        return image.mean((2, 3))


def tiny_cfg(root: Path, output: Path, **options):
    """A configuration for these; options like `OPTIM__MAX_EPOCH=3` are set on top of it."""
    cfg = get_cfg_default()
    cfg.OUTPUT_DIR = str(output)
    cfg.USE_CUDA = False
    cfg.INPUT.SIZE = (8, 8)
    cfg.INPUT.TRANSFORMS = ("random_resized_crop", "random_flip", "normalize")
    cfg.DATASET.NAME = "TinyColours"
    cfg.DATASET.ROOT = str(root)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.TRAIN_X.BATCH_SIZE = 5
    cfg.DATALOADER.TEST.BATCH_SIZE = 4
    cfg.OPTIM.NAME = "sgd"
    cfg.OPTIM.LR = 0.1
    cfg.OPTIM.MAX_EPOCH = 2
    cfg.OPTIM.LR_SCHEDULER = "cosine"
    cfg.TRAIN.PRINT_FREQ = 1
    cfg.TRAINER.NAME = "TinyTrainer"
    for key, value in options.items():
        node = cfg
        *parents, last = key.split("__")
        for parent in parents:
            node = node[parent]
        node[last] = value
    return cfg
