"""The public dense operation: numbers on the CPU, messages, and what it lowers to for CUDA."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, PartitionSpec

import jax_deepgemm
from jax_deepgemm import GemmConfig, Quantized, ffi, gemm_fp8_fp8_bf16_nt
from jax_deepgemm.config import OPS
from tests import numerics
from tests.lowering import cuda_calls, cuda_text, problem_of

OP = "gemm_fp8_fp8_bf16_nt"
HANDLERS = Path(__file__).parents[2] / "csrc/ffi/handlers.cc"

# The shape of the operands that the tests of messages start from.
M, N, K = 16, 136, 144


def flat(a: Any, sfa: Any, b: Any, sfb: Any, **options: Any) -> jax.Array:
    return gemm_fp8_fp8_bf16_nt((a, sfa), (b, sfb), **options)


def check(d: jax.Array, operands: numerics.DenseOperands) -> None:
    numerics.check(d, numerics.dense_oracle(operands), **numerics.FLOAT32_SUMS)


@pytest.fixture
def operands() -> numerics.DenseOperands:
    return numerics.dense_operands(M, N, K, seed=0)


@pytest.fixture
def cpu_mesh() -> Callable[..., jax.sharding.Mesh]:
    """Makes meshes of this machine's eight CPU devices, also where JAX's default is a GPU."""

    def make(**axes: int) -> jax.sharding.Mesh:
        names = tuple(axes)
        sizes = tuple(axes.values())
        return jax.make_mesh(
            sizes, names, axis_types=(AxisType.Auto,) * len(sizes), devices=jax.devices("cpu")
        )

    return make


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    with jax.default_device(jax.devices("cpu")[0]):
        yield


# --- Numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [16, 144, 256, 400], ids="k{}".format)
@pytest.mark.parametrize("n", [8, 136, 256], ids="n{}".format)
@pytest.mark.parametrize("m", [0, 1, 3, 64, 129], ids="m{}".format)
def test_agrees_with_float64(m: int, n: int, k: int) -> None:
    operands = numerics.dense_operands(m, n, k, seed=1)
    check(jax.jit(flat)(*operands), operands)


def test_same_bits_however_it_is_run(operands: numerics.DenseOperands) -> None:
    a, sfa, b, sfb = operands
    jitted = jax.jit(flat)(*operands)
    check(jitted, operands)
    np.testing.assert_array_equal(flat(*operands), jitted)
    np.testing.assert_array_equal(jax.jit(gemm_fp8_fp8_bf16_nt)((a, sfa), (b, sfb)), jitted)
    with jax.disable_jit():
        np.testing.assert_array_equal(flat(*operands), jitted)


@pytest.mark.parametrize("pair", [tuple, list, lambda pair: jax_deepgemm.Quantized(*pair)])
def test_takes_every_form_of_a_pair(
    pair: Callable[[Any], Any], operands: numerics.DenseOperands
) -> None:
    a, sfa, b, sfb = operands
    check(gemm_fp8_fp8_bf16_nt(pair((a, sfa)), pair((b, sfb))), operands)


def test_takes_what_the_quantizers_return() -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((33, 272), np.float32)
    w = rng.standard_normal((136, 272), np.float32)
    lhs = jax_deepgemm.quantize_per_token(x)
    rhs = jax_deepgemm.quantize_per_block(w)
    d = gemm_fp8_fp8_bf16_nt(lhs, rhs)
    check(d, numerics.DenseOperands(*map(np.asarray, (*lhs, *rhs))))
    assert numerics.error(d, x.astype(np.float64) @ w.T.astype(np.float64)) < 2e-3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_bad_values_stay_in_their_row_and_column(bad: float) -> None:
    clean = numerics.dense_operands(9, 264, 272, seed=3)
    a, sfa, b, sfb = (operand.copy() for operand in clean)
    a[3, 200] = np.nan
    sfa[5, 2] = bad
    b[260, 1] = np.nan
    sfb[1, 0] = bad  # columns 128 to 255
    d = np.asarray(flat(a, sfa, b, sfb)).astype(np.float32)

    hit = np.zeros(d.shape, bool)
    hit[[3, 5], :] = hit[:, 260] = hit[:, 128:256] = True
    assert not np.isfinite(d[hit]).any()
    np.testing.assert_array_equal(d[~hit], np.asarray(flat(*clean)).astype(np.float32)[~hit])


def test_config_changes_nothing_on_the_cpu(operands: numerics.DenseOperands) -> None:
    for config in jax_deepgemm.legal_configs(M, N, K)[::50]:
        np.testing.assert_array_equal(flat(*operands, config=config), flat(*operands))


# --- Messages ------------------------------------------------------------------------------------


def zeros(dtype: Any, *shape: int) -> np.ndarray[Any, Any]:
    return np.zeros(shape, dtype)


E4M3 = numerics.E4M3
F32 = np.float32

# What replaces operands of the M x N x K problem, and what is said about it.
BAD_ARRAYS = {
    "a-rank-1": (
        {"a": zeros(E4M3, K)},
        ValueError,
        "a must be float8_e4m3fn[m, k] (m, k), got float8_e4m3fn[144]",
    ),
    "a-rank-3": (
        {"a": zeros(E4M3, 2, M, K)},
        ValueError,
        "a must be float8_e4m3fn[m, k] (m, k), got float8_e4m3fn[2, 16, 144]",
    ),
    "a-rank-0": (
        {"a": zeros(E4M3)},
        ValueError,
        "a must be float8_e4m3fn[m, k] (m, k), got float8_e4m3fn[]",
    ),
    "a-float32": (
        {"a": zeros(F32, M, K)},
        TypeError,
        "a must be float8_e4m3fn[m, k] or float8_e5m2[m, k] (m, k), got float32[16, 144]",
    ),
    "a-e4m3fnuz": (
        {"a": zeros(jnp.float8_e4m3fnuz, M, K)},
        TypeError,
        "a must be float8_e4m3fn[m, k] or float8_e5m2[m, k] (m, k), got float8_e4m3fnuz[16, 144]",
    ),
    "a-dtype-and-rank": (
        {"a": zeros(jnp.bfloat16, K)},
        TypeError,
        "a must be float8_e4m3fn[m, k] or float8_e5m2[m, k] (m, k), got bfloat16[144]",
    ),
    "b-rank-1": (
        {"b": zeros(E4M3, K)},
        ValueError,
        "b must be float8_e4m3fn[n, 144] (n, k), got float8_e4m3fn[144]",
    ),
    "b-bfloat16": (
        {"b": zeros(jnp.bfloat16, N, K)},
        TypeError,
        "b must be float8_e4m3fn[n, 144] or float8_e5m2[n, 144] (n, k), got bfloat16[136, 144]",
    ),
    "b-other-k": (
        {"b": zeros(E4M3, N, K + 16)},
        ValueError,
        "b must be float8_e4m3fn[n, 144] (n, k), got float8_e4m3fn[136, 160]",
    ),
    "b-transposed": (
        {"b": zeros(E4M3, K, N)},
        ValueError,
        "b must be float8_e4m3fn[n, 144] (n, k), got float8_e4m3fn[144, 136]",
    ),
    "sfa-rank-1": (
        {"sfa": zeros(F32, M)},
        ValueError,
        "sfa must be float32[16, 2] (m, ceil(k/128)), got float32[16]",
    ),
    "sfa-bfloat16": (
        {"sfa": zeros(jnp.bfloat16, M, 2)},
        TypeError,
        "sfa must be float32[16, 2] (m, ceil(k/128)), got bfloat16[16, 2]",
    ),
    "sfa-int32": (
        {"sfa": zeros(np.int32, M, 2)},
        TypeError,
        "sfa must be float32[16, 2] (m, ceil(k/128)), got int32[16, 2]",
    ),
    "sfa-m-contiguous": (
        {"sfa": zeros(F32, 2, M)},
        ValueError,
        "sfa must be float32[16, 2] (m, ceil(k/128)), got float32[2, 16]",
    ),
    "sfa-k-floored": (
        {"sfa": zeros(F32, M, 1)},
        ValueError,
        "sfa must be float32[16, 2] (m, ceil(k/128)), got float32[16, 1]",
    ),
    "sfa-other-m": (
        {"sfa": zeros(F32, M + 1, 2)},
        ValueError,
        "sfa must be float32[16, 2] (m, ceil(k/128)), got float32[17, 2]",
    ),
    "sfb-rank-3": (
        {"sfb": zeros(F32, 1, 2, 2)},
        ValueError,
        "sfb must be float32[2, 2] (ceil(n/128), ceil(k/128)), got float32[1, 2, 2]",
    ),
    "sfb-float16": (
        {"sfb": zeros(np.float16, 2, 2)},
        TypeError,
        "sfb must be float32[2, 2] (ceil(n/128), ceil(k/128)), got float16[2, 2]",
    ),
    "sfb-per-row": (
        {"sfb": zeros(F32, N, 2)},
        ValueError,
        "sfb must be float32[2, 2] (ceil(n/128), ceil(k/128)), got float32[136, 2]",
    ),
    "sfb-n-floored": (
        {"sfb": zeros(F32, 1, 2)},
        ValueError,
        "sfb must be float32[2, 2] (ceil(n/128), ceil(k/128)), got float32[1, 2]",
    ),
    "sfb-k-floored": (
        {"sfb": zeros(F32, 2, 1)},
        ValueError,
        "sfb must be float32[2, 2] (ceil(n/128), ceil(k/128)), got float32[2, 1]",
    ),
    "scales-swapped": (
        {"sfa": zeros(F32, 2, 2), "sfb": zeros(F32, M, 2)},
        ValueError,
        "sfa must be float32[16, 2] (m, ceil(k/128)), got float32[2, 2]",
    ),
    "operands-swapped": (
        {
            "a": zeros(E4M3, N, K),
            "sfa": zeros(F32, 2, 2),
            "b": zeros(E4M3, M, K),
            "sfb": zeros(F32, M, 2),
        },
        ValueError,
        "sfa must be float32[136, 2] (m, ceil(k/128)), got float32[2, 2]",
    ),
    "values-and-scales-swapped": (
        {"a": zeros(F32, M, 2), "sfa": zeros(E4M3, M, K)},
        TypeError,
        "a must be float8_e4m3fn[m, k] or float8_e5m2[m, k] (m, k), got float32[16, 2]",
    ),
}


@pytest.mark.parametrize(("bad", "kind", "message"), BAD_ARRAYS.values(), ids=list(BAD_ARRAYS))
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_bad_array(
    wrap: Callable[..., Any],
    bad: dict[str, Any],
    kind: type[Exception],
    message: str,
    operands: numerics.DenseOperands,
) -> None:
    with pytest.raises((TypeError, ValueError)) as raised:
        wrap(flat)(**(operands._asdict() | bad))
    assert raised.type is kind
    assert str(raised.value) == f"{OP}: {message}"
    check(wrap(flat)(*operands), operands)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            {"sfa": np.full((M, 2), 1e300)},
            "sfa must be float32[16, 2] (m, ceil(k/128)), got float64[16, 2]",
        ),
        (
            {"a": zeros(object, M, K)},
            "a must be float8_e4m3fn[m, k] or float8_e5m2[m, k] (m, k), got object[16, 144]",
        ),
        (
            {"sfb": zeros([("scale", F32)], 2, 2)},
            "sfb must be float32[2, 2] (ceil(n/128), ceil(k/128)), got void32[2, 2]",
        ),
        (
            {"sfb": zeros(">f4", 2, 2)},
            "sfb must be float32[2, 2] (ceil(n/128), ceil(k/128)), got >f4[2, 2]",
        ),
    ],
    ids=["float64", "objects", "structs", "big-endian"],
)
def test_numpy_array_of_a_type_that_jax_lacks(
    bad: dict[str, Any], message: str, operands: numerics.DenseOperands
) -> None:
    with pytest.raises(TypeError) as raised:
        flat(**(operands._asdict() | bad))
    assert str(raised.value) == f"{OP}: {message}"


BAD_PAIRS = {
    "array": (jnp.zeros((2, 16)), "values and scales, got ArrayImpl"),
    "numpy-array": (np.zeros((2, 16)), "values and scales, got ndarray"),
    "none": (None, "values and scales, got NoneType"),
    "dict": ({"values": 1, "scales": 2}, "values and scales, got dict"),
    "one": ((np.zeros(1),), "values and scales, got tuple"),
    "three": ([np.zeros(1)] * 3, "values and scales, got list"),
    "of-numbers": ((1.0, np.zeros(1)), "arrays, got float"),
    "of-lists": ((np.zeros(1), [1.0]), "arrays, got list"),
    "of-nothing": ((np.zeros(1), None), "arrays, got NoneType"),
    "of-shapes": ((jax.ShapeDtypeStruct((2, 16), E4M3),) * 2, "arrays, got ShapeDtypeStruct"),
}


@pytest.mark.parametrize(("pair", "message"), BAD_PAIRS.values(), ids=list(BAD_PAIRS))
def test_bad_pair(pair: Any, message: str, operands: numerics.DenseOperands) -> None:
    a, sfa, b, sfb = operands
    with pytest.raises(TypeError) as raised:
        gemm_fp8_fp8_bf16_nt(pair, (b, sfb))
    assert str(raised.value) == f"{OP}: lhs must be a pair (a, sfa) of {message}"
    with pytest.raises(TypeError) as raised:
        gemm_fp8_fp8_bf16_nt((a, sfa), pair)
    assert str(raised.value) == f"{OP}: rhs must be a pair (b, sfb) of {message}"
    check(flat(*operands), operands)


@pytest.mark.parametrize(
    ("n", "k", "message"),
    [
        pytest.param(132, 128, "n must be a positive multiple of 8, got 132", id="n132"),
        pytest.param(1, 128, "n must be a positive multiple of 8, got 1", id="n1"),
        pytest.param(0, 128, "n must be a positive multiple of 8, got 0", id="n0"),
        pytest.param(8, 136, "k must be a positive multiple of 16, got 136", id="k136"),
        pytest.param(8, 8, "k must be a positive multiple of 16, got 8", id="k8"),
        pytest.param(8, 0, "k must be a positive multiple of 16, got 0", id="k0"),
    ],
)
def test_unsupported_size(n: int, k: int, message: str, operands: numerics.DenseOperands) -> None:
    for m in (0, 5):
        with pytest.raises(ValueError) as raised:
            flat(*numerics.dense_operands(m, n, k, seed=4))
        assert str(raised.value) == f"{OP}: {message}"
    check(flat(*operands), operands)


@pytest.mark.parametrize("config", [(64, 64, 4, 1, 1, 1, 1, 8), {"block_m": 64}, "64x64", 0])
def test_config_of_wrong_type(config: Any, operands: numerics.DenseOperands) -> None:
    with pytest.raises(TypeError) as raised:
        flat(*operands, config=config)
    assert str(raised.value) == f"{OP}: config must be a GemmConfig, got {type(config).__name__}"
    check(flat(*operands), operands)


def test_illegal_config(operands: numerics.DenseOperands) -> None:
    for config, message in (
        (GemmConfig(96, 64, 4), "block_m must be 64, 128 or 256, got 96"),
        # Illegal for this k alone: two k-blocks cannot be split over four CTAs.
        (
            GemmConfig(64, 64, 4, cluster_k=4),
            "cluster_k must be at most the number of k-blocks (2), got 4",
        ),
    ):
        with pytest.raises(ValueError) as raised:
            jax.jit(flat, static_argnames="config")(*operands, config=config)
        assert str(raised.value) == f"{OP}: config: {message}"
    check(flat(*operands), operands)


def test_config_that_the_sm_limit_forbids(
    operands: numerics.DenseOperands, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GemmConfig(64, 64, 4, cluster_k=2)
    check(flat(*operands, config=config), operands)
    monkeypatch.setattr("jax_deepgemm.device._num_sms_limit", 1)
    with pytest.raises(ValueError) as raised:
        flat(*operands, config=config)
    assert str(raised.value) == (
        f"{OP}: config: a cluster of 2 CTAs needs as many SMs, but num_sms is 1"
    )
    check(flat(*operands), operands)


# --- vmap ----------------------------------------------------------------------------------------


def batched(batch: int, m: int) -> numerics.DenseOperands:
    """Operands with a leading batch axis on a and sfa."""
    parts = [numerics.dense_operands(m, N, K, seed=seed) for seed in range(batch)]
    _, _, b, sfb = numerics.dense_operands(m, N, K, seed=0)
    a = np.zeros((batch, m, K), E4M3)
    sfa = np.zeros((batch, m, 2), F32)
    for i, part in enumerate(parts):
        a[i], sfa[i] = part.a, part.sfa
    return numerics.DenseOperands(a, sfa, b, sfb)


@pytest.mark.parametrize(("batch", "m"), [(3, 5), (1, 1), (3, 0), (0, 5)], ids=str)
def test_vmap_folds_a_batch_into_m(batch: int, m: int) -> None:
    a, sfa, b, sfb = batched(batch, m)
    fold = jax.vmap(flat, in_axes=(0, 0, None, None))
    d = jax.jit(fold)(a, sfa, b, sfb)
    assert d.shape == (batch, m, N)
    for i in range(batch):
        check(d[i], numerics.DenseOperands(a[i], sfa[i], b, sfb))

    calls = cuda_calls(cuda_text(fold, a, sfa, b, sfb))
    assert [(problem_of(call)["op"], problem_of(call)["m"]) for call in calls] == (
        [(0, batch * m)] if batch else []
    )


def test_vmap_takes_any_axes_and_nests() -> None:
    a, sfa, b, sfb = batched(6, 5)
    expected = jax.vmap(flat, in_axes=(0, 0, None, None))(a, sfa, b, sfb)

    other_axes = jax.vmap(flat, in_axes=(2, 1, None, None), out_axes=1)
    d = other_axes(np.moveaxis(a, 0, 2), np.moveaxis(sfa, 0, 1), b, sfb)
    np.testing.assert_array_equal(np.moveaxis(np.asarray(d), 1, 0), expected)

    nested = jax.vmap(jax.vmap(flat, in_axes=(0, 0, None, None)), in_axes=(0, 0, None, None))
    d = nested(a.reshape(2, 3, 5, K), sfa.reshape(2, 3, 5, 2), b, sfb)
    np.testing.assert_array_equal(np.asarray(d).reshape(6, 5, N), expected)


def launches(function: Callable[..., Any], *arguments: Any) -> list[tuple[str, int]]:
    """The operation and the groups of each custom call for CUDA."""
    problems = map(problem_of, cuda_calls(cuda_text(function, *arguments)))
    return [(OPS[problem["op"]], problem["num_groups"]) for problem in problems]


@pytest.mark.parametrize(("batch", "m"), [(3, 5), (1, 1), (3, 0), (0, 5)], ids=str)
def test_vmap_of_both_is_one_masked_call(batch: int, m: int) -> None:
    parts = [numerics.dense_operands(m, N, K, seed=seed) for seed in range(batch)]
    empty = numerics.dense_operands(m, N, K, seed=0)
    stacked = [
        np.stack([part[i] for part in parts]) if parts else empty[i][None][:0] for i in range(4)
    ]
    d = jax.jit(jax.vmap(flat))(*stacked)
    assert d.shape == (batch, m, N)
    for i, part in enumerate(parts):
        check(d[i], part)
    assert launches(jax.vmap(flat), *stacked) == ([("masked", batch)] if batch else [])


@pytest.mark.parametrize(("n", "launch"), [(128, ("dense", 1)), (N, ("masked", 3))])
def test_vmap_of_b_alone(n: int, launch: tuple[str, int]) -> None:
    # Where the scales of one B end with its rows, all of them are one B with more rows.
    parts = [numerics.dense_operands(5, n, K, seed=seed) for seed in range(3)]
    a, sfa, *_ = parts[0]
    b, sfb = (np.stack([part[i] for part in parts]) for i in (2, 3))
    over_b = jax.vmap(flat, in_axes=(None, None, 1, 2))
    arguments = a, sfa, np.moveaxis(b, 0, 1), np.moveaxis(sfb, 0, 2)
    d = jax.jit(over_b)(*arguments)
    assert d.shape == (3, 5, n)
    for i in range(3):
        check(d[i], numerics.DenseOperands(a, sfa, b[i], sfb[i]))
    assert launches(over_b, *arguments) == [launch]


OF_A, OF_B, OF_BOTH = (0, 0, None, None), (None, None, 0, 0), (0, 0, 0, 0)


@pytest.mark.parametrize("n", [24, 128])
@pytest.mark.parametrize("inner", [OF_A, OF_B, OF_BOTH], ids=["a", "b", "both"])
@pytest.mark.parametrize("middle", [OF_A, OF_B, OF_BOTH], ids=["a", "b", "both"])
def test_nested_vmaps_are_one_launch(
    middle: tuple[int | None, ...], inner: tuple[int | None, ...], n: int
) -> None:
    """Three batches, the outer one of A."""
    batches = ((2, OF_A), (3, middle), (2, inner))
    operands = numerics.dense_operands(5, n, K, seed=0)
    rng = np.random.default_rng(1)
    stacked = []
    for index, operand in enumerate(operands):
        shape = [size for size, axes in batches if axes[index] is not None]
        order = rng.permuted(np.arange(operand.shape[0] * math.prod(shape)) % operand.shape[0])
        stacked.append(operand[order].reshape(*shape, *operand.shape))
    function: Callable[..., jax.Array] = flat
    for _, axes in reversed(batches):
        function = jax.vmap(function, axes)
    d = np.asarray(jax.jit(function)(*stacked))
    assert d.shape == (2, 3, 2, 5, n)
    for index in np.ndindex(2, 3, 2):
        parts = []
        for i, operand in enumerate(stacked):
            held = [at for at, (_, axes) in zip(index, batches, strict=True) if axes[i] is not None]
            parts.append(operand[tuple(held)])
        np.testing.assert_array_equal(d[index], flat(*parts))
    assert len(launches(function, *stacked)) == 1


def test_nested_vmaps_of_both_are_one_call() -> None:
    parts = [numerics.dense_operands(5, N, K, seed=seed) for seed in range(6)]
    stacked = [np.stack([part[i] for part in parts]) for i in range(4)]
    nested = [x.reshape(2, 3, *x.shape[1:]) for x in stacked]
    twice = jax.vmap(jax.vmap(flat))
    assert launches(twice, *nested) == [("masked", 6)]
    np.testing.assert_array_equal(
        np.asarray(twice(*nested)).reshape(6, 5, N), np.asarray(jax.vmap(flat)(*stacked))
    )


def test_vmap_of_both_carries_and_checks_the_config(operands: numerics.DenseOperands) -> None:
    stacked = [np.stack([operand] * 2) for operand in operands]
    config = GemmConfig(64, 64, 4, 1, raster_m=8)
    (call,) = cuda_calls(cuda_text(jax.vmap(functools.partial(flat, config=config)), *stacked))
    problem = problem_of(call)
    assert (problem["op"], problem["num_groups"]) == (2, 2)
    assert (problem["block_n"], problem["expected_m"]) == (64, operands.a.shape[0])
    both = dataclasses.replace(config, cluster_m=2)
    with pytest.raises(ValueError, match=f"^{OP}: config: cluster_m must be 1 for grouped"):
        jax.vmap(functools.partial(flat, config=both))(*stacked)


@pytest.mark.parametrize(
    ("in_axes", "got"),
    [
        ((0, None, None, None), "a 0, sfa None, b None, sfb None"),
        ((None, 0, None, None), "a None, sfa 0, b None, sfb None"),
        ((0, 0, 0, None), "a 0, sfa 0, b 0, sfb None"),
        ((0, 0, None, 0), "a 0, sfa 0, b None, sfb 0"),
    ],
    ids=str,
)
def test_other_vmaps_are_refused(
    in_axes: tuple[int | None, ...], got: str, operands: numerics.DenseOperands
) -> None:
    stacked = [
        operand if axis is None else np.stack([operand] * 2)
        for operand, axis in zip(operands, in_axes, strict=True)
    ]
    with pytest.raises(NotImplementedError) as raised:
        jax.vmap(flat, in_axes=in_axes)(*stacked)
    assert str(raised.value) == (
        f"{OP}: jax.vmap takes values and their scales together; got the batch axes {got}"
    )
    check(flat(*operands), operands)


# --- Lowering for CUDA ---------------------------------------------------------------------------


@pytest.mark.parametrize("m", [64, 65, 66, 67, 4, 1])
def test_cuda_call(m: int) -> None:
    text = cuda_text(flat, *numerics.dense_operands(m, N, K, seed=0))
    (call,) = cuda_calls(text)
    assert call.count("custom_call") == 1
    assert "stablehlo.dot" not in text
    # Target, then operands: SFA comes m-contiguous.
    assert (
        "operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<[0, 1]> : tensor<2xindex>, "
        "dense<[1, 0]> : tensor<2xindex>, dense<[1, 0]> : tensor<2xindex>], "
        "result_layouts = [dense<[1, 0]> : tensor<2xindex>]"
    ) in call
    assert call.endswith(
        f": (tensor<{m}x144xf8E4M3FN>, tensor<{m}x2xf32>, tensor<136x144xf8E4M3FN>, "
        f"tensor<2x2xf32>) -> tensor<{m}x136xbf16>"
    )
    assert "stablehlo.pad" not in text


TYPES = {"a_type": 0, "b_type": 0, "batch_invariant": 0}
DENSE_PROBLEM = {"op": 0, "num_groups": 1, "m": M, "expected_m": 0, "n": N, "k": K} | TYPES


def test_cuda_call_leaves_the_choice_to_the_device(operands: numerics.DenseOperands) -> None:
    (call,) = cuda_calls(cuda_text(flat, *operands))
    options = dict.fromkeys(["num_sms", "fill_zero", *GemmConfig.__dataclass_fields__], 0)
    assert problem_of(call) == DENSE_PROBLEM | options


def test_cuda_call_carries_config_and_sm_limit(
    operands: numerics.DenseOperands, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GemmConfig(
        block_m=128,
        block_n=48,
        num_stages=5,
        math_warpgroups=2,
        cluster_m=1,
        cluster_n=2,
        cluster_k=1,
        raster_m=3,
    )
    monkeypatch.setattr("jax_deepgemm.device._num_sms_limit", 66)
    (call,) = cuda_calls(cuda_text(lambda *o: flat(*o, config=config), *operands))
    fields = {name: getattr(config, name) for name in GemmConfig.__dataclass_fields__}
    assert problem_of(call) == DENSE_PROBLEM | {"num_sms": 66, "fill_zero": 0} | fields


def test_cuda_call_has_the_members_that_the_handler_decodes(
    operands: numerics.DenseOperands,
) -> None:
    decoded = re.findall(r'{"(\w+)", &GemmAttributes::\w+, (?:true|false)}', HANDLERS.read_text())
    (call,) = cuda_calls(cuda_text(flat, *operands))
    assert sorted(problem_of(call)) == sorted(decoded)


def test_cuda_call_is_the_same_with_64_bit_types(operands: numerics.DenseOperands) -> None:
    (narrow,) = cuda_calls(cuda_text(flat, *operands))
    with jax.enable_x64(True):
        (wide,) = cuda_calls(cuda_text(flat, *operands))
    assert narrow == wide


def test_cuda_call_of_a_folded_batch() -> None:
    fold = jax.vmap(flat, in_axes=(0, 0, None, None))
    (call,) = cuda_calls(cuda_text(fold, *batched(3, 5)))
    assert problem_of(call)["m"] == 15
    assert "tensor<15x2xf32>" in call  # sfa


# --- jax.export ----------------------------------------------------------------------------------


def export_for_cuda(function: Callable[..., Any], *arguments: Any) -> export.Exported:
    allowed = [export.DisabledSafetyCheck.custom_call(name) for name in ffi.CUSTOM_CALL_TARGETS]
    exporting = export.export(jax.jit(function), platforms=["cuda"], disabled_checks=allowed)
    return exporting(*arguments)


def gemm_of_quantized(lhs: Quantized, rhs: Quantized) -> Quantized:
    return jax_deepgemm.quantize_per_token(gemm_fp8_fp8_bf16_nt(lhs, rhs))


def test_export_of_fixed_shapes(operands: numerics.DenseOperands) -> None:
    a, sfa, b, sfb = operands
    exported = export_for_cuda(gemm_of_quantized, Quantized(a, sfa), Quantized(b, sfb))
    assert exported.platforms == ("cuda",)
    (call,) = cuda_calls(exported.mlir_module())
    assert problem_of(call)["n"] == N


def test_exported_function_is_saved_with_its_pairs(operands: numerics.DenseOperands) -> None:
    pytest.importorskip("flatbuffers", reason="jax.export saves through flatbuffers")
    a, sfa, b, sfb = operands
    exported = export_for_cuda(gemm_of_quantized, Quantized(a, sfa), Quantized(b, sfb))
    restored = export.deserialize(exported.serialize())
    assert restored.in_tree == exported.in_tree
    assert restored.out_tree == jax.tree.structure(Quantized(0, 0))
    assert cuda_calls(restored.mlir_module()) == cuda_calls(exported.mlir_module())


def symbolic_operands(m: Any, n: Any, k: Any) -> list[jax.ShapeDtypeStruct]:
    k_blocks = (k + 127) // 128
    return [
        jax.ShapeDtypeStruct((m, k), E4M3),
        jax.ShapeDtypeStruct((m, k_blocks), F32),
        jax.ShapeDtypeStruct((n, k), E4M3),
        jax.ShapeDtypeStruct(((n + 127) // 128, k_blocks), F32),
    ]


@pytest.mark.parametrize("dimension", ["m", "n", "k"])
def test_symbolic_dimension_is_refused(dimension: str) -> None:
    (symbol,) = export.symbolic_shape("size")
    sizes: dict[str, Any] = {"m": M, "n": N, "k": K}
    with pytest.raises(ValueError) as raised:
        export_for_cuda(flat, *symbolic_operands(**(sizes | {dimension: symbol})))
    assert str(raised.value) == f"{OP}: {dimension} must be static, got size"


def test_symbolic_batch_is_refused() -> None:
    (batch,) = export.symbolic_shape("batch")
    a, sfa, b, sfb = symbolic_operands(M, N, K)
    a, sfa = (jax.ShapeDtypeStruct((batch, *x.shape), x.dtype) for x in (a, sfa))
    with pytest.raises(ValueError) as raised:
        export_for_cuda(jax.vmap(flat, in_axes=(0, 0, None, None)), a, sfa, b, sfb)
    assert str(raised.value) == f"{OP}: batch must be static, got batch"


# --- Gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [jax.grad, lambda f: lambda x: jax.jvp(f, (x,), (x,))])
def test_gradients_are_refused(transform: Any, operands: numerics.DenseOperands) -> None:
    a, sfa, b, sfb = operands

    def total(sfa: jax.Array) -> jax.Array:
        return flat(a, sfa, b, sfb).astype(jnp.float32).sum()

    message = f"^{OP}: there is no derivative; .* with jax.custom_vjp"
    with pytest.raises(NotImplementedError, match=message):
        transform(total)(jnp.asarray(sfa))


# --- shard_map -----------------------------------------------------------------------------------

# Which axes of (a, sfa, b, sfb) and d are split over which mesh axes.
P = PartitionSpec
SHARDINGS = {
    "m": ({"x": 8}, (P("x"), P("x"), P(), P()), P("x")),
    "n": ({"x": 8}, (P(), P(), P("x"), P("x")), P(None, "x")),
    "m-and-n": ({"x": 4, "y": 2}, (P("x"), P("x"), P("y"), P("y")), P("x", "y")),
}

sharded = pytest.mark.parametrize(
    ("axes", "in_specs", "out_specs"), SHARDINGS.values(), ids=list(SHARDINGS)
)


@sharded
def test_shard_map(axes: Any, in_specs: Any, out_specs: Any, cpu_mesh: Any) -> None:
    operands = numerics.dense_operands(72, 1024, 272, seed=5)
    varying = []

    def body(*shards: jax.Array) -> jax.Array:
        d = flat(*shards)
        varying.append(jax.typeof(d).manual_axis_type.varying)
        return d

    mesh = cpu_mesh(**axes)
    d = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs))(*operands)
    check(d, operands)
    assert varying == [frozenset(axes)]


@sharded
def test_shard_map_refuses_a_result_called_replicated(
    axes: Any, in_specs: Any, out_specs: Any, cpu_mesh: Any
) -> None:
    operands = numerics.dense_operands(72, 1024, 272, seed=5)
    body = jax.shard_map(flat, mesh=cpu_mesh(**axes), in_specs=in_specs, out_specs=P())
    with pytest.raises(ValueError, match="require replication"):
        jax.jit(body)(*operands)


def test_shard_map_of_replicated_operands_is_replicated(
    cpu_mesh: Any, operands: numerics.DenseOperands
) -> None:
    body = jax.shard_map(flat, mesh=cpu_mesh(x=8), in_specs=P(), out_specs=P())
    check(jax.jit(body)(*operands), operands)


def test_shard_map_adds_up_a_split_k(cpu_mesh: Any) -> None:
    operands = numerics.dense_operands(24, 136, 1024, seed=6)

    def body(*shards: jax.Array) -> jax.Array:
        return jax.lax.psum(flat(*shards).astype(jnp.float32), "x")

    split = jax.shard_map(body, mesh=cpu_mesh(x=8), in_specs=P(None, "x"), out_specs=P())
    # Each of eight parts was rounded to bfloat16.
    assert numerics.error(jax.jit(split)(*operands), numerics.dense_oracle(operands)) < 2e-5


@sharded
def test_shard_map_lowers_one_call_per_device(
    axes: Any, in_specs: Any, out_specs: Any, cpu_mesh: Any
) -> None:
    operands = numerics.dense_operands(72, 1024, 272, seed=5)
    mesh = cpu_mesh(**axes)
    body = jax.shard_map(flat, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    (call,) = cuda_calls(cuda_text(body, *operands))
    problem = problem_of(call)
    parts_m = mesh.shape[out_specs[0]] if out_specs[0] else 1
    parts_n = mesh.shape[out_specs[1]] if len(out_specs) > 1 else 1
    assert (problem["m"], problem["n"], problem["k"]) == (72 // parts_m, 1024 // parts_n, 272)
    assert f"tensor<{problem['m']}x3xf32>" in call
