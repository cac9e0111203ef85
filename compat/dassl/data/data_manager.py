"""From a configuration to a data set and its loaders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset

from ..utils import read_image
from .datasets import Datum, build_dataset
from .samplers import build_sampler
from .transforms.transforms import build_transform, plain_transform

if TYPE_CHECKING:
    from yacs.config import CfgNode

Transform = Callable[[Any], Any]


def build_data_loader(
    cfg: CfgNode,
    sampler_type: str = "SequentialSampler",
    data_source: Sequence[Datum] | None = None,
    batch_size: int = 64,
    n_domain: int = 0,
    n_ins: int = 2,
    tfm: Transform | Sequence[Transform] | None = None,
    is_train: bool = True,
    dataset_wrapper: Any = None,
) -> DataLoader[Any]:
    """A loader of batches as DatasetWrapper describes them.

    A training loader drops the last, smaller batch, except where that is the only one.
    """
    if not data_source:
        raise ValueError("A data loader needs at least one item of data")
    sampler = build_sampler(
        sampler_type, cfg=cfg, data_source=data_source, batch_size=batch_size, n_domain=n_domain, n_ins=n_ins
    )
    wrapper = DatasetWrapper if dataset_wrapper is None else dataset_wrapper
    return DataLoader(
        wrapper(cfg, data_source, transform=tfm, is_train=is_train),
        batch_size=batch_size,
        sampler=sampler,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        drop_last=is_train and len(data_source) >= batch_size,
        pin_memory=torch.cuda.is_available() and cfg.USE_CUDA,
    )


class DataManager:
    """The data set that the configuration names, and its loaders.

    Attributes:
        dataset: the data set.
        train_loader_x: of the labelled training data.
        train_loader_u: of the unlabelled training data, or None.
        val_loader: of the validation data, or None.
        test_loader: of the test data.
        num_classes, num_source_domains, lab2cname: as their names say.
    """

    def __init__(
        self,
        cfg: CfgNode,
        custom_tfm_train: Transform | Sequence[Transform] | None = None,
        custom_tfm_test: Transform | Sequence[Transform] | None = None,
        dataset_wrapper: Any = None,
    ) -> None:
        self.dataset = build_dataset(cfg)
        tfm_train = _choose_transform(cfg, custom_tfm_train, is_train=True)
        tfm_test = _choose_transform(cfg, custom_tfm_test, is_train=False)

        def train_loader(items: Sequence[Datum], node: CfgNode) -> DataLoader[Any]:
            return build_data_loader(
                cfg,
                sampler_type=node.SAMPLER,
                data_source=items,
                batch_size=node.BATCH_SIZE,
                n_domain=node.N_DOMAIN,
                n_ins=node.N_INS,
                tfm=tfm_train,
                is_train=True,
                dataset_wrapper=dataset_wrapper,
            )

        def test_loader(items: Sequence[Datum]) -> DataLoader[Any]:
            return build_data_loader(
                cfg,
                sampler_type=cfg.DATALOADER.TEST.SAMPLER,
                data_source=items,
                batch_size=cfg.DATALOADER.TEST.BATCH_SIZE,
                tfm=tfm_test,
                is_train=False,
                dataset_wrapper=dataset_wrapper,
            )

        node_x, node_u = cfg.DATALOADER.TRAIN_X, cfg.DATALOADER.TRAIN_U
        data = self.dataset
        self.train_loader_x = train_loader(data.train_x, node_x)
        self.train_loader_u = (
            train_loader(data.train_u, node_x if node_u.SAME_AS_X else node_u) if data.train_u else None
        )
        self.val_loader = test_loader(data.val) if data.val else None
        self.test_loader = test_loader(data.test)

        self._num_classes = data.num_classes
        self._num_source_domains = len(cfg.DATASET.SOURCE_DOMAINS)
        self._lab2cname = data.lab2cname
        if cfg.VERBOSE:
            self.show_dataset_summary(cfg)

    @property
    def num_classes(self) -> int:
        """How many classes the data set has."""
        return self._num_classes

    @property
    def num_source_domains(self) -> int:
        """How many domains the training data come from, as configured."""
        return self._num_source_domains

    @property
    def lab2cname(self) -> dict[int, str]:
        """Class index -> class name."""
        return self._lab2cname

    def show_dataset_summary(self, cfg: CfgNode) -> None:
        """Print a table: the data set's name, its domains, and the sizes of its parts."""
        from tabulate import tabulate

        data = self.dataset
        domains = (("Source", cfg.DATASET.SOURCE_DOMAINS), ("Target", cfg.DATASET.TARGET_DOMAINS))
        parts = ((name, getattr(data, name)) for name in ("train_x", "train_u", "val", "test"))
        table = [
            ["Dataset", cfg.DATASET.NAME],
            *([name, given] for name, given in domains if given),
            ["# classes", f"{self.num_classes:,}"],
            *([f"# {name}", f"{len(items):,}"] for name, items in parts if items),
        ]
        print(tabulate(table))


def _choose_transform(cfg: CfgNode, custom: Any, *, is_train: bool) -> Any:
    if custom is None:
        return build_transform(cfg, is_train=is_train)
    print(f"* Using custom transform for {'training' if is_train else 'testing'}")
    return custom


class DatasetWrapper(Dataset[dict[str, Any]]):
    """A list of Datum as a torch data set.

    An item is a dictionary: label, domain, impath, index, and img, the transformed image. With several
    transforms, the others' images are img2, img3, ...; with DATALOADER.K_TRANSFORMS > 1 (in training), each
    of these is a list of that many images; with DATALOADER.RETURN_IMG0, img0 is the image without
    augmentation.
    """

    def __init__(
        self,
        cfg: CfgNode,
        data_source: Sequence[Datum],
        transform: Transform | Sequence[Transform] | None = None,
        is_train: bool = False,
    ) -> None:
        self.cfg = cfg
        self.data_source = data_source
        self.transform = transform
        self.is_train = is_train
        self.k_tfm = cfg.DATALOADER.K_TRANSFORMS if is_train else 1
        self.return_img0 = cfg.DATALOADER.RETURN_IMG0
        if self.k_tfm > 1 and transform is None:
            raise ValueError(f"DATALOADER.K_TRANSFORMS is {self.k_tfm}, but there is no transform")
        self.to_tensor = plain_transform(cfg)

    def __len__(self) -> int:
        return len(self.data_source)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        item = self.data_source[idx]
        output = {"label": item.label, "domain": item.domain, "impath": item.impath, "index": idx}
        img0 = read_image(item.impath)

        if self.transform is None:
            output["img"] = img0
        else:
            given = self.transform
            transforms = given if isinstance(given, (list, tuple)) else [given]
            for number, tfm in enumerate(transforms, start=1):
                key = "img" if number == 1 else f"img{number}"
                output[key] = self._transform_image(tfm, img0)

        if self.return_img0:
            output["img0"] = self.to_tensor(img0)
        return output

    def _transform_image(self, tfm: Any, img0: Any) -> Any:
        images = [tfm(img0) for _ in range(self.k_tfm)]
        return images[0] if len(images) == 1 else images
