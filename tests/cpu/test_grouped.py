"""The grouped operations: numbers on the CPU, messages, and what they lower to for CUDA."""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import AxisType, PartitionSpec

import jax_deepgemm
from jax_deepgemm import GemmConfig, ffi, grouped, reference
from tests import numerics
from tests.grouped_cases import OPS, Problem, call, name_of, plant
from tests.lowering import cuda_calls, cuda_text, problem_of

P = PartitionSpec
ragged = functools.partial(call, "ragged")

every_op = pytest.mark.parametrize("op", OPS)


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def check(d: jax.Array, expected: np.ndarray[Any, Any]) -> None:
    numerics.check(d, expected, **numerics.FLOAT32_SUMS)


@functools.cache
def jitted(op: str) -> Callable[..., jax.Array]:
    return jax.jit(functools.partial(call, op))


# --- Numbers -------------------------------------------------------------------------------------


@every_op
@pytest.mark.parametrize(("n", "k"), [(8, 16), (136, 272)], ids=["n8-k16", "n136-k272"])
@pytest.mark.parametrize("rows", [0, 1, 8, 33, 129, 300], ids="m{}".format)
@pytest.mark.parametrize("num_groups", [1, 5], ids="g{}".format)
def test_agrees_with_float64(op: str, num_groups: int, rows: int, n: int, k: int) -> None:
    problem = Problem(op, num_groups, rows, n, k)
    operands = problem.operands(seed=1)
    for seed in range(3):
        arrays = problem.random_arrays(np.random.default_rng([seed, rows, n, k]))
        check(jitted(op)(*operands, *arrays), problem.oracle(operands, *arrays))


PATTERNS = [
    Problem("contiguous", 8, 8 * 128, 24, 144),
    Problem("masked", 8, 9, 136, 144),
    Problem("ragged", 8, 80, 136, 144),
]


@pytest.mark.parametrize("problem", PATTERNS, ids=str)
def test_every_pattern_of_empty_groups(problem: Problem) -> None:
    operands = problem.operands(seed=2)
    for pattern in range(2**8):
        arrays = problem.present(pattern)
        check(jitted(problem.op)(*operands, *arrays), problem.oracle(operands, *arrays))


@pytest.mark.parametrize(
    "sizes",
    [
        [0, 0, 0, 0],
        [200, 0, 0, 0],
        [0, 0, 0, 200],
        [0, 300, 0, 0],
        [150, 300, 7, 0],
        [1, 1, 197, 1],
        [200, 200, 200, 200],
        [-5, 60, -(2**31), 70],
        [2**31 - 1, 1, 2**31 - 1, 2**31 - 1],
        [100, 2**31 - 1, 2**31 - 1, 2**31 - 1],
    ],
    ids=str,
)
def test_skewed_and_single_and_no_groups(sizes: list[int]) -> None:
    array = np.array(sizes, np.int32)
    for op in ("masked", "ragged"):
        problem = Problem(op, 4, 200, 24, 144)
        operands = problem.operands(seed=3)
        check(jitted(op)(*operands, array), problem.oracle(operands, array))


@every_op
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_groups(op: str, data: st.DataObject) -> None:
    problem = Problem(op, 6, data.draw(st.sampled_from([130, 300])), 24, 144)
    sizes = st.integers(0, 90) | st.sampled_from([0, 1, -1, 128, 2**31 - 1, -(2**31)])
    if op == "contiguous":
        seed = data.draw(st.integers(0, 2**32 - 1))
        arrays = problem.random_arrays(np.random.default_rng(seed))
    else:
        numbers = data.draw(st.lists(sizes, min_size=6, max_size=6))
        arrays = (np.array(numbers, np.int32),)
    operands = problem.operands(seed=4)
    check(jitted(op)(*operands, *arrays), problem.oracle(operands, *arrays))


offsets = st.integers(-8, 16) | st.sampled_from([2**31 - 1, -(2**31), 1 - 2**31])


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(-2, 60), min_size=9, max_size=9), offset=offsets)
def test_offset_picks_the_groups_of_b(sizes: list[int], offset: int) -> None:
    problem = Problem("ragged", 4, 150, 24, 144)
    operands = problem.operands(seed=5)
    array = np.array(sizes, np.int32)
    d = jitted("ragged")(*operands, array, np.int32(offset))
    check(d, problem.oracle(operands, array, offset))


def test_slices_of_the_groups_add_up() -> None:
    problem = Problem("ragged", 12, 300, 136, 144)
    a, sfa, b, sfb = problem.operands(seed=6)
    (sizes,) = problem.random_arrays(np.random.default_rng(6))
    whole = np.asarray(jitted("ragged")(a, sfa, b, sfb, sizes)).astype(np.float32)
    parts = [
        np.asarray(
            jitted("ragged")(a, sfa, b[i : i + 3], sfb[i : i + 3], sizes, np.int32(i))
        ).astype(np.float32)
        for i in range(0, 12, 3)
    ]
    # A row is in one part, and zero in the others.
    np.testing.assert_array_equal(sum(parts), whole)


