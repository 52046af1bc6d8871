"""The quantisers' kernels on a Hopper GPU: bits, foreign memory, repeatability, GEMMs."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_deepgemm
from jax_deepgemm import QuantizedArray
from jax_deepgemm.quantize_reference import jitted
from tests import numerics
from tests import quantize_oracle as oracle
from tests.gpu import support
from tests.gpu.support import SEED

every_op = pytest.mark.parametrize("op", oracle.OPS)
SIZED_OPS = ("quantize_per_token", "silu_mul_quantize")

# Sizes with wide and narrow tiles (few rows or many), with wide and single loads and stores, edges
# in both directions, several matrices.
SHAPES = [(1, 2), (3, 128), (64, 1024), (65, 400), (2, 3, 72, 512), (2, 131, 258), (272, 384)]
LARGE = (1000, 4608)  # the widest tiles of all operations


@functools.cache
def compiled(op: str, fp8: str, power_of_two: bool, sized: str = "") -> Callable[..., Any]:
    """The jitted operation; scales of tokens come back in front, as they lie in memory."""

    def call(x: jax.Array, *sizes: jax.Array) -> list[jax.Array]:
        function = getattr(jax_deepgemm, op)
        arguments = {sized: sizes[0]} if sized else {}
        leaves = jax.tree.leaves(function(x, dtype=fp8, power_of_two=power_of_two, **arguments))
        return [jnp.moveaxis(leaf, -1, 0) if i % 2 else leaf for i, leaf in enumerate(leaves)]

    return jax.jit(call)


def run(op: str, x: Any, fp8: str = "float8_e4m3fn", power_of_two: bool = False) -> list[Any]:
    results = compiled(op, fp8, power_of_two)(x)
    return [np.moveaxis(np.asarray(r), 0, -1) if i % 2 else r for i, r in enumerate(results)]


def check(op: str, x: Any, fp8: str, power_of_two: bool, what: str) -> None:
    wanted = oracle.expected(op, x, fp8, power_of_two)
    for i, (got, want) in enumerate(zip(run(op, x, fp8, power_of_two), wanted, strict=True)):
        oracle.assert_same_bits(got, want, f"{what}, {('values', 'scales')[i % 2]} {i // 2}")


@every_op
@pytest.mark.parametrize("power_of_two", [False, True], ids=["amax", "pow2"])
@pytest.mark.parametrize("fp8", oracle.FP8_TYPES)
@pytest.mark.parametrize("dtype", oracle.INPUT_TYPES)
def test_bits(op: str, power_of_two: bool, fp8: str, dtype: str) -> None:
    rng = np.random.default_rng(SEED)
    for shape in SHAPES:
        for kind in oracle.KINDS:
            x = oracle.inputs(kind, shape, dtype, rng)
            check(op, x, fp8, power_of_two, f"{kind} {shape}")
    x = oracle.inputs("ties", LARGE, dtype, rng)
    x[[0, 500, 999], [0, 300, 4607]] = np.nan, np.inf, -np.inf
    check(op, x, fp8, power_of_two, f"ties {LARGE}")


@pytest.mark.parametrize("op", ["quantize_per_token", "quantize_per_block"])
def test_reciprocals_of_every_scale(op: str) -> None:
    """Blocks whose largest magnitudes have all exponents and many fractions."""
    rng = np.random.default_rng(SEED)
    amax = rng.integers(0x00800000, 0x7F800000, 2**16, np.uint32).view(np.float32)
    x = (amax[:, None] * rng.uniform(-1, 1, (2**16, 128))).astype(np.float32)
    x[:, 0] = amax
    if op == "quantize_per_block":
        x = x.reshape(-1, 128, 128)
        x[:, 1:] = x[:, :1] * rng.uniform(-1, 1, (len(x), 127, 1)).astype(np.float32)
    check(op, x, "float8_e4m3fn", False, "any amax")


def test_silu_mul_of_every_bf16() -> None:
    """All gates, NaN and Inf among them, with three factors."""
    gate = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(-1, 128)
    rng = np.random.default_rng(SEED)
    for up in (np.ones(gate.shape), rng.standard_normal(gate.shape), np.full(gate.shape, 3e38)):
        x = np.concatenate([gate, up.astype(ml_dtypes.bfloat16)], axis=1)
        check("silu_mul_quantize", x, "float8_e4m3fn", False, "every gate")


@every_op
@pytest.mark.parametrize("shape", [(0, 128), (128, 0), (2, 0, 16)], ids=str)
def test_empty(op: str, shape: tuple[int, ...]) -> None:
    check(op, np.zeros(shape, np.float32), "float8_e4m3fn", False, "empty")


@every_op
def test_dtypes_and_devices_of_results(op: str) -> None:
    leaves = jax.tree.leaves(getattr(jax_deepgemm, op)(jnp.ones((64, 256), jnp.bfloat16)))
    assert [leaf.dtype for leaf in leaves] == [jnp.float8_e4m3fn, jnp.float32] * (len(leaves) // 2)
    assert all(leaf.devices() == {jax.devices()[0]} for leaf in leaves)


# --- Rows that do not count ----------------------------------------------------------------------

POISON = 0x55  # of every byte of values; as float32, 1.5e13


def poisoned(results: list[Any]) -> list[jax.Array]:
    """Arrays of the same shapes that are full of POISON."""
    arrays = []
    for result in results:
        count = np.prod(result.shape).item() * result.dtype.itemsize
        host = np.full(count, POISON, np.uint8).view(result.dtype).reshape(result.shape)
        arrays.append(jax.device_put(host))
    return arrays


def run_into_poison(op: str, sized: str, x: Any, sizes: Any) -> list[np.ndarray[Any, Any]]:
    """Runs an operation with its results in donated memory that is full of POISON."""
    function = compiled(op, "float8_e4m3fn", False, sized)
    shapes = jax.eval_shape(function, x, sizes)
    poison = poisoned(shapes)
    pointers = [array.unsafe_buffer_pointer() for array in poison]
    jitted_call = jax.jit(
        lambda _values, _scales, x, sizes: function(x, sizes),
        donate_argnums=(0, 1),
        keep_unused=True,
    )
    results = jitted_call(*poison, x, sizes)
    # Otherwise the test would show nothing.
    assert [array.unsafe_buffer_pointer() for array in results] == pointers
    values, scales = map(np.asarray, results)
    return [values, np.moveaxis(scales, 0, -1)]


def check_rows(
    results: list[np.ndarray[Any, Any]], wanted: list[Any], valid: np.ndarray[Any, Any]
) -> None:
    """Valid rows have the oracle's bits, and the others are still POISON."""
    for got, want in zip(results, wanted, strict=True):
        oracle.assert_same_bits(got[valid], want[valid])
        rest = np.ascontiguousarray(got[~valid]).view(np.uint8)
        assert (rest == POISON).all(), f"{(rest != POISON).sum()} bytes of invalid rows are written"


