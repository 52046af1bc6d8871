"""float8_e5m2 on either side, on the GPU, in every structure of the kernel."""

from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

import jax_deepgemm
from tests import grouped_cases, numerics
from tests.gpu import support

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
MIXES = [
    pytest.param(a, b, id=f"{np.dtype(a).name[7:]}-{np.dtype(b).name[7:]}")
    for a in (E4M3, E5M2)
    for b in (E4M3, E5M2)
]


def cast(operands: Any, a_type: Any, b_type: Any) -> Any:
    """The operands in other types: rounded, so that the oracle sees what the operation does."""
    return operands._replace(a=operands.a.astype(a_type), b=operands.b.astype(b_type))


@pytest.mark.parametrize(("a_type", "b_type"), MIXES)
@pytest.mark.parametrize("config", [None, *support.CONFIGS[::6]], ids=support.config_id)
def test_dense(config: Any, a_type: Any, b_type: Any) -> None:
    operands = cast(numerics.dense_operands(200, 392, 784, seed=support.SEED), a_type, b_type)
    a, sfa, b, sfb = operands
    d = jax_deepgemm.gemm_fp8_fp8_bf16_nt((a, sfa), (b, sfb), config=config)
    support.check(d, numerics.dense_oracle(operands))


@pytest.mark.parametrize(("a_type", "b_type"), MIXES)
@pytest.mark.parametrize("op", grouped_cases.OPS)
def test_groups(op: str, a_type: Any, b_type: Any) -> None:
    problem = grouped_cases.Problem(op, 5, 300, 264, 528)
    operands = cast(problem.operands(support.SEED), a_type, b_type)
    (array,) = problem.random_arrays(np.random.default_rng(support.SEED))
    support.check(grouped_cases.call(op, *operands, array), problem.oracle(operands, array))


@pytest.mark.parametrize("special", [np.inf, -np.inf, 57344.0])
def test_values_that_e4m3_lacks(special: float) -> None:
    """They stay in their row; a large number is not saturated to e4m3's 448."""
    operands = cast(numerics.dense_operands(70, 136, 272, seed=support.SEED), E5M2, E4M3)
    operands.a[13, 200] = special
    a, sfa, b, sfb = operands
    d = np.asarray(jax_deepgemm.gemm_fp8_fp8_bf16_nt((a, sfa), (b, sfb)))
    with np.errstate(invalid="ignore"):
        expected = numerics.dense_oracle(operands)
    others = np.arange(70) != 13
    assert numerics.error(d[others], expected[others]) < numerics.BF16_TOLERANCE
    if np.isfinite(special):
        assert numerics.error(d[13], expected[13]) < 1e-5
    else:
        assert not np.isfinite(d[13].astype(np.float64)[np.asarray(b)[:, 200] != 0]).any()


def test_types_do_not_share_a_kernel() -> None:
    """One shape, one configuration, four kernels: each call gets its own."""
    operands = numerics.dense_operands(64, 128, 256, seed=support.SEED)
    jitted = jax.jit(lambda a, sfa, b, sfb: jax_deepgemm.gemm_fp8_fp8_bf16_nt((a, sfa), (b, sfb)))
    for a_type in (E4M3, E5M2):
        for b_type in (E4M3, E5M2):
            mixed = cast(operands, a_type, b_type)
            support.check(jitted(*mixed), numerics.dense_oracle(mixed))
