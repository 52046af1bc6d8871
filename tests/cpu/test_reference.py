"""The float32 reference against float64, and the measure it is judged by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_deepgemm import reference
from tests import grouped_cases, numerics

gemm = jax.jit(reference.gemm_fp8_fp8_bf16_nt)

SHAPES = [
    (1, 8, 16),
    (2, 2112, 128),
    (7, 136, 144),
    (64, 256, 7168),
    (129, 200, 400),
    (128, 128, 1024),
    (333, 24, 16),
]


@pytest.mark.parametrize(
    ("m", "n", "k"), [pytest.param(*shape, id="m{}-n{}-k{}".format(*shape)) for shape in SHAPES]
)
def test_dense_agrees_with_float64(m, n, k):
    operands = numerics.dense_operands(m, n, k, seed=1)
    d = gemm(*operands)
    assert d.shape == (m, n)
    assert d.dtype == jnp.bfloat16
    oracle = numerics.dense_oracle(operands)
    assert numerics.error(d, oracle) < numerics.BF16_TOLERANCE
    assert numerics.worst_row_error(d, oracle) < numerics.BF16_TOLERANCE


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(0, 70),
    n=st.integers(1, 40).map(lambda blocks: 8 * blocks),
    k=st.integers(1, 40).map(lambda blocks: 16 * blocks),
    seed=st.integers(0, 2**32 - 1),
)
def test_dense_agrees_with_float64_for_random_shapes(m, n, k, seed):
    operands = numerics.dense_operands(m, n, k, seed=seed)
    assert numerics.error(gemm(*operands), numerics.dense_oracle(operands)) < (
        numerics.BF16_TOLERANCE
    )


def test_dense_of_no_rows_is_empty():
    d = gemm(*numerics.dense_operands(0, 24, 144, seed=2))
    assert d.shape == (0, 24)
    assert d.dtype == jnp.bfloat16


def test_dense_rounds_once_from_float32():
    # Odd integers: every float32 sum is exact and has more bits than float16 or bfloat16 can hold.
    rng = np.random.default_rng(3)
    a = (2 * rng.integers(-8, 8, (65, 4000)) + 1).astype(numerics.E4M3)
    b = (2 * rng.integers(-8, 8, (136, 4000)) + 1).astype(numerics.E4M3)
    operands = numerics.DenseOperands(a, np.ones((65, 32), "f4"), b, np.full((2, 32), 0.25, "f4"))
    expected = numerics.dense_oracle(operands).astype(np.float32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(gemm(*operands), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_dense_keeps_bad_values_in_their_row_and_column(bad):
    clean = numerics.dense_operands(9, 264, 272, seed=4)
    a, sfa, b, sfb = (operand.copy() for operand in clean)
    a[3, 200] = np.nan
    sfa[5, 2] = bad  # reaches one row of d
    b[260, 1] = np.nan
    sfb[1, 0] = bad  # reaches rows 128 to 255 of b: as many columns of d
    d = np.asarray(gemm(a, sfa, b, sfb)).astype(np.float64)

    hit = np.zeros(d.shape, bool)
    hit[[3, 5], :] = hit[:, 260] = hit[:, 128:256] = True
    assert not np.isfinite(d[hit]).any()
    np.testing.assert_array_equal(d[~hit], np.asarray(gemm(*clean)).astype(np.float64)[~hit])


def test_masked_promotes_no_type():
    problem = grouped_cases.Problem("masked", 3, 9, 24, 144)
    operands = problem.operands(seed=4)
    counts = np.array([9, 0, 5], np.int32)
    expected = reference.m_grouped_gemm_fp8_fp8_bf16_nt_masked(*operands, counts)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        d = reference.m_grouped_gemm_fp8_fp8_bf16_nt_masked(*operands, counts)
    np.testing.assert_array_equal(d, expected)


def test_ends_of_groups_stop_at_m():
    most = 2**31 - 65537  # rows that a problem can have
    for sizes, m, expected in (
        ([3, 0, 2], 9, [3, 3, 5]),
        ([3, 9, 2], 9, [3, 9, 9]),
        ([-1, 4, -(2**31), 5], 9, [0, 4, 4, 9]),
        ([2**31 - 1] * 5, 9, [9] * 5),
        ([2**31 - 1] * 5, most, [most] * 5),
        ([1, most, 1, most, 2**30, 2**30], most, [1, *[most] * 5]),
    ):
        assert reference.group_ends(jnp.array(sizes, jnp.int32), m).tolist() == expected


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize(("rows", "k"), [(1, 16), (130, 300), (256, 128), (0, 144)], ids=str)
def test_dequantize_takes_leading_batch_dimensions(batch, rows, k):
    rng = np.random.default_rng(5)
    values = numerics.random_values(rng, *batch, rows, k)
    for dequantize, block_rows in (
        (reference.dequantize_per_token, 1),
        (reference.dequantize_per_block, 128),
    ):
        scales = numerics.random_scales(
            rng, *batch, numerics.ceil_div(rows, block_rows), numerics.ceil_div(k, 128)
        )
        x = dequantize(jnp.asarray(values), jnp.asarray(scales))
        expected = numerics.dequantize64(values, scales, block_rows=block_rows)
        assert x.dtype == jnp.float32
        np.testing.assert_array_equal(x, expected.astype(np.float32))


def test_error_is_the_stated_measure():
    rng = np.random.default_rng(6)
    x, y = rng.standard_normal((2, 30, 40))
    stated = 1 - 2 * (x * y).sum() / ((x * x).sum() + (y * y).sum())
    assert numerics.error(x, y) == pytest.approx(stated, rel=1e-12)
    assert numerics.error(x, x) == 0
    assert numerics.error(np.zeros(3), np.zeros(3)) == 0
    assert numerics.error(np.empty((0, 4)), np.empty((0, 4))) == 0
    assert numerics.error(x, np.zeros_like(x)) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_error_never_passes_what_is_not_finite(bad):
    x = np.ones((4, 5))
    y = x.copy()
    y[2, 1] = bad
    for actual, expected in ((y, x), (x, y), (y, y)):
        assert numerics.error(actual, expected) == np.inf
        assert numerics.worst_row_error(actual, expected) == np.inf


def test_worst_row_error_sees_one_wrong_value():
    x = np.random.default_rng(7).standard_normal((512, 512))
    y = x.copy()
    y[100, 100] += 3.0
    assert numerics.worst_row_error(y, x) > 1000 * numerics.BF16_TOLERANCE
    assert numerics.worst_row_error(y, x) > 100 * numerics.error(y, x)


def test_error_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"shapes differ: \(4, 1\) and \(4, 5\)"):
        numerics.error(np.ones((4, 1)), np.ones((4, 5)))