@pytest.mark.parametrize("op", SIZED_OPS)
@pytest.mark.parametrize("dtype", oracle.INPUT_TYPES)
@pytest.mark.parametrize("k", [256, 258, 4096])
@pytest.mark.parametrize("max_m", [16, 100, 164])
def test_masked_rows_are_left_alone(op: str, dtype: str, k: int, max_m: int) -> None:
    rng = np.random.default_rng(SEED)
    counts = np.array([0, 1, 15, max_m, max_m + 7, -3, 2**31 - 1, rng.integers(max_m)], np.int32)
    x = oracle.inputs("mixed", (8, max_m, k), dtype, rng)
    valid = np.arange(max_m) < np.clip(counts, 0, max_m)[:, None]
    dirty = np.where(valid[..., None], x, np.nan).astype(x.dtype)
    wanted = oracle.expected(op, x, "float8_e4m3fn", False)
    check_rows(run_into_poison(op, "masked_m", dirty, counts), wanted, valid)


@pytest.mark.parametrize("op", SIZED_OPS)
def test_many_groups_of_which_few_have_rows(op: str) -> None:
    """More than the 32 that a warp looks up at once, and more tiles than CTAs."""
    rng = np.random.default_rng(SEED)
    groups, max_m = 300, 96
    counts = rng.integers(1, max_m + 9, groups) * (rng.random(groups) < 0.3)
    counts[[0, 31, 32, 299]] = 0, max_m, 1, 40
    x = oracle.inputs("mixed", (groups, max_m, 1024), "bfloat16", rng)
    valid = np.arange(max_m) < np.clip(counts, 0, max_m)[:, None]
    dirty = np.where(valid[..., None], x, np.nan).astype(x.dtype)
    wanted = oracle.expected(op, x, "float8_e4m3fn", False)
    check_rows(run_into_poison(op, "masked_m", dirty, counts.astype(np.int32)), wanted, valid)


