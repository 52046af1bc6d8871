"""The option `batch_invariant`: what is selected, compiled and told to the GPU."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import jax_deepgemm
from jax_deepgemm import GemmConfig
from jax_deepgemm.config import OPS, check_problem, legal_configs, select_config
from jax_deepgemm.ffi import _native, compile_kernel
from tests import grouped_cases, numerics
from tests.lowering import cuda_calls, cuda_text, problem_of

SPLIT_K = GemmConfig(64, 64, 4, 1, cluster_k=2)
N, K = 136, 272


def call(op: str, **options: Any) -> tuple[Any, tuple[Any, ...]]:
    """An operation with options, and flat operands for it."""
    if op == "dense":

        def dense(a: Any, sfa: Any, b: Any, sfb: Any) -> jax.Array:
            return jax_deepgemm.gemm_fp8_fp8_bf16_nt((a, sfa), (b, sfb), **options)

        return dense, numerics.dense_operands(33, N, K, seed=0)
    problem = grouped_cases.Problem(op, 3, 129, N, K)
    groups = np.zeros(129 if op == "contiguous" else 3, np.int32)

    def grouped(*operands: Any) -> jax.Array:
        return grouped_cases.call(op, *operands, **options)

    return grouped, (*problem.operands(seed=0), groups)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("m", [1, 64, 128, 4096])
@pytest.mark.parametrize(("n", "k"), [(2112, 7168), (4096, 7168), (7168, 16384), (128, 32768)])
def test_k_is_never_split(op: str, m: int, n: int, k: int) -> None:
    groups = 1 if op == "dense" else 4
    shape: dict[str, Any] = {"m": m * groups, "n": n, "k": k, "op": op, "num_groups": groups}
    assert select_config(**shape, batch_invariant=True).cluster_k == 1
    invariant = legal_configs(**shape, batch_invariant=True)
    assert invariant == [config for config in legal_configs(**shape) if config.cluster_k == 1]


def test_k_is_split_without_it() -> None:
    assert select_config(64, 2112, 7168).cluster_k > 1


@pytest.mark.parametrize("op", OPS)
def test_config_that_splits_k_is_refused(op: str) -> None:
    function, operands = call(op, config=SPLIT_K, batch_invariant=True)
    with pytest.raises(ValueError, match="config: cluster_k must be 1 with batch_invariant"):
        jax.eval_shape(function, *operands)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("value", [1, None, "yes"])
def test_other_values_are_refused(op: str, value: Any) -> None:
    function, operands = call(op, batch_invariant=value)
    with pytest.raises(TypeError, match="batch_invariant must be True or False, got"):
        jax.eval_shape(function, *operands)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("value", [False, True])
def test_cuda_call_says_so(op: str, value: bool) -> None:
    function, operands = call(op, batch_invariant=value)
    (line,) = cuda_calls(cuda_text(function, *operands))
    assert problem_of(line)["batch_invariant"] == value


@pytest.mark.parametrize("axes", [(0, 0, None, None), (0, 0, 0, 0)])
def test_a_batch_keeps_it(axes: tuple[int | None, ...]) -> None:
    function, operands = call("dense", batch_invariant=True)
    batched = [
        x if axis is None else np.stack([x, x]) for x, axis in zip(operands, axes, strict=True)
    ]
    (line,) = cuda_calls(cuda_text(jax.vmap(function, in_axes=axes), *batched))
    assert problem_of(line)["batch_invariant"] == 1


@pytest.mark.parametrize("op", OPS)
def test_kernel_takes_k_in_order(op: str) -> None:
    config = GemmConfig(64, 64, 4, 1)
    texts, names = {}, {}
    for value in (False, True):
        problem = check_problem("test", 64, N, K, 132, op=op, batch_invariant=value)
        texts[value], _ = _native.kernel_source(problem, config.fields)
        names[value] = _native.kernel_name(problem, config.fields)
    assert f"constexpr int kRotatesK = {int(op == 'dense')};" in texts[False]
    assert "constexpr int kRotatesK = 0;" in texts[True]
    assert names[True] != names[False], "two kernels share a name"


@pytest.mark.parametrize("op", OPS)
def test_kernel_compiles(op: str) -> None:
    report = compile_kernel(N, K, GemmConfig(64, 64, 4, 1), op=op, batch_invariant=True)
    assert "_invariant_" in report.name
    assert report.spill_bytes == report.stack_bytes == 0
    assert not report.wgmma_serialized