def test_ragged_is_ragged_dot() -> None:
    problem = Problem("ragged", 5, 90, 136, 144)
    a, sfa, b, sfb = problem.operands(seed=7)
    sizes = np.array([20, 0, 33, 1, 36], np.int32)
    expected = jax.lax.ragged_dot(
        reference.dequantize_per_token(jnp.asarray(a), jnp.asarray(sfa)),
        reference.dequantize_per_block(jnp.asarray(b), jnp.asarray(sfb)).mT,
        jnp.asarray(sizes),
    )
    d = ragged(a, sfa, b, sfb, sizes)
    assert numerics.worst_row_error(d, expected) < numerics.FLOAT32_SUMS["row_tolerance"]


@pytest.mark.parametrize("max_m", [1, 8, 33, 129], ids="max_m{}".format)
def test_counts_out_of_range_are_clamped(max_m: int) -> None:
    problem = Problem("masked", 7, max_m, 24, 144)
    operands = problem.operands(seed=8)
    counts = np.array([-1, 0, 1, max_m - 1, max_m, max_m + 1, 2**31 - 1], np.int32)
    d = jitted("masked")(*operands, counts)
    check(d, problem.oracle(operands, counts))
    np.testing.assert_array_equal(d, jitted("masked")(*operands, counts.clip(0, max_m)))


def test_masked_hints_change_nothing() -> None:
    problem = Problem("masked", 3, 33, 24, 144)
    operands = problem.operands(seed=9)
    counts = np.array([5, 33, 0], np.int32)
    expected = call("masked", *operands, counts)
    for options in ({"expected_m": 1}, {"expected_m": 10**6}, {"expected_m": np.int64(7)}):
        np.testing.assert_array_equal(call("masked", *operands, counts, **options), expected)
    # What rows past the counts hold is not promised here; the others are.
    undefined = np.asarray(call("masked", *operands, counts, fill="undefined"))
    for d, rows, count in zip(undefined, np.asarray(expected), counts, strict=True):
        np.testing.assert_array_equal(d[:count], rows[:count])


@every_op
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_bad_values_stay_in_their_row_and_expert(op: str, bad: float) -> None:
    planted = plant(Problem(op, 3, 384, 136, 144), bad, seed=10)
    planted.check(jitted(op)(*planted.bad), jitted(op)(*planted.clean))


@every_op
def test_same_bits_however_it_is_run(op: str) -> None:
    problem = Problem(op, 3, 140, 24, 144)
    operands = problem.operands(seed=11)
    arrays = problem.random_arrays(np.random.default_rng(11))
    expected = jitted(op)(*operands, *arrays)
    np.testing.assert_array_equal(call(op, *operands, *arrays), expected)
    np.testing.assert_array_equal(call(op, *operands, *map(jnp.asarray, arrays)), expected)
    with jax.disable_jit():
        np.testing.assert_array_equal(call(op, *operands, *arrays), expected)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(
            jax.jit(functools.partial(call, op))(*operands, *arrays), expected
        )
    for config in jax_deepgemm.legal_configs(132, 24, 144, op=op, num_groups=3)[::50]:
        np.testing.assert_array_equal(call(op, *operands, *arrays, config=config), expected)


@pytest.mark.parametrize(
    "offset",
    [2, np.int32(2), np.int64(2).item(), np.array(2, np.int32), jnp.int32(2), jnp.array([2])],
    ids=repr,
)
def test_takes_every_form_of_an_offset(offset: Any) -> None:
    problem = Problem("ragged", 3, 50, 24, 144)
    operands = problem.operands(seed=12)
    sizes = np.array([3, 9, 11, 20, 1], np.int32)
    expected = problem.oracle(operands, sizes, 2)
    check(ragged(*operands, sizes, offset), expected)
    check(jitted("ragged")(*operands, sizes, offset), expected)


def test_takes_what_the_quantizers_return() -> None:
    rng = np.random.default_rng(13)
    weights = rng.standard_normal((3, 136, 272), np.float32)
    rhs = jax_deepgemm.quantize_per_block(weights)
    for op, shape, arrays in (
        ("contiguous", (260, 272), (np.repeat([0, 1, 2], [128, 128, 4]),)),
        ("masked", (3, 7, 272), (np.array([7, 0, 5]),)),
        ("ragged", (33, 272), (np.array([10, 0, 20]),)),
    ):
        x = rng.standard_normal(shape, np.float32)
        lhs = jax_deepgemm.quantize_per_token(x)
        array = arrays[0].astype(np.int32)
        problem = Problem(op, 3, shape[-2], 136, 272)
        d = call(op, *lhs, *rhs, array)
        check(d, problem.oracle(numerics.GroupedOperands(*map(np.asarray, (*lhs, *rhs))), array))


