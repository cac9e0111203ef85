"""Rows of unit length."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch.nn.functional import normalize

from air_plugin.utils import tensors
from air_plugin.utils.errors import UserError
from air_plugin.utils.tensors import unit_rows

pytestmark = pytest.mark.public_reports


@pytest.fixture(autouse=True)
def first_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "_warned", set())


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_unit_rows_stay_bit_by_bit(dtype: torch.dtype, caplog: pytest.LogCaptureFixture):
    """Item 10: results of unit features are what they were, and rounding to half precision is no fault."""
    unit = normalize(rows(50, 3, 33), dim=-1).to(dtype)
    assert unit_rows(unit, "images") is unit
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_rows_are_normalised_with_one_warning(dtype: torch.dtype, caplog: pytest.LogCaptureFixture):
    """Item 10: any length, none of the unit rows among them changed; rows of zeros stay zero."""
    unit = normalize(rows(6, 33), dim=-1).to(dtype)
    given = unit * torch.tensor([1, 8, 0.01, 0, 1, 30]).to(dtype)[:, None]
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            made = unit_rows(given, "images")
    assert torch.equal(made[[0, 4]], unit[[0, 4]]) and not made[3].any() and made.dtype == dtype
    lengths = made.double().norm(dim=1)[[1, 2, 5]]
    assert torch.allclose(lengths, torch.ones(3).double(), atol=4 * torch.finfo(dtype).eps)
    (record,) = caplog.records
    assert record.getMessage().startswith("features of images are not of unit length (one is 8")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(bad: float):
    """Item 10: they would end as NaN in the predictions."""
    given = normalize(rows(6, 33), dim=-1)
    given[4, 2] = bad
    with pytest.raises(UserError, match="1 of 6 features of texts are not finite"):
        unit_rows(given, "texts")
