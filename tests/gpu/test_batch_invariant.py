"""`batch_invariant`: a row has the same bits whatever stands beside it, in every operation."""

from typing import Any

import numpy as np
import pytest

import jax_deepgemm
from jax_deepgemm import GemmConfig, select_config
from tests import numerics
from tests.gpu import support

ROWS = 1000
# Of the first, k is split or rotated without the option.
WEIGHTS = [(2112, 7168), (392, 784)]
GEMM = jax_deepgemm.gemm_fp8_fp8_bf16_nt


def dense_bits(operands: numerics.DenseOperands, first: int, last: int, **options: Any) -> bytes:
    a, sfa, b, sfb = operands
    return support.bits(GEMM((a[first:last], sfa[first:last]), (b, sfb), **options))


def row_bits(bits: bytes, first: int, last: int, n: int) -> bytes:
    """The same rows out of the result of more."""
    return bits[first * n * 2 : last * n * 2]


@pytest.mark.parametrize(("n", "k"), WEIGHTS)
@pytest.mark.parametrize(("first", "last"), [(0, 1), (7, 8), (0, 64), (3, 130), (333, 999)])
def test_rows_of_more_or_fewer(first: int, last: int, n: int, k: int) -> None:
    operands = numerics.dense_operands(ROWS, n, k, seed=support.SEED)
    whole = dense_bits(operands, 0, ROWS, batch_invariant=True)
    part = dense_bits(operands, first, last, batch_invariant=True)
    assert part == row_bits(whole, first, last, n)


def test_they_differ_without_it() -> None:
    """What the option is for: else k is split for one row and not for a thousand."""
    n, k = WEIGHTS[0]
    assert select_config(1, n, k).cluster_k != select_config(ROWS, n, k).cluster_k
    operands = numerics.dense_operands(ROWS, n, k, seed=support.SEED)
    assert dense_bits(operands, 0, 64) != row_bits(dense_bits(operands, 0, ROWS), 0, 64, n)


@pytest.mark.parametrize(
    "config", [GemmConfig(64, 64, 4, 1), GemmConfig(128, 96, 3, 2), GemmConfig(256, 128, 3, 2)]
)
def test_every_tile_gives_the_same(config: GemmConfig) -> None:
    n, k = WEIGHTS[0]
    operands = numerics.dense_operands(200, n, k, seed=support.SEED)
    selected = dense_bits(operands, 0, 200, batch_invariant=True)
    assert dense_bits(operands, 0, 200, batch_invariant=True, config=config) == selected


@pytest.mark.parametrize(("n", "k"), WEIGHTS)
@pytest.mark.parametrize("rows", [1, 65, 300])
def test_groups_are_as_dense(rows: int, n: int, k: int) -> None:
    """Rows of a group, in each layout, against the dense operation on them alone."""
    groups, group = 3, 1
    rng = np.random.default_rng(support.SEED)
    operands = numerics.grouped_operands(rows, groups, n, k, seed=support.SEED)
    a, sfa, b, sfb = operands
    alone = support.bits(GEMM((a, sfa), (b[group], sfb[group]), batch_invariant=True))

    sizes = np.array([17, rows, 5], np.int32)
    ragged_a = numerics.random_values(rng, 17 + rows + 5, k)
    ragged_sfa = numerics.random_scales(rng, 17 + rows + 5, sfa.shape[-1])
    ragged_a[17 : 17 + rows], ragged_sfa[17 : 17 + rows] = a, sfa
    ragged = jax_deepgemm.m_grouped_gemm_fp8_fp8_bf16_nt_ragged(
        (ragged_a, ragged_sfa), (b, sfb), sizes, batch_invariant=True
    )
    assert support.bits(ragged[17 : 17 + rows]) == alone

    masked_a = numerics.random_values(rng, groups, rows + 9, k)
    masked_sfa = numerics.random_scales(rng, groups, rows + 9, sfa.shape[-1])
    masked_a[group, :rows], masked_sfa[group, :rows] = a, sfa
    masked = jax_deepgemm.m_grouped_gemm_fp8_fp8_bf16_nt_masked(
        (masked_a, masked_sfa), (b, sfb), sizes, expected_m=rows, batch_invariant=True
    )
    assert support.bits(masked[group, :rows]) == alone

    indices = np.full(256 + rows, -1, np.int32)
    indices[:40], indices[256:] = 0, group
    contiguous_a = numerics.random_values(rng, 256 + rows, k)
    contiguous_sfa = numerics.random_scales(rng, 256 + rows, sfa.shape[-1])
    contiguous_a[256:], contiguous_sfa[256:] = a, sfa
    contiguous = jax_deepgemm.m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(
        (contiguous_a, contiguous_sfa), (b, sfb), indices, batch_invariant=True
    )
    assert support.bits(contiguous[256:]) == alone


@pytest.mark.parametrize("neighbours", [np.nan, 448.0])
def test_neighbours_do_not_matter(neighbours: float) -> None:
    n, k = WEIGHTS[0]
    operands = numerics.dense_operands(65, n, k, seed=support.SEED)
    before = row_bits(dense_bits(operands, 0, 65, batch_invariant=True), 0, 64, n)
    operands.a[64] = neighbours
    assert row_bits(dense_bits(operands, 0, 65, batch_invariant=True), 0, 64, n) == before