def test_weights_are_dequantised_one_group_at_a_time() -> None:
    # All of them are 8 MiB of FP8, which XLA copies, and would be 32 MiB in float32.
    for op in OPS:
        problem = Problem(op, 64, 8 if op == "masked" else 512, 256, 512)
        compiled = jitted(op).lower(*problem.shapes()).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 12 * 2**20


# --- What the kernel is told about blocks of rows ------------------------------------------------


def block_groups_oracle(indices: np.ndarray[Any, Any], num_groups: int) -> list[int]:
    blocks = []
    for start in range(0, len(indices), 128):
        block = indices[start : start + 128].tolist()
        groups = [index for index in block if 0 <= index < num_groups]
        blocks.append(2 * max(groups) + (len(groups) < 128) if groups else -1)
    return blocks


@pytest.mark.parametrize("m", [0, 1, 127, 128, 129, 1000, 1024], ids="m{}".format)
def test_block_groups(m: int) -> None:
    prepare = jax.jit(grouped._block_groups, static_argnums=0)
    for seed in range(20):
        rng = np.random.default_rng([seed, m])
        blocks = rng.integers(-1, 6, numerics.ceil_div(m, 128))
        indices = numerics.contiguous_layout(rng, blocks, m, 6)
        same, result = prepare(6, indices)
        np.testing.assert_array_equal(same, indices)
        assert result.dtype == np.int32
        assert result.tolist() == block_groups_oracle(indices, 6)


# --- Messages ------------------------------------------------------------------------------------

E4M3 = numerics.E4M3
F32, I32 = np.float32, np.int32
G, M, N, K = 3, 16, 136, 144


def zeros(dtype: Any, *shape: int) -> np.ndarray[Any, Any]:
    return np.zeros(shape, dtype)