@pytest.mark.parametrize("op", SIZED_OPS)
def test_more_tiles_than_ctas(op: str) -> None:
    """All of whose rows count, of three matrices with several sizes each."""
    rng = np.random.default_rng(SEED)
    x = oracle.inputs("normal", (3, 2000, 4096), "bfloat16", rng)
    sizes = np.array([[700, 1300, -1], [0, 1999, 0], [2**31 - 1, 0, 5]], np.int32)
    function = jax.vmap(
        lambda x, sizes: compiled(op, "float8_e4m3fn", False, "group_sizes")(x, sizes)
    )
    values, scales = map(np.asarray, jax.jit(function)(x, sizes))
    valid = np.arange(2000) < np.array([2000, 1999, 2000])[:, None]
    wanted = oracle.expected(op, x, "float8_e4m3fn", False)
    oracle.assert_same_bits(values[valid], wanted[0][valid])
    oracle.assert_same_bits(np.moveaxis(scales, 1, -1)[valid], wanted[1][valid])


@pytest.mark.parametrize("op", SIZED_OPS)
@pytest.mark.parametrize(
    "sizes",
    [
        [],
        [0] * 300,
        [1],
        [100, 0, 33, 0, 0, 5],
        [3] * 257,
        [-5, 40, -(2**31), 60],
        [2**31 - 1] * 40,
        [999, 1],
    ],
    ids=lambda sizes: f"{len(sizes)}-sizes-{sum(sizes)}",
)
def test_ragged_rows_are_left_alone(op: str, sizes: list[int]) -> None:
    m = 1000
    x = oracle.inputs("mixed", (m, 512), "bfloat16", np.random.default_rng(SEED))
    valid = np.arange(m) < min(m, sum(max(0, size) for size in sizes))
    dirty = np.where(valid[:, None], x, np.nan).astype(x.dtype)
    wanted = oracle.expected(op, x, "float8_e4m3fn", False)
    results = run_into_poison(op, "group_sizes", dirty, np.asarray(sizes, np.int32))
    check_rows(results, wanted, valid)


def neighbours(shape: tuple[int, ...]) -> list[jax.Array]:
    """Three FP8 arrays full of POISON, one right behind the other in device memory."""
    nbytes = np.prod(shape).item()
    arrays: dict[int, jax.Array] = {}
    for _ in range(64):
        (array,) = poisoned([jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn)])
        arrays[array.unsafe_buffer_pointer()] = array
        for start in arrays:
            run = [arrays[p] for p in (start + i * nbytes for i in range(3)) if p in arrays]
            if len(run) == 3:
                return run
    pytest.fail("the allocator put no three of 64 arrays side by side")


