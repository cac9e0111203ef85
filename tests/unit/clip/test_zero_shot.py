"""Which images are the unlabelled ones."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from air_plugin.clip.zero_shot import unlabelled_paths
from air_plugin.utils.errors import UserError

pytestmark = pytest.mark.public_reports


def items(paths: list[Path], label: int = 0) -> list[Any]:
    return [SimpleNamespace(impath=str(path), label=label) for path in paths]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    (tmp_path / "images").mkdir()
    made = [tmp_path / "images" / f"{name}.png" for name in "dbacfe"]
    for path in made:
        path.touch()
    return made


def test_images_to_measure_with_are_left_out_however_their_path_is_written(
    files: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Number 27: by a linked folder, by a link to the file, and by a path with dots."""
    d, b, a, c, f, e = files
    (tmp_path / "linked").symlink_to(tmp_path / "images")
    (tmp_path / "link.png").symlink_to(b)
    dotted = tmp_path / "images" / ".." / "images" / f.name
    dataset = SimpleNamespace(
        train_x=items([d, tmp_path / "link.png", a, c, f, e]),
        train_u=None,
        val=items([tmp_path / "linked" / d.name, b]),
        test=items([dotted], label=3),
    )
    with caplog.at_level(logging.INFO, "air_plugin"):
        assert unlabelled_paths(dataset) == [str(a), str(c), str(e)]
    assert caplog.messages == ["unlabelled: 3 images of train_x; 3 more are left out, since they are in test or val"]


def test_what_is_used_is_logged(files: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    """Number 27: train_u before train_x; data sets without val."""
    dataset = SimpleNamespace(train_x=items(files[:1]), train_u=items(files[1:5], label=-1), test=items(files[5:]))
    with caplog.at_level(logging.INFO, "air_plugin"):
        assert unlabelled_paths(dataset) == sorted(map(str, files[1:5]))
    assert caplog.messages == ["unlabelled: 4 images of train_u"]


def test_a_data_set_that_is_its_own_test_set_is_refused(files: list[Path]) -> None:
    """Number 27: CoOp's ImageNet-A has its test set as train_x."""
    own = items(files[:4])
    dataset = SimpleNamespace(train_x=own, train_u=[], val=None, test=own)
    with pytest.raises(UserError, match=r"all 4 images of train_x are in test or val.*give the data set a train_u"):
        unlabelled_paths(dataset)


def test_test_images_without_labels_may_be_used(files: list[Path]) -> None:
    """Number 27: a person's own images are predicted, and no accuracy is measured on them."""
    own = items(files, label=-1)
    assert len(unlabelled_paths(SimpleNamespace(train_x=own, train_u=own, val=None, test=own))) == 6