# What replaces arguments of a G x M x N x K problem, and what is said about it.
BAD = [
    (
        "contiguous",
        {"a": zeros(E4M3, 2, M, K)},
        ValueError,
        "a must be float8_e4m3fn[m, k] (m, k), got float8_e4m3fn[2, 16, 144]",
    ),
    (
        "masked",
        {"a": zeros(E4M3, M, K)},
        ValueError,
        "a must be float8_e4m3fn[num_groups, max_m, k] (num_groups, max_m, k), "
        "got float8_e4m3fn[16, 144]",
    ),
    (
        "ragged",
        {"a": zeros(jnp.float8_e5m2fnuz, M, K)},
        TypeError,
        "a must be float8_e4m3fn[m, k] or float8_e5m2[m, k] (m, k), got float8_e5m2fnuz[16, 144]",
    ),
    (
        "contiguous",
        {"b": zeros(E4M3, N, K)},
        ValueError,
        "b must be float8_e4m3fn[num_groups, n, 144] (num_groups, n, k), "
        "got float8_e4m3fn[136, 144]",
    ),
    (
        "ragged",
        {"b": zeros(E4M3, G, K, N)},
        ValueError,
        "b must be float8_e4m3fn[num_groups, n, 144] (num_groups, n, k), "
        "got float8_e4m3fn[3, 144, 136]",
    ),
    (
        "masked",
        {"b": zeros(E4M3, G + 1, N, K)},
        ValueError,
        "b must be float8_e4m3fn[3, n, 144] (num_groups, n, k), got float8_e4m3fn[4, 136, 144]",
    ),
    (
        "masked",
        {"sfa": zeros(F32, G * M, 2)},
        ValueError,
        "sfa must be float32[3, 16, 2] (num_groups, max_m, ceil(k/128)), got float32[48, 2]",
    ),
    (
        "contiguous",
        {"sfa": zeros(F32, 2, M)},
        ValueError,
        "sfa must be float32[16, 2] (m, ceil(k/128)), got float32[2, 16]",
    ),
    (
        "ragged",
        {"sfb": zeros(F32, G, 1, 2)},
        ValueError,
        "sfb must be float32[3, 2, 2] (num_groups, ceil(n/128), ceil(k/128)), got float32[3, 1, 2]",
    ),
    (
        "masked",
        {"sfb": zeros(np.float16, G, 2, 2)},
        TypeError,
        "sfb must be float32[3, 2, 2] (num_groups, ceil(n/128), ceil(k/128)), got float16[3, 2, 2]",
    ),
    (
        "contiguous",
        {"m_indices": zeros(I32, M + 1)},
        ValueError,
        "m_indices must be int32[16] (m), got int32[17]",
    ),
    (
        "contiguous",
        {"m_indices": zeros(np.int64, M)},
        TypeError,
        "m_indices must be int32, got int64[16]: cast it with m_indices.astype(jnp.int32)",
    ),
    (
        "contiguous",
        {"m_indices": zeros(F32, M)},
        TypeError,
        "m_indices must be int32[16] (m), got float32[16]",
    ),
    ("contiguous", {"m_indices": [0] * M}, TypeError, "m_indices must be an array, got list"),
    (
        "masked",
        {"masked_m": zeros(I32, G, 1)},
        ValueError,
        "masked_m must be int32[3] (num_groups), got int32[3, 1]",
    ),
    (
        "masked",
        {"masked_m": zeros(np.uint32, G)},
        TypeError,
        "masked_m must be int32, got uint32[3]: cast it with masked_m.astype(jnp.int32)",
    ),
    ("masked", {"masked_m": None}, TypeError, "masked_m must be an array, got NoneType"),
    ("masked", {"expected_m": 0}, ValueError, "expected_m must be at least 1, got 0"),
    ("masked", {"expected_m": -3}, ValueError, "expected_m must be at least 1, got -3"),
    ("masked", {"expected_m": 4.0}, TypeError, "expected_m must be an integer, got 4.0"),
    ("masked", {"expected_m": None}, TypeError, "expected_m must be an integer, got None"),
    (
        "masked",
        {"fill": "zeros"},
        ValueError,
        "fill must be one of undefined, zero, got 'zeros'",
    ),
    ("masked", {"fill": 0}, ValueError, "fill must be one of undefined, zero, got 0"),
    (
        "masked",
        {"fill": np.ones(3)},
        ValueError,
        "fill must be one of undefined, zero, got array([1., 1., 1.])",
    ),
    (
        "ragged",
        {"group_sizes": jax.ShapeDtypeStruct((G,), I32)},
        TypeError,
        "group_sizes must be an array, got ShapeDtypeStruct",
    ),
    (
        "ragged",
        {"group_sizes": zeros(I32, G + 1)},
        ValueError,
        "group_sizes must be int32[3] (num_groups), got int32[4]",
    ),
    (
        "ragged",
        {"group_sizes": zeros(I32, G - 1), "group_offset": 0},
        ValueError,
        "group_sizes must have at least the 3 groups of b, got int32[2]",
    ),
    (
        "ragged",
        {"group_sizes": zeros(I32, 2, G), "group_offset": 0},
        ValueError,
        "group_sizes must be int32[num_sizes] (num_sizes), got int32[2, 3]",
    ),
    (
        "ragged",
        {"group_sizes": zeros(np.int16, G)},
        TypeError,
        "group_sizes must be int32, got int16[3]: cast it with group_sizes.astype(jnp.int32)",
    ),
    (
        "ragged",
        {"group_offset": zeros(I32, 2)},
        ValueError,
        "group_offset must be one number, got int32[2]",
    ),
    (
        "ragged",
        {"group_offset": np.int64(0)},
        TypeError,
        "group_offset must be int32, got int64[]: cast it with group_offset.astype(jnp.int32)",
    ),
    (
        "ragged",
        {"group_offset": zeros(F32, 1)},
        TypeError,
        "group_offset must be int32[1] (1), got float32[1]",
    ),
    ("ragged", {"group_offset": "1"}, TypeError, "group_offset must be an integer, got '1'"),
    (
        "ragged",
        {"group_offset": 2**31},
        ValueError,
        "group_offset must fit into 32 bits, got 2147483648",
    ),
    (
        "contiguous",
        {"config": (64, 64, 4)},
        TypeError,
        "config must be a GemmConfig, got tuple",
    ),
    (
        "ragged",
        {"config": GemmConfig(64, 64, 4, raster_m=33)},
        ValueError,
        "config: raster_m must be at most 32 for grouped operations: a lane looks up each row, "
        "got 33",
    ),
    (
        "masked",
        {"config": GemmConfig(64, 64, 4, cluster_m=2)},
        ValueError,
        "config: cluster_m must be 1 for grouped operations: CTAs that share B must work on one "
        "group, got 2",
    ),
]


def arguments(op: str) -> dict[str, Any]:
    """All that a G x M x N x K problem takes, by name."""
    operands = Problem(op, G, M, N, K).operands(seed=14)
    rest = {
        "contiguous": {"m_indices": zeros(I32, M)},
        "masked": {"masked_m": np.full(G, 5, I32), "expected_m": 5},
        "ragged": {"group_sizes": np.full(G, 5, I32)},
    }
    return operands._asdict() | rest[op]


def by_name(op: str, a: Any, sfa: Any, b: Any, sfb: Any, **rest: Any) -> jax.Array:
    d: jax.Array = getattr(jax_deepgemm, name_of(op))((a, sfa), (b, sfb), **rest)
    return d