@every_op
@pytest.mark.parametrize("shape", [(72, 512), (64, 260), (2, 36, 384)], ids=str)
def test_neighbouring_memory_is_left_alone(op: str, shape: tuple[int, ...]) -> None:
    """Guards in front of the values and right behind them."""
    x = oracle.inputs("normal", shape, "bfloat16", np.random.default_rng(SEED))
    function = compiled(op, "float8_e4m3fn", False)
    values = jax.eval_shape(function, x)[0]
    if np.prod(values.shape) % 256:
        pytest.skip("the values do not fill the allocator's blocks of 256 bytes")
    before, middle, after = neighbours(values.shape)
    pointer = middle.unsafe_buffer_pointer()
    jitted_call = jax.jit(lambda _poison, x: function(x), donate_argnums=0, keep_unused=True)
    result = jitted_call(middle, x)[0]
    assert result.unsafe_buffer_pointer() == pointer, "XLA did not write into the donated array"
    oracle.assert_same_bits(result, oracle.expected(op, x, "float8_e4m3fn", False)[0])
    for guard in (before, after):
        assert (np.asarray(guard).view(np.uint8) == POISON).all()


# --- Again and again -----------------------------------------------------------------------------


@every_op
def test_same_bits_again_and_beside_other_work(op: str) -> None:
    x = jnp.asarray(oracle.inputs("bad", LARGE, "bfloat16", np.random.default_rng(SEED)))
    function = compiled(op, "float8_e4m3fn", False)
    first = [support.bits(array) for array in function(x)]
    with support.busy_gpu():
        for _ in range(20):
            assert [support.bits(array) for array in function(x)] == first


@every_op
def test_vmap_and_jit_agree(op: str) -> None:
    x = jnp.asarray(oracle.inputs("mixed", (3, 130, 512), "bfloat16", np.random.default_rng(SEED)))
    function = getattr(jax_deepgemm, op)
    wanted = [support.bits(leaf) for leaf in jax.tree.leaves(jax.jit(function)(x))]
    moved = jnp.moveaxis(x, 0, 1)
    for got in (function(x), jax.vmap(function)(x), jax.jit(jax.vmap(function, 1))(moved)):
        assert [support.bits(leaf) for leaf in jax.tree.leaves(got)] == wanted


