"""Cells of the test matrix, so few that every pair of values occurs; `make matrix` runs all."""

import importlib.util
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("matrix", Path(__file__).parents[1] / "matrix.py")
matrix = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(matrix)


@pytest.mark.parametrize("cell", list(matrix.cells(pairwise=True)), ids=" ".join)
def test_cell(cell):
    matrix.check_cell(*cell)