@pytest.mark.parametrize(
    ("op", "bad", "kind", "message"),
    [pytest.param(*case, id=f"{case[0]}-{'-'.join(case[1])}-{i}") for i, case in enumerate(BAD)],
)
def test_bad_argument(op: str, bad: dict[str, Any], kind: type[Exception], message: str) -> None:
    by_name(op, **arguments(op))
    with pytest.raises((TypeError, ValueError)) as raised:
        by_name(op, **(arguments(op) | bad))
    assert raised.type is kind
    assert str(raised.value) == f"{name_of(op)}: {message}"


@every_op
def test_bad_argument_while_tracing(op: str) -> None:
    *operands, array = Problem(op, G, M, N, K).shapes()
    array = jax.ShapeDtypeStruct((*array.shape, 1), I32)
    with pytest.raises(ValueError, match=rf"^{name_of(op)}: \w+ must be int32\["):
        jax.eval_shape(functools.partial(call, op), *operands, array)


@every_op
def test_bad_pair(op: str) -> None:
    good = arguments(op)
    a, sfa, b, sfb = (good.pop(name) for name in ("a", "sfa", "b", "sfb"))
    function = getattr(jax_deepgemm, name_of(op))
    with pytest.raises(TypeError) as raised:
        function(a, (b, sfb), **good)
    assert str(raised.value) == (
        f"{name_of(op)}: lhs must be a pair (a, sfa) of values and scales, got ndarray"
    )
    with pytest.raises(TypeError) as raised:
        function((a, sfa), (b, None), **good)
    assert str(raised.value) == (
        f"{name_of(op)}: rhs must be a pair (b, sfb) of arrays, got NoneType"
    )


