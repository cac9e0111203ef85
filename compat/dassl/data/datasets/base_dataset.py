"""An image with its label, and the base class of data sets."""

from __future__ import annotations

import os.path as osp
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from ..._left_out import left_out


class Datum:
    """One image of a data set.

    The names of the private attributes are part of the contract: CoOp's code pickles these objects.
    """

    def __init__(self, impath: str = "", label: int = 0, domain: int = 0, classname: str = "") -> None:
        if not isinstance(impath, str):
            raise TypeError(f"impath must be a str, not {type(impath).__name__}")
        if not osp.isfile(impath):
            raise FileNotFoundError(f'No image at "{impath}"')
        self._impath = impath
        self._label = label
        self._domain = domain
        self._classname = classname

    @property
    def impath(self) -> str:
        """The image's path."""
        return self._impath

    @property
    def label(self) -> int:
        """The class index."""
        return self._label

    @property
    def domain(self) -> int:
        """The domain's index."""
        return self._domain

    @property
    def classname(self) -> str:
        """The class's name."""
        return self._classname


class DatasetBase:
    """Lists of Datum: labelled and unlabelled training data, validation and test data.

    The classes are those of train_x.
    """

    dataset_dir = ""  # name of the directory under cfg.DATASET.ROOT
    domains: Sequence[str] = ()  # names of all domains

    def __init__(
        self,
        train_x: list[Datum] | None = None,
        train_u: list[Datum] | None = None,
        val: list[Datum] | None = None,
        test: list[Datum] | None = None,
    ) -> None:
        self._train_x = train_x
        self._train_u = train_u
        self._val = val
        self._test = test
        self._num_classes = self.get_num_classes(train_x)
        self._lab2cname, self._classnames = self.get_lab2cname(train_x)

    @property
    def train_x(self) -> list[Datum] | None:
        """Labelled training data."""
        return self._train_x

    @property
    def train_u(self) -> list[Datum] | None:
        """Unlabelled training data, if any; their labels mean nothing, and may be -1."""
        return self._train_u

    @property
    def val(self) -> list[Datum] | None:
        """Validation data, if any."""
        return self._val

    @property
    def test(self) -> list[Datum] | None:
        """Test data."""
        return self._test

    @property
    def lab2cname(self) -> dict[int, str]:
        """Class index -> class name."""
        return self._lab2cname

    @property
    def classnames(self) -> list[str]:
        """The classes' names, in the order of their indices."""
        return self._classnames

    @property
    def num_classes(self) -> int:
        """The highest class index + 1."""
        return self._num_classes

    @staticmethod
    def get_num_classes(data_source: Sequence[Datum] | None) -> int:
        """The highest label + 1."""
        if not data_source:
            raise ValueError("The data set has no train_x, and the classes are those of train_x")
        return max(item.label for item in data_source) + 1

    @staticmethod
    def get_lab2cname(data_source: Sequence[Datum] | None) -> tuple[dict[int, str], list[str]]:
        """The class names by label, and in the order of labels."""
        lab2cname = dict(sorted({item.label: item.classname for item in data_source or ()}.items()))
        return lab2cname, list(lab2cname.values())

    def check_input_domains(self, source_domains: Sequence[str], target_domains: Sequence[str]) -> None:
        """Refuse an empty list of domains, and a domain that the data set does not have."""
        for name, given in (("source_domains", source_domains), ("target_domains", target_domains)):
            assert len(given) > 0, f"{name} is empty"
            self.is_input_domain_valid(given)

    def is_input_domain_valid(self, input_domains: Sequence[str]) -> None:
        """Refuse a domain that the data set does not have."""
        for domain in input_domains:
            if domain not in self.domains:
                raise ValueError(f"The domain must be one of {list(self.domains)}, not {domain!r}")

    def download_data(self, url: str, dst: str, from_gdrive: bool = True) -> None:
        """Left out."""
        raise NotImplementedError(left_out("DatasetBase.download_data"))

    def generate_fewshot_dataset(self, *data_sources: list[Datum], num_shots: int = -1, repeat: bool = False) -> Any:
        """Sample num_shots items of each class, with the global generator of `random`.

        The order of the samples is part of the contract (the same seed gives the same shots as upstream):
        source by source, classes in the order in which they first occur, one `random.sample` each.

        Args:
            data_sources: lists of Datum.
            num_shots: items a class; the sources come back as they are where it is below 1.
            repeat: sample with repetition from a class that has too few; otherwise it gives all it has.

        Returns:
            A list of Datum for each source; the list itself where there is one source.
        """
        if num_shots < 1:
            return data_sources[0] if len(data_sources) == 1 else data_sources
        print(f"Creating a {num_shots}-shot dataset")
        output = []
        for source in data_sources:
            shots: list[Datum] = []
            for items in self.split_dataset_by_label(source).values():
                shots.extend(_sample(items, num_shots, repeat))
            output.append(shots)
        return output[0] if len(output) == 1 else output

    def split_dataset_by_label(self, data_source: Sequence[Datum]) -> dict[int, list[Datum]]:
        """Label -> its items, in the order in which labels first occur."""
        groups = defaultdict(list)
        for item in data_source:
            groups[item.label].append(item)
        return groups

    def split_dataset_by_domain(self, data_source: Sequence[Datum]) -> dict[int, list[Datum]]:
        """Domain -> its items, in the order in which domains first occur."""
        groups = defaultdict(list)
        for item in data_source:
            groups[item.domain].append(item)
        return groups


def _sample(items: list[Datum], num_shots: int, repeat: bool) -> list[Datum]:
    if len(items) >= num_shots:
        return random.sample(items, num_shots)
    return random.choices(items, k=num_shots) if repeat else items
