"""Rows of a matrix by groups."""

from __future__ import annotations

import torch

from spectra.files.stored.rows import Rows


def test_rows_of_groups():
    rows = Rows(3, 4, 1, 3)
    assert (rows.count, rows.total, str(rows)) == (6, 12, "rows 1:3 of each 4")
    assert rows.of(torch.arange(12)).tolist() == [1, 2, 5, 6, 9, 10]
    assert rows.of(torch.arange(24).reshape(12, 2)).shape == (6, 2)
    assert str(Rows(1, 12, 4, 8)) == "rows 4:8"
