"""Division by a large matrix in blocks: the quotient of LAPACK, where and only where it may be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.oracle import relative_error
from tract_hub.method.gram.matrix import Gram
from tract_hub.method.solve import divide
from tract_hub.method.solve.blocks import BLOCK, divide_by_blocks
from tract_hub.method.solve.divide import divide_by_gram


def positive_definite(groups: int, features: int) -> Tensor:
    root = torch.randn(groups, features, 2 * features, dtype=torch.double)
    return root @ root.mT / features


@pytest.mark.parametrize("features", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
@pytest.mark.parametrize("lines", [0, 1, 130])
def test_the_quotient_is_that_of_a_general_solver(features: int, lines: int) -> None:
    torch.manual_seed(0)
    matrix, rows = positive_definite(2, features), torch.randn(2, lines, features).double()
    whole, before = rows.clone(), matrix.clone()
    divided, definite = divide_by_blocks(rows, matrix)
    assert divided.shape == rows.shape
    assert definite.tolist() == [True, True]
    assert lines == 0 or relative_error(divided @ matrix, whole) < 1e-13
    assert torch.equal(rows, whole)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("place", [0, BLOCK + 7])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_a_matrix_that_is_not_positive_definite_is_told_from_the_others(
    place: int, value: float
) -> None:
    matrix = positive_definite(2, 2 * BLOCK)
    matrix[1, place, place] = value
    assert divide_by_blocks(torch.ones(2, 3, 2 * BLOCK).double(), matrix)[1].tolist() == [
        True,
        False,
    ]


def test_a_gradient_of_the_gradient_is_the_same_with_and_without_blocks() -> None:
    total, rows = positive_definite(1, divide.LARGE), torch.randn(4, divide.LARGE)
    with torch.no_grad():
        in_blocks = divide_by_gram(rows, Gram(total, 1, 1e-7), 0.1)
    rows.requires_grad_()
    divided = divide_by_gram(rows, Gram(total, 1, 1e-7), 0.1)
    assert relative_error(divided.detach(), in_blocks.double()) < 1e-6
    (second,) = torch.autograd.grad(divided.sum(), rows)
    expected = torch.linalg.solve(
        total[0] + 0.1 * torch.eye(divide.LARGE), torch.ones(divide.LARGE).double()
    )
    assert relative_error(second, expected.expand(4, -1)) < 1e-6


def test_many_gradients_at_once_are_divided_one_by_one() -> None:
    total, rows = positive_definite(1, divide.LARGE), torch.randn(3, 4, divide.LARGE)
    gram = Gram(total, 1, 1e-7)
    with torch.no_grad():
        together = torch.func.vmap(lambda each: divide_by_gram(each, gram, 0.1))(rows)
        alone = torch.stack([divide_by_gram(each, gram, 0.1) for each in rows])
    assert relative_error(together, alone.double()) < 1e-6


@pytest.mark.parametrize("features", [27, divide.LARGE])
def test_a_matrix_that_is_not_positive_definite_gives_nan(features: int) -> None:
    one = torch.eye(features, dtype=torch.double)
    gram = Gram(torch.stack([-one, one]), 1, torch.finfo(torch.float64).eps)
    gradient = torch.ones(2 * 3, features)
    quotient = divide_by_gram(gradient, gram, 0.1).view(2, 3, features)
    inverse = divide.invert(gram, 0.1)
    for bad, good in (quotient, inverse):
        assert bad.isnan().all()
        assert good.isfinite().all()