@every_op
@pytest.mark.parametrize(
    ("num_groups", "n", "k", "message"),
    [
        pytest.param(3, 132, 128, "n must be a positive multiple of 8, got 132", id="n132"),
        pytest.param(3, 8, 24, "k must be a positive multiple of 16, got 24", id="k24"),
        pytest.param(0, 8, 16, "there must be at least one group, got 0", id="g0"),
    ],
)
def test_unsupported_size(op: str, num_groups: int, n: int, k: int, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        jax.eval_shape(functools.partial(call, op), *Problem(op, num_groups, 16, n, k).shapes())
    assert str(raised.value) == f"{name_of(op)}: {message}"


@every_op
def test_config_that_the_sm_limit_forbids(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GemmConfig(64, 64, 4, cluster_k=2)
    by_name(op, **arguments(op), config=config)
    monkeypatch.setattr("jax_deepgemm.device._num_sms_limit", 1)
    with pytest.raises(ValueError) as raised:
        by_name(op, **arguments(op), config=config)
    assert str(raised.value) == (
        f"{name_of(op)}: config: a cluster of 2 CTAs needs as many SMs, but num_sms is 1"
    )


def batches(problem: Problem, batch: int) -> tuple[list[Any], list[Any]]:
    """Operands and index arrays of several problems of one size, each list stacked, and apart."""
    apart = [
        (*problem.operands(seed=seed), *problem.random_arrays(np.random.default_rng(seed)))
        for seed in range(batch)
    ]
    return [np.stack(parts) for parts in zip(*apart, strict=True)], apart


def grouped_calls(function: Callable[..., Any], *arguments: Any) -> int:
    """How many operations of this package stand in the jaxpr."""
    equations = jax.make_jaxpr(function)(*arguments).eqns
    return sum("grouped_gemm" in str(equation.primitive) for equation in equations)


@pytest.mark.parametrize(
    "problem",
    [Problem("contiguous", 3, 512, 24, 144), Problem("masked", 3, 40, 24, 144)],
    ids=str,
)
def test_vmap_of_everything_is_more_groups(problem: Problem) -> None:
    stacked, apart = batches(problem, 3)
    function = jax.vmap(functools.partial(call, problem.op))
    d = jax.jit(function)(*stacked)
    for i, (*operands, array) in enumerate(apart):
        check(d[i], problem.oracle(numerics.GroupedOperands(*operands), array))
    assert grouped_calls(function, *stacked) == 1


def test_vmap_of_no_rows() -> None:
    stacked, _ = batches(Problem("contiguous", 3, 0, 24, 144), 2)
    d = jax.vmap(functools.partial(call, "contiguous"))(*stacked)
    assert d.shape == (2, 0, 24)


def test_vmap_of_rows_is_more_rows() -> None:
    problem = Problem("contiguous", 3, 512, 24, 144)
    (a, sfa, _, _, indices), apart = batches(problem, 2)
    b, sfb = apart[0][2:4]
    rows = jax.vmap(functools.partial(call, "contiguous"), in_axes=(0, 0, None, None, 0))
    d = jax.jit(rows)(a, sfa, b, sfb, indices)
    for i in range(2):
        operands = numerics.GroupedOperands(a[i], sfa[i], b, sfb)
        check(d[i], problem.oracle(operands, indices[i]))
    assert grouped_calls(rows, a, sfa, b, sfb, indices) == 1


@pytest.mark.parametrize("op", ["contiguous", "masked"])
def test_nested_vmaps_are_one_launch(op: str) -> None:
    """A batch of rows, for the contiguous operation of rows alone, around one of everything."""
    problem = Problem(op, 3, 256 if op == "contiguous" else 40, 24, 144)
    stacked, apart = batches(problem, 6)
    both = [x.reshape(2, 3, *x.shape[1:]) for x in stacked]
    outer = (0,) * 5
    if op == "contiguous":  # the same matrices for each of the outer batch
        both[2:4] = [x[0] for x in both[2:4]]
        outer = (0, 0, None, None, 0)
    function = jax.vmap(jax.vmap(functools.partial(call, op)), outer)
    d = np.asarray(jax.jit(function)(*both))
    for i in range(2):
        for j in range(3):
            a, sfa, b, sfb, array = apart[3 * i + j]
            if op == "contiguous":
                b, sfb = apart[j][2:4]
            check(d[i, j], problem.oracle(numerics.GroupedOperands(a, sfa, b, sfb), array))
    assert grouped_calls(function, *both) == 1


@pytest.mark.parametrize(
    ("op", "rows", "in_axes", "wanted"),
    [
        ("contiguous", 512, (None, None, 0, 0, 0), "a batch of a and sfa"),
        ("contiguous", 500, (0, 0, None, None, 0), "whose m is a multiple of 128"),
        ("masked", 40, (0, 0, None, None, None), "a batch of a, sfa, b and sfb together"),
        ("ragged", 40, (0, 0, 0, 0, 0), "no batch, because rows of no group"),
    ],
    ids=str,
)
def test_other_vmaps_are_refused(
    op: str, rows: int, in_axes: tuple[int | None, ...], wanted: str
) -> None:
    stacked, apart = batches(Problem(op, 3, rows, 24, 144), 2)
    arguments = [
        all_of_it if axis == 0 else one
        for all_of_it, one, axis in zip(stacked, apart[0], in_axes, strict=True)
    ]
    with pytest.raises(NotImplementedError) as raised:
        jax.vmap(functools.partial(call, op), in_axes=in_axes)(*arguments)
    message = str(raised.value)
    assert message.startswith(f"{name_of(op)}: jax.vmap takes ")
    assert wanted in message
    assert f"got the batch axes a {in_axes[0]}, sfa {in_axes[1]}, b {in_axes[2]}" in message


@every_op
@pytest.mark.parametrize("transform", [jax.grad, lambda f: lambda x: jax.jvp(f, (x,), (x,))])
def test_gradients_are_refused(op: str, transform: Any) -> None:
    good = arguments(op)
    sfa = jnp.asarray(good.pop("sfa"))

    def total(sfa: jax.Array) -> jax.Array:
        return by_name(op, **good, sfa=sfa).astype(jnp.float32).sum()

    message = f"^{name_of(op)}: there is no derivative; .* with jax.custom_vjp"
    with pytest.raises(NotImplementedError, match=message):
        transform(total)(sfa)


# --- Lowering for CUDA ---------------------------------------------------------------------------


def cuda_call(function: Callable[..., Any], *arguments: Any) -> str:
    """The one custom call of a function that is lowered for CUDA."""
    (line,) = cuda_calls(cuda_text(function, *arguments))
    return line


NO_OPTIONS = dict.fromkeys(
    [
        "num_sms",
        "fill_zero",
        "a_type",
        "b_type",
        "batch_invariant",
        *GemmConfig.__dataclass_fields__,
    ],
    0,
)
SIZES = {"num_groups": 3, "n": 136, "k": 144}
B = "tensor<408x144xf8E4M3FN>, tensor<6x2xf32>"
CALLS = {
    "contiguous": (
        Problem("contiguous", 3, 129, 136, 144),
        {"op": 1, "m": 129, "expected_m": 0},
        f"tensor<129x144xf8E4M3FN>, tensor<129x2xf32>, {B}, tensor<129xi32>, tensor<2xi32>",
        "tensor<129x136xbf16>",
    ),
    "masked": (
        Problem("masked", 3, 15, 136, 144),
        {"op": 2, "m": 45, "expected_m": 15},
        f"tensor<45x144xf8E4M3FN>, tensor<45x2xf32>, {B}, tensor<3xi32>",
        "tensor<45x136xbf16>",
    ),
    "ragged": (
        Problem("ragged", 3, 37, 136, 144),
        {"op": 3, "m": 37, "expected_m": 0},
        f"tensor<37x144xf8E4M3FN>, tensor<37x2xf32>, {B}, tensor<3xi32>, tensor<1xi32>",
        "tensor<37x136xbf16>",
    ),
}


@pytest.mark.parametrize(
    ("problem", "sizes", "operands", "result"), CALLS.values(), ids=list(CALLS)
)
def test_cuda_call(problem: Problem, sizes: dict[str, int], operands: str, result: str) -> None:
    function = functools.partial(call, problem.op, fill="undefined")
    text = cuda_text(function, *problem.shapes())
    (line,) = cuda_calls(text)
    assert problem_of(line) == SIZES | NO_OPTIONS | sizes
    assert line.endswith(f": ({operands}) -> {result}")
    # SFA alone comes m-contiguous.
    rank_2 = "dense<[1, 0]> : tensor<2xindex>"
    layouts = [rank_2, "dense<[0, 1]> : tensor<2xindex>", rank_2, rank_2]
    layouts += ["dense<0> : tensor<1xindex>"] * (operands.count("tensor<") - 4)
    assert f"operand_layouts = [{', '.join(layouts)}], result_layouts = [{rank_2}]" in line
    assert "stablehlo.dot" not in text
    assert text.count("stablehlo.reduce(") == (problem.op == "contiguous")


@every_op
def test_cuda_call_carries_config_and_sm_limit(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GemmConfig(128, 48, 5, 2, cluster_n=2, raster_m=3)
    monkeypatch.setattr("jax_deepgemm.device._num_sms_limit", 66)
    function = functools.partial(call, op, config=config, fill="undefined")
    problem = problem_of(cuda_call(function, *CALLS[op][0].shapes()))
    assert {name: problem[name] for name in GemmConfig.__dataclass_fields__} == vars(config)
    assert problem["num_sms"] == 66


@pytest.mark.parametrize(("expected_m", "carried"), [(1, 1), (7, 7), (15, 15), (16, 15)])
def test_cuda_call_carries_masked_options(expected_m: int, carried: int) -> None:
    for fill, fill_zero in (("undefined", 0), ("zero", 1)):
        function = functools.partial(call, "masked", expected_m=expected_m, fill=fill)
        problem = problem_of(cuda_call(function, *CALLS["masked"][0].shapes()))
        assert (problem["expected_m"], problem["fill_zero"]) == (carried, fill_zero)


def test_cuda_call_of_a_slice_of_the_groups() -> None:
    *operands, _ = CALLS["ragged"][0].shapes()
    sizes, offset = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((12,), ()))
    line = cuda_call(ragged, *operands, sizes, offset)
    assert problem_of(line)["num_groups"] == 3
    assert "tensor<12xi32>, tensor<1xi32>) ->" in line


@every_op
def test_cuda_call_is_the_same_with_64_bit_types(op: str) -> None:
    shapes = CALLS[op][0].shapes()
    narrow = cuda_call(functools.partial(call, op), *shapes)
    with jax.enable_x64(True):
        wide = cuda_call(functools.partial(call, op), *shapes)
    assert re.sub(r"%\w+", "", narrow) == re.sub(r"%\w+", "", wide)


# --- jax.export ----------------------------------------------------------------------------------


@every_op
def test_export(op: str) -> None:
    allowed = [export.DisabledSafetyCheck.custom_call(name) for name in ffi.CUSTOM_CALL_TARGETS]
    exported = export.export(
        jax.jit(functools.partial(call, op)), platforms=["cuda"], disabled_checks=allowed
    )(*CALLS[op][0].shapes())
    assert exported.platforms == ("cuda",)
    (line,) = cuda_calls(exported.mlir_module())
    assert problem_of(line)["num_groups"] == 3


@every_op
@pytest.mark.parametrize("dimension", ["num_groups", "m", "n", "k"])
def test_symbolic_dimension_is_refused(op: str, dimension: str) -> None:
    (symbol,) = export.symbolic_shape("size")
    sizes: dict[str, Any] = {"num_groups": 3, "m": 128, "n": 136, "k": 144} | {dimension: symbol}
    g, m, n, k = sizes.values()
    rows = (g, m) if op == "masked" else (m,)
    k_blocks = (k + 127) // 128
    shapes = [
        jax.ShapeDtypeStruct((*rows, k), E4M3),
        jax.ShapeDtypeStruct((*rows, k_blocks), F32),
        jax.ShapeDtypeStruct((g, n, k), E4M3),
        jax.ShapeDtypeStruct((g, (n + 127) // 128, k_blocks), F32),
        jax.ShapeDtypeStruct((m if op == "contiguous" else g,), I32),
    ]
    function = functools.partial(call, op, **({"expected_m": 1} if op == "masked" else {}))
    with pytest.raises(ValueError) as raised:
        export.export(jax.jit(function), platforms=["cuda"])(*shapes)
    name = "max_m" if (op, dimension) == ("masked", "m") else dimension
    assert str(raised.value) == f"{name_of(op)}: {name} must be static, got size"


@pytest.mark.parametrize("op", ["contiguous", "masked"])
def test_symbolic_batch_is_refused(op: str) -> None:
    (batch,) = export.symbolic_shape("b")
    shapes = [
        jax.ShapeDtypeStruct((batch, *x.shape), x.dtype)
        for x in Problem(op, 3, 128, 136, 144).shapes()
    ]
    function = functools.partial(call, op, **({"expected_m": 1} if op == "masked" else {}))
    with pytest.raises(ValueError, match=f"^{name_of(op)}: batch must be static, got b"):
        export.export(jax.jit(jax.vmap(function)), platforms=["cuda"])(*shapes)


# --- shard_map -----------------------------------------------------------------------------------


def cpu_mesh() -> jax.sharding.Mesh:
    """All eight CPU devices of this machine on one axis, also where JAX's default is a GPU."""
    return jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu"))


def experts(a: Any, sfa: Any, b: Any, sfb: Any, sizes: Any) -> jax.Array:
    """This device's part: its own experts, on all rows."""
    return ragged(a, sfa, b, sfb, sizes, jax.lax.axis_index("x") * b.shape[0])


def test_shard_map_of_experts_adds_up() -> None:
    problem = Problem("ragged", 16, 300, 136, 144)
    operands = problem.operands(seed=15)
    (sizes,) = problem.random_arrays(np.random.default_rng(15))

    def body(*shards: Any) -> jax.Array:
        d = experts(*shards)
        assert jax.typeof(d).manual_axis_type.varying == {"x"}
        # A row of no expert here is zero: the sum rounds nothing.
        return jax.lax.psum(d.astype(jnp.float32), "x").astype(jnp.bfloat16)

    split = jax.shard_map(
        body, mesh=cpu_mesh(), in_specs=(P(), P(), P("x"), P("x"), P()), out_specs=P()
    )
    d = jax.jit(split)(*operands, sizes)
    np.testing.assert_array_equal(d, jitted("ragged")(*operands, sizes))
    check(d, problem.oracle(operands, sizes))


# Which of (a, sfa, b, sfb, array) are split over the devices.
SPLITS = {
    "contiguous": (P("x"), P("x"), P(), P(), P("x")),
    "masked": (P("x"), P("x"), P("x"), P("x"), P("x")),
    "ragged": (P(), P(), P(None, "x"), P(None, "x"), P()),
}


@every_op
def test_shard_map(op: str) -> None:
    problem = Problem(op, 8, 8 if op == "masked" else 8 * 128, 1024, 144)
    operands = problem.operands(seed=16)
    arrays = problem.random_arrays(np.random.default_rng(16))
    out = P(None, "x") if op == "ragged" else P("x")
    split = jax.shard_map(
        functools.partial(call, op), mesh=cpu_mesh(), in_specs=SPLITS[op], out_specs=out
    )
    check(jax.jit(split)(*operands, *arrays), problem.oracle(operands, *arrays))


@every_op
def test_shard_map_result_varies_like_every_operand(op: str) -> None:
    # Each operand alone makes the result vary, the array of groups, too.
    problem = Problem(op, 8, 8 if op == "masked" else 8 * 128, 1024, 144)
    shapes = problem.shapes()
    for split in range(len(shapes)):

        def body(*operands: jax.Array, split: int = split) -> jax.Array:
            cast = list(operands)
            cast[split] = jax.lax.pcast(cast[split], "x", to="varying")
            d = call(op, *cast)
            assert jax.typeof(d).manual_axis_type.varying == {"x"}
            return d

        with pytest.raises(ValueError, match="require replication"):
            jax.eval_shape(
                jax.shard_map(body, mesh=cpu_mesh(), in_specs=P(), out_specs=P()), *shapes
            )
    whole = jax.shard_map(functools.partial(call, op), mesh=cpu_mesh(), in_specs=P(), out_specs=P())
    operands = problem.operands(seed=17)
    arrays = problem.random_arrays(np.random.default_rng(17))
    check(jax.jit(whole)(*operands, *arrays), problem.oracle(operands, *arrays))


def test_shard_map_lowers_one_call_per_device() -> None:
    problem = Problem("ragged", 16, 300, 136, 144)
    body = jax.shard_map(
        experts, mesh=cpu_mesh(), in_specs=(P(), P(), P("x"), P("x"), P()), out_specs=P("x")
    )
    line = cuda_call(body, *problem.shapes())
    assert problem_of(line)["num_groups"] == 2
    assert "tensor<16xi32>, tensor<1xi32>) ->" in line
