"""Class names in messages."""

from __future__ import annotations

import logging

import pytest
from dassl_small import IS_STANDIN  # noqa: F401  it finds dassl

from air_plugin.utils.class_names import listed


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, ""),
        (2, "n0, n1"),
        (4, "n0, n1, n2, n3"),  # "and 1 more" would be as long as the name
        (5, "n0, n1, n2 and 2 more"),
        (2003, "n0, n1, n2 and 2,000 more"),
    ],
)
def test_a_list_of_names_is_cut_to_a_line(count: int, expected: str) -> None:
    assert listed([f"n{number}" for number in range(count)], first=3) == expected


@pytest.mark.public_reports
def test_a_warning_of_many_classes_is_a_short_line(caplog: pytest.LogCaptureFixture) -> None:
    """Number 24: classes without a pseudo-label, and a checkpoint of other classes."""
    import torch

    from air_plugin.clip.prompts import _brief
    from air_plugin.functional.pseudo_labels import Candidates
    from trainers.self_training import SelfTraining

    names = [f"a class with a long name, number {number}" for number in range(900)]
    trainer = SelfTraining.__new__(SelfTraining)
    trainer.classnames, trainer.unlabelled_classes = names, None
    mask = torch.zeros(3, 900, dtype=torch.bool)
    mask[:, 7] = True
    trainer._warn_of_empty(Candidates(torch.arange(3), mask, torch.full((3,), 7)))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.name.startswith("air_plugin.")
    assert record.getMessage().startswith("no pseudo-label for 899 of 900 classes: ") and "894 more" in caplog.text
    assert len(record.getMessage()) < 300 and len(_brief(names)) < 200