def test_captured_in_a_graph_and_replayed() -> None:
    """A chain long enough that XLA captures it; other inputs and sizes replay it."""

    @jax.jit
    def chain(x: jax.Array, sizes: jax.Array) -> jax.Array:
        for _ in range(8):
            q = jax_deepgemm.quantize_per_token(x, group_sizes=sizes)
            valid = jnp.arange(x.shape[0])[:, None] < sizes.sum()
            x = jnp.where(valid, q.dequantize(), x.astype(jnp.float32)).astype(jnp.bfloat16)
        return x

    rng = np.random.default_rng(SEED)
    for count in (0, 7, 100, 64, 100):
        x = rng.standard_normal((100, 512)).astype(ml_dtypes.bfloat16)
        wanted = x
        for _ in range(8):
            values, scales = oracle.quantize(wanted, 1, "float8_e4m3fn", False)
            back = (values.astype(np.float32) * scales.repeat(128, 1)).astype(ml_dtypes.bfloat16)
            wanted = np.where(np.arange(100)[:, None] < count, back, wanted)
        got = chain(jnp.asarray(x), jnp.asarray([count // 2, count - count // 2], jnp.int32))
        np.testing.assert_array_equal(
            np.asarray(got).view(np.uint16), wanted.astype(ml_dtypes.bfloat16).view(np.uint16)
        )


# --- Into a GEMM ---------------------------------------------------------------------------------


def product(lhs: Any, rhs: Any) -> np.ndarray[Any, Any]:
    a, sfa, b, sfb = (np.asarray(x) for x in (*lhs, *rhs))
    return numerics.dense_oracle(numerics.DenseOperands(a, sfa, b, sfb))


@pytest.mark.parametrize("m", [1, 3, 64, 130, 1000])
@pytest.mark.parametrize("op", SIZED_OPS)
def test_quantize_and_gemm_in_one_program(op: str, m: int) -> None:
    n, k = 776, 656
    rng = np.random.default_rng(SEED)
    columns = 2 * k if op == "silu_mul_quantize" else k
    x = rng.standard_normal((m, columns)).astype(ml_dtypes.bfloat16)
    w = rng.standard_normal((n, k)).astype(ml_dtypes.bfloat16)
    quantizer = getattr(jax_deepgemm, op)

    def layer(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax_deepgemm.gemm_fp8_fp8_bf16_nt(quantizer(x), jax_deepgemm.quantize_per_block(w))

    lhs = oracle.expected(op, x, "float8_e4m3fn", False)
    rhs = oracle.expected("quantize_per_block", w, "float8_e4m3fn", False)
    support.check(jax.jit(layer)(x, w), product(lhs, rhs))


@pytest.mark.parametrize("op", SIZED_OPS)
def test_program_is_two_kernels(op: str) -> None:
    """After all of XLA's passes nothing stands between the quantiser and the GEMM."""
    columns = 4096 if op == "silu_mul_quantize" else 2048
    x = jax.ShapeDtypeStruct((4096, columns), jnp.bfloat16)
    weight = QuantizedArray(
        jax.ShapeDtypeStruct((7168, 2048), jnp.float8_e4m3fn),
        jax.ShapeDtypeStruct((56, 16), jnp.float32),
    )
    quantizer = getattr(jax_deepgemm, op)
    layer = jax.jit(lambda x, w: jax_deepgemm.gemm_fp8_fp8_bf16_nt(quantizer(x), w))
    text = layer.lower(x, weight).compile().as_text()
    entry = text[text.index("ENTRY") :]
    operations = re.findall(r"= \S.*? (\w[\w-]*)\(", entry)
    allowed = {"parameter", "get-tuple-element", "bitcast", "tuple"}
    assert [o for o in operations if o not in allowed] == ["custom-call"] * 2, entry


def test_masked_experts() -> None:
    """SwiGLU between two grouped GEMMs, rows that do not count undefined all along."""
    groups, max_m, hidden, inter = 4, 48, 512, 256
    rng = np.random.default_rng(SEED)
    counts = np.array([0, 48, 5, 33], np.int32)
    x = rng.standard_normal((groups, max_m, hidden)).astype(ml_dtypes.bfloat16)
    gate_up = rng.standard_normal((groups, 2 * inter, hidden)).astype(np.float32) / 16
    down = rng.standard_normal((groups, hidden, inter)).astype(np.float32)

    def experts(x: Any, gate_up: Any, down: Any, counts: Any) -> jax.Array:
        gemm = jax_deepgemm.m_grouped_gemm_fp8_fp8_bf16_nt_masked
        hidden = gemm(jax_deepgemm.quantize_per_token(x, masked_m=counts), gate_up, counts, 24)
        act = jax_deepgemm.silu_mul_quantize(hidden, masked_m=counts)
        return gemm(act, down, counts, 24, fill="zero")

    weights = [jax_deepgemm.quantize_per_block(w) for w in (gate_up, down)]
    d = np.asarray(jax.jit(experts)(x, *weights, counts))
    for group, count in enumerate(counts):
        lhs = oracle.quantize(x[group, :count], 1, "float8_e4m3fn", False)
        middle = product(lhs, [w[group] for w in weights[0]]).astype(ml_dtypes.bfloat16)
        act = oracle.expected("silu_mul_quantize", middle, "float8_e4m3fn", False)
        wanted = product(act, [w[group] for w in weights[1]])
        got = d[group, :count].astype(np.float64)
        # The first product's bf16 rounding may differ by a unit, and FP8 may follow.
        assert np.linalg.norm(got - wanted) <= 0.01 * max(np.linalg.norm(wanted), 1e-9)
        assert not d[group, count:].any()


def test_xla_version_is_close() -> None:
    """What XLA makes of the jnp version on a GPU; its reciprocal need not be to the bit."""
    x = oracle.inputs("normal", LARGE, "bfloat16", np.random.default_rng(SEED))
    for op in oracle.OPS:
        plain = jitted[op](x, dtype=jnp.float8_e4m3fn, power_of_two=False)
        for i, (got, want) in enumerate(zip(plain, run(op, x), strict=True)):
            got, want = (np.asarray(array).astype(np.float32) for array in (got, want))
            if i % 2:
                np.testing.assert_allclose(got, want, rtol=1e-6)
            else:
                assert np.mean(got != want) < 1e-3
