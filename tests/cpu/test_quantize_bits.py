"""Every quantiser gives the bits of the NumPy oracle, whatever the input; forms, types, tracing."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_deepgemm
from jax_deepgemm import QuantizedArray
from jax_deepgemm.ffi import _native
from jax_deepgemm.quantize_reference import exp_negative, fill_invalid_rows, silu_mul
from tests import quantize_oracle as oracle
from tests.lowering import cuda_text

scale_modes = pytest.mark.parametrize("power_of_two", [False, True], ids=["amax", "pow2"])
every_op = pytest.mark.parametrize("op", oracle.OPS)
SIZED_OPS = ("quantize_per_token", "silu_mul_quantize")


def run(op: str, x: Any, **options: Any) -> list[jax.Array]:
    """The operation's arrays, flat."""
    return jax.tree.leaves(getattr(jax_deepgemm, op)(x, **options))


def check(op: str, x: np.ndarray[Any, Any], fp8: str, power_of_two: bool) -> None:
    wanted = oracle.expected(op, x, fp8, power_of_two)
    got = run(op, x, dtype=fp8, power_of_two=power_of_two)
    for name, array, want in zip(("values", "scales") * 2, got, wanted, strict=False):
        oracle.assert_same_bits(array, want, name)
    assert len(got) == len(wanted)


@every_op
@scale_modes
@pytest.mark.parametrize("fp8", oracle.FP8_TYPES)
@pytest.mark.parametrize("dtype", oracle.INPUT_TYPES)
def test_bits(op: str, power_of_two: bool, fp8: str, dtype: str) -> None:
    rng = np.random.default_rng(1)
    for kind in oracle.KINDS:
        check(op, oracle.inputs(kind, (131, 400), dtype, rng), fp8, power_of_two)


@every_op
@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(1, 2), (3, 128), (2, 129, 130), (2, 2, 5, 258), (128, 256), (17, 6)]),
    kind=st.sampled_from(oracle.KINDS),
    dtype=st.sampled_from(oracle.INPUT_TYPES),
    fp8=st.sampled_from(oracle.FP8_TYPES),
    power_of_two=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_bits_of_any_shape(
    op: str,
    shape: tuple[int, ...],
    kind: str,
    dtype: str,
    fp8: str,
    power_of_two: bool,
    seed: int,
) -> None:
    x = oracle.inputs(kind, shape, dtype, np.random.default_rng(seed))
    check(op, x, fp8, power_of_two)


@every_op
@pytest.mark.parametrize("kind", ["huge", "mixed", "tiny"])
@pytest.mark.parametrize("fp8", oracle.FP8_TYPES)
def test_finite_input_saturates(op: str, kind: str, fp8: str) -> None:
    x = oracle.inputs(kind, (130, 260), "float32", np.random.default_rng(2))
    x[0, :2] = oracle.LARGEST_FLOAT, -oracle.LARGEST_FLOAT
    x[1] = oracle.LARGEST_FLOAT  # gate times up overflows
    for array in run(op, x, dtype=fp8):
        assert np.isfinite(np.asarray(array).astype(np.float32)).all()


def test_silu_mul_is_accurate() -> None:
    gate = np.concatenate([np.linspace(-90, 90, 20001), np.geomspace(1e-30, 1e30, 1001)])
    gate = np.concatenate([gate, -gate]).astype(np.float32)
    up = np.full_like(gate, 1.5)
    got = np.asarray(silu_mul(jnp.asarray(np.concatenate([gate, up]))), np.float64)
    g = gate.astype(np.float64)
    with np.errstate(over="ignore"):
        wanted = g / (1 + np.exp(-g)) * 1.5
    # Below exp(-87.3) it is zero.
    bound = (2.0**-16.7 + 2.0**-24 * np.abs(g)) * np.abs(wanted) + 2e-36
    assert (np.abs(got - wanted) <= bound).all()


def test_exp_negative_of_zero_is_one() -> None:
    assert exp_negative(jnp.zeros(1)).tolist() == [1.0]
    assert exp_negative(jnp.asarray([np.inf, np.nan, 1e30, 88.0])).tolist() == [0.0] * 4


def test_exp_negative_has_the_bits_of_the_oracle_for_every_fraction() -> None:
    """All 2**16 fractions, with several exponents; it falls, also from one exponent to the next."""
    x = (np.arange(4 * 2**16) / np.log2(np.e) / 2**16).astype(np.float32)
    x = np.concatenate([x, x + np.float32(20), np.linspace(80, 90, 2**16, dtype=np.float32)])
    got = np.asarray(jax.jit(exp_negative)(x))
    oracle.assert_same_bits(got, oracle.exp_negative(x))
    assert (np.diff(got[: 4 * 2**16]) <= 0).all()
    relative = np.abs(got / np.exp(-x.astype(np.float64)) - 1)[x < 87.3]
    assert (relative <= 2.0**-16.7 + 2.0**-24 * x[x < 87.3]).all()


# --- Rows that do not count ----------------------------------------------------------------------


@pytest.mark.parametrize("op", SIZED_OPS)
@pytest.mark.parametrize("counts", [[0, 1, 5], [7, -3, 100], [2, 2**31 - 1, 7]], ids=str)
def test_masked(op: str, counts: list[int]) -> None:
    rng = np.random.default_rng(3)
    x = oracle.inputs("mixed", (3, 7, 300), "bfloat16", rng)
    valid = np.arange(7) < np.clip(counts, 0, 7)[:, None]
    dirty = np.where(valid[..., None], x, np.nan).astype(x.dtype)
    got = run(op, dirty, masked_m=np.asarray(counts, np.int32))
    wanted = oracle.expected(op, x, "float8_e4m3fn", False)
    for array, want, rest in zip(got, wanted, (0, 1), strict=True):
        oracle.assert_same_bits(np.asarray(array)[valid], want[valid])
        assert (np.asarray(array)[~valid] == rest).all()


@pytest.mark.parametrize("op", SIZED_OPS)
@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        ([], 0),
        ([0, 0], 0),
        ([3, -8, 4], 7),
        ([3, 0, 10], 13),
        ([9, 9], 13),
        ([2**31 - 1, 2**31 - 1, 2**31 - 1], 13),
    ],
    ids=str,
)
def test_ragged(op: str, sizes: list[int], count: int) -> None:
    x = oracle.inputs("mixed", (13, 300), "bfloat16", np.random.default_rng(4))
    dirty = x.copy()
    dirty[count:] = np.nan
    got = run(op, dirty, group_sizes=np.asarray(sizes, np.int32))
    wanted = oracle.expected(op, x, "float8_e4m3fn", False)
    for array, want, rest in zip(got, wanted, (0, 1), strict=True):
        oracle.assert_same_bits(np.asarray(array)[:count], want[:count])
        assert (np.asarray(array)[count:] == rest).all()


def test_vmap_of_sizes_is_more_matrices() -> None:
    x = oracle.inputs("normal", (2, 3, 7, 128), "bfloat16", np.random.default_rng(5))
    counts = np.asarray([[0, 1, 5], [7, 2, 3]], np.int32)

    def masked(x: Any, masked_m: Any) -> QuantizedArray:
        return jax_deepgemm.quantize_per_token(x, masked_m=masked_m)

    for axes in ((0, 0), (0, None), (None, 0)):
        operands = [o if a == 0 else o[0] for o, a in zip((x, counts), axes, strict=True)]
        got = jax.vmap(masked, axes)(*operands)
        for i in range(2):
            wanted = masked(*(o[i] if a == 0 else o for o, a in zip(operands, axes, strict=True)))
            for array, want in zip(got, wanted, strict=True):
                oracle.assert_same_bits(array[i], np.asarray(want))
        text = cuda_text(lambda x, m, axes=axes: jax.vmap(masked, axes)(x, m), *operands)
        assert text.count(f"custom_call @{_native.QUANTIZE_TARGET}(") == 1
        assert "batch = 6 : i64" in text


@pytest.mark.parametrize("check", [jax.debug_nans, jax.debug_infs])
@pytest.mark.parametrize("op", SIZED_OPS)
@pytest.mark.parametrize("sizes", ["masked_m", "group_sizes"])
def test_undefined_rows_are_zero_where_values_are_checked(op: str, sizes: str, check: Any) -> None:
    """They may hold a NaN that JAX would find, and nobody else reads."""
    x = jnp.ones((3, 5, 256) if sizes == "masked_m" else (15, 256), jnp.bfloat16)
    counts = np.array([2, 0, 9], np.int32)

    def selects() -> int:
        text = cuda_text(lambda x, counts: run(op, x, **{sizes: counts}), x, counts)
        assert text.count(f"custom_call @{_native.QUANTIZE_TARGET}(") == 1
        return text.count("stablehlo.select")

    assert selects() == 0
    with check(True):
        assert selects() == 2  # of values and of scales
        assert "stablehlo.select" not in cuda_text(lambda x: run(op, x), x)
        batched = jax.ShapeDtypeStruct((2, *x.shape), x.dtype)
        mapped = jax.vmap(lambda x: run(op, x, **{sizes: counts}))
        assert cuda_text(mapped, batched).count("stablehlo.select") == 2


@pytest.mark.parametrize("fp8", oracle.FP8_TYPES)
def test_filling_rows_changes_no_bit_of_the_others(fp8: str) -> None:
    codes = np.arange(2 * 4 * 128, dtype=np.uint32).astype(np.uint8).reshape(2, 4, 128)  # all
    scales = np.full((2, 4, 1), np.nan, np.float32)
    sizes = np.array([[1, 2], [-1, 0]], np.int32)
    got = fill_invalid_rows(codes.view(fp8), jnp.asarray(scales), jnp.asarray(sizes))
    valid = np.array([[True, True, True, False], [False] * 4])[..., None]
    oracle.assert_same_bits(got[0], np.where(valid, codes, 0).astype(np.uint8).view(fp8))
    oracle.assert_same_bits(got[1], np.where(valid, scales, np.float32(1)))


@pytest.mark.parametrize("op", SIZED_OPS)
def test_debug_nans(op: str) -> None:
    x = oracle.inputs("normal", (2, 4, 256), "float32", np.random.default_rng(15))
    x[0, 3] = np.nan
    array = jnp.asarray(x)  # which JAX would check, too
    with jax.debug_nans(True):
        for function in (run, jax.jit(run, static_argnums=0)):
            function(op, array, masked_m=np.array([3, 4], np.int32))
            with pytest.raises(FloatingPointError, match="nan"):
                function(op, array, masked_m=np.array([4, 4], np.int32))


# --- Errors --------------------------------------------------------------------------------------

X = jax.ShapeDtypeStruct((4, 128), "bfloat16")
GROUPS = jax.ShapeDtypeStruct((3, 4, 128), "bfloat16")
INT = np.zeros(3, np.int32)


@pytest.mark.parametrize("op", SIZED_OPS)
@pytest.mark.parametrize(
    ("x", "options", "kind", "message"),
    [
        (
            X,
            {"dtype": jnp.bfloat16},
            TypeError,
            "dtype must be float8_e4m3fn or float8_e5m2, got bf",
        ),
        (X, {"dtype": "fp8"}, TypeError, "dtype must be float8_e4m3fn or float8_e5m2, got 'fp8'"),
        (X, {"masked_m": INT}, ValueError, r"x must be \[num_groups, max_m, 2?[kf]\] where masked"),
        (GROUPS, {"group_sizes": INT}, ValueError, r"x must be \[m, 2?[kf]\] where group_sizes is"),
        (GROUPS, {"masked_m": INT[:2]}, ValueError, r"masked_m must be int32\[3\] \(num_groups\)"),
        (GROUPS, {"masked_m": INT.astype("i8")}, TypeError, "masked_m must be int32, got int64"),
        (GROUPS, {"masked_m": 3}, TypeError, "masked_m must be an array, got int"),
        (X, {"masked_m": INT, "group_sizes": INT}, ValueError, "must not be given together"),
    ],
    ids=str,
)
def test_bad_arguments(
    op: str, x: Any, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=f"^{op}: .*{message}"):
        jax.eval_shape(lambda x: getattr(jax_deepgemm, op)(x, **options), x)


def test_silu_mul_wants_pairs_of_columns() -> None:
    message = r"^silu_mul_quantize: x must be \[\.\.\., m, 2f\], gate and up .*float32\[4, 129\]"
    with pytest.raises(ValueError, match=message):
        jax_deepgemm.silu_mul_quantize(np.zeros((4, 129), np.float32))


@every_op
def test_gradients_are_refused(op: str) -> None:
    def loss(x: jax.Array) -> jax.Array:
        return run(op, x)[1].sum()

    with pytest.raises(NotImplementedError, match=f"^{op}: there is no derivative"):
        jax.grad(loss)(jnp.ones((4, 128)))


@every_op
def test_symbolic_dimension_is_refused(op: str) -> None:
    (m,) = jax.export.symbolic_shape("m")
    x = jax.ShapeDtypeStruct((m, 128), "bfloat16")
    with pytest.raises(ValueError, match=rf"^{op}: x.shape\[0\] must be static, got m"):
        jax.eval_shape(getattr(jax_deepgemm, op), x)


# --- On CUDA, seen from here ---------------------------------------------------------------------


@every_op
@pytest.mark.parametrize("shape", [(0, 128), (128, 0), (2, 0, 16)], ids=str)
def test_empty_lowers_for_cuda(op: str, shape: tuple[int, ...]) -> None:
    x = jax.ShapeDtypeStruct(shape, "float32")
    assert cuda_text(lambda x: run(op, x), x)


@every_op
@pytest.mark.parametrize("fp8", oracle.FP8_TYPES)
def test_cuda_call(op: str, fp8: str) -> None:
    x = jax.ShapeDtypeStruct((2, 3, 72, 512), "float16")
    text = cuda_text(lambda x: run(op, x, dtype=fp8, power_of_two=True), x)
    (call,) = [
        line for line in text.splitlines() if f"custom_call @{_native.QUANTIZE_TARGET}(" in line
    ]
    flat = op in SIZED_OPS
    k = 256 if op == "silu_mul_quantize" else 512
    for name, value in {
        "batch": 1 if flat else 6,
        "rows": 432 if flat else 72,
        "k": k,
        "op": oracle.OPS.index(op),
        "input": 1,
        "output": oracle.FP8_TYPES.index(fp8),
        "power_of_two": 1,
        "num_sizes": 0,
    }.items():
        assert re.search(rf"\b{name} = {value} : i64", call), name
    tokens = f"tensor<432x{k}xf8{'E4M3FN' if '4' in fp8 else 'E5M2'}>"
    columns = f"tensor<3072x72xf8{'E4M3FN' if '4' in fp8 else 'E5M2'}>"
    results = {
        "quantize_per_token": [tokens, "tensor<432x4xf32>"],
        "quantize_per_block": [tokens, "tensor<6x4xf32>"],
        "quantize_per_token_transposed": [columns, "tensor<3072x1xf32>"],
        "quantize_per_token_both": [tokens, "tensor<432x4xf32>", columns, "tensor<3072x1xf32>"],
        "silu_mul_quantize": [tokens, "tensor<432x2xf32>"],
    }[op]
    assert call.endswith(f"-> ({', '.join(results)})")
    major, minor = "dense<[1, 0]> : tensor<2xindex>", "dense<[0, 1]> : tensor<2xindex>"
    layouts = [major, major if op == "quantize_per_block" else minor] * (len(results) // 2)
    assert f"result_layouts = [{', '.join(layouts)}]" in call


def between(text: str) -> list[str]:
    """The operations of a program that are neither calls of ours nor reshapes."""
    operations = re.findall(r"= (?:\"?)(stablehlo\.\w+|call)", text)
    return [o for o in operations if o not in ("stablehlo.custom_call", "stablehlo.reshape")]


GEMMS = {
    "dense": lambda lhs, rhs, counts: jax_deepgemm.gemm_fp8_fp8_bf16_nt(
        lhs, jax.tree.map(lambda x: x[0], rhs)
    ),
    "masked": lambda lhs, rhs, counts: jax_deepgemm.m_grouped_gemm_fp8_fp8_bf16_nt_masked(
        lhs, rhs, counts, 64
    ),
    "ragged": lambda lhs, rhs, counts: jax_deepgemm.m_grouped_gemm_fp8_fp8_bf16_nt_ragged(
        lhs, rhs, counts
    ),
}


@pytest.mark.parametrize("op", SIZED_OPS)
@pytest.mark.parametrize("form", GEMMS)
@pytest.mark.parametrize("m", [64, 67])
def test_nothing_between_quantizer_and_gemm(op: str, form: str, m: int) -> None:
    rows = (3, m) if form == "masked" else (3 * m,)
    x = jax.ShapeDtypeStruct((*rows, 512), "bfloat16")
    k = 256 if op == "silu_mul_quantize" else 512
    rhs = QuantizedArray(
        jax.ShapeDtypeStruct((3, 256, k), "float8_e4m3fn"),
        jax.ShapeDtypeStruct((3, 2, k // 128), "float32"),
    )
    counts = jax.ShapeDtypeStruct((3,), "int32")

    def program(x: Any, rhs: Any, counts: Any) -> jax.Array:
        argument = {"masked": "masked_m", "ragged": "group_sizes"}.get(form)
        quantizer = getattr(jax_deepgemm, op)
        lhs = quantizer(x, **({argument: counts} if argument else {}))
        return GEMMS[form](lhs, rhs, counts)

    text = cuda_text(program, x, rhs, counts)
    assert text.count("stablehlo.custom_call") == 2
    allowed = {"dense": ["stablehlo.slice"] * 2, "ragged": ["stablehlo.constant"]}.get(form, [])
    found = between(text)
    assert [o for o in found if o not in allowed] == [], found
    # The scales leave one call as they enter the other: m contiguous, through nothing or through
    # reshapes that XLA folds, since rows of all groups stay together.
    producer, consumer = [line for line in text.splitlines() if "stablehlo.custom_call" in line]
    assert "result_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<[0, 1]>" in producer
    assert "operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<[0, 1]>" in consumer
    scales = re.findall(r"tensor<(\w+)xf32>", producer.split("->")[1])
    assert f"tensor<{scales[0]}xf32>" in consumer


def test_export_for_cuda() -> None:
    x = jax.ShapeDtypeStruct((64, 512), "bfloat16")
    checks = [
        jax.export.DisabledSafetyCheck.custom_call(name)
        for name in jax_deepgemm.ffi.CUSTOM_CALL_TARGETS
    ]
    function = jax.jit(jax_deepgemm.silu_mul_quantize)
    exported = jax.export.export(function, platforms=["cuda"], disabled_checks=checks)(x)
    restored = jax.export.deserialize(exported.serialize())
    assert restored.out_tree == jax.tree.structure(QuantizedArray(0, 0))
    assert [tuple(aval.shape) for aval in restored.out_avals] == [(64, 256), (64, 2)]


# --- Meshes --------------------------------------------------------------------------------------


@every_op
def test_shard_map(op: str) -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    x = oracle.inputs("normal", (8, 128, 256), "bfloat16", np.random.default_rng(6))
    function = jax.shard_map(lambda x: run(op, x), mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    for array, want in zip(
        jax.jit(function)(x), oracle.expected(op, x, "float8_e4m3fn", False), strict=True
    ):
        oracle.assert_same_bits(array, want)


def test_shard_map_result_varies_like_both_operands() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    x, counts = np.ones((3, 4, 128), np.float32), np.zeros((8, 3), np.int32)

    def local(x: Any, counts: Any) -> jax.Array:
        return jax_deepgemm.quantize_per_token(x, masked_m=counts[0]).scales

    with pytest.raises(ValueError, match=r"varying|replicat"):
        jax.shard_map(local, mesh=mesh, in_specs=(P(), P("x")), out_specs=P())(x, counts)


@every_op
def test_sharded_rows_give_the_same_bits(op: str) -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    x = oracle.inputs("mixed", (1024, 512), "bfloat16", np.random.default_rng(7))
    sharded = jax.device_put(x, jax.NamedSharding(mesh, P("x", None)))
    got = jax.jit(lambda x: run(op, x))(sharded)
    for array, want in zip(got, oracle.expected(op, x, "float8_e4m3fn", False), strict=True):
        oracle.assert_same_bits(array, want)


@every_op
def test_cuda_programs_of_several_devices(op: str) -> None:
    """XLA partitions jnp, and cannot partition a custom call; in shard_map it need not."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    x = jnp.ones((1024, 512), jnp.bfloat16)
    sharded = jax.device_put(x, jax.NamedSharding(mesh, P("x", None)))

    def function(x: jax.Array) -> Any:
        return run(op, x)

    mapped = jax.shard_map(function, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    call = f"custom_call @{_native.QUANTIZE_TARGET}("
    assert call not in cuda_text(function, sharded)
    assert call in cuda_text(function, x)
    assert call in cuda_text(mapped, sharded)


@pytest.mark.parametrize("op", ["quantize_per_token", "quantize_per_block"])
def test_explicit_mesh_of_one_gpu(op: str) -> None:
    """Where a reshape to a matrix would need to know how to split it."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,))
    x = jax.ShapeDtypeStruct((2, 8, 128), "bfloat16", sharding=NamedSharding(mesh, P(None, "x")))
    assert f"custom_call @{_native.QUANTIZE_TARGET}(" in cuda_text(lambda x: run(op, x), x)


@pytest.mark.parametrize(
    ("op", "shape", "spec", "expected"),
    [
        ("quantize_per_block", (512, 512), P("x", None), P(None, None)),
        ("quantize_per_block", (1024, 512), P("x", None), P("x", None)),
        ("quantize_per_token", (16, 512), P(None, "x"), P(None, None)),
        ("quantize_per_token", (16, 512), P("x", None), P("x", None)),
        ("quantize_per_token_transposed", (512, 64), P("x", None), P(None, None)),
    ],
)
def test_scales_stay_whole_where_shards_cut_blocks(
    op: str, shape: tuple[int, ...], spec: P, expected: P
) -> None:
    devices = jax.devices("cpu")[:8]
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,), devices=devices)
    x = jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, spec))
    result = jax.eval_shape(getattr(jax_deepgemm, op), x)
    assert result.scales.sharding.spec == expected


def assert_bits_of_one_device(op: str, got: Any, x: Any, **options: Any) -> None:
    wanted = run(op, x, **options)
    for array, want in zip(jax.tree.leaves(got), wanted, strict=True):
        oracle.assert_same_bits(array, np.asarray(want))


def explicit_mesh(**axes: int) -> Mesh:
    kinds = (AxisType.Explicit,) * len(axes)
    devices = jax.devices("cpu")[:8]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=devices)


K, M, BOTH = P(None, "x"), P("x", None), P("x", "y")  # `x` has four devices and `y` two
CUT = [  # (op, shape of x, how it is split, how values and scales are)
    ("quantize_per_token", (16, 256), K, K, P(None, None)),
    ("quantize_per_token", (16, 584), K, K, P(None, None)),  # 146 a shard
    ("quantize_per_token", (16, 20), K, K, P(None, None)),
    ("quantize_per_token", (2, 16, 256), P(None, "y", "x"), P(None, "y", "x"), P(None, "y", None)),
    ("quantize_per_block", (256, 256), M, M, P(None, None)),
    ("quantize_per_block", (160, 256), M, M, P(None, None)),
    ("quantize_per_block", (256, 512), K, K, K),
    ("quantize_per_block", (128, 256), K, K, P(None, None)),
    ("quantize_per_block", (256, 512), BOTH, BOTH, P(None, "y")),
    ("quantize_per_token_transposed", (256, 64), M, K, P(None, None)),
    ("quantize_per_token_transposed", (584, 64), BOTH, P("y", "x"), P("y", None)),
    ("quantize_per_token_both", (256, 512), M, M, M),
    ("quantize_per_token_both", (256, 256), K, K, P(None, None)),
    ("silu_mul_quantize", (16, 512), K, K, P(None, None)),
    ("silu_mul_quantize", (16, 1024), K, K, K),
    ("silu_mul_quantize", (16, 1168), K, K, P(None, None)),
    ("silu_mul_quantize", (16, 12), K, P(None, None), P(None, None)),  # f is 6, which 4 divide not
]


@pytest.mark.parametrize(("op", "shape", "split", "values", "scales"), CUT, ids=str)
def test_explicit_shards_that_cut_blocks(
    op: str, shape: tuple[int, ...], split: P, values: P, scales: P
) -> None:
    x = oracle.inputs("mixed", shape, "bfloat16", np.random.default_rng(8))
    sharded = jax.device_put(x, NamedSharding(explicit_mesh(x=4, y=2), split))
    for function in (run, jax.jit(run, static_argnums=0)):
        got = function(op, sharded)
        assert_bits_of_one_device(op, got, x)
        assert [jax.typeof(array).sharding.spec for array in got[:2]] == [values, scales]
    types = jax.eval_shape(lambda x: run(op, x), sharded)
    assert [array.sharding for array in types] == [jax.typeof(array).sharding for array in got]
    assert "custom_call @jax_deepgemm" not in cuda_text(lambda x: run(op, x), sharded)


COLLECTIVE = re.compile(r"= (?:bf16|f\w+|u\w+)\[([\d,]+)\]\S* (all-[\w-]+|collective-[\w-]+)\(")


@pytest.mark.parametrize(
    ("k", "communicated"),
    [(512, []), (256, [("16,1", "all-reduce"), ("16,2", "all-gather")])],
    ids=["whole-blocks", "half-blocks"],
)
def test_explicit_shards_exchange_the_largest_magnitudes_alone(
    k: int, communicated: list[tuple[str, str]]
) -> None:
    x = np.ones((16, k), np.float32)
    sharded = jax.device_put(x, NamedSharding(explicit_mesh(x=4, y=2), K))
    text = jax.jit(jax_deepgemm.quantize_per_token).lower(sharded).compile().as_text()
    assert COLLECTIVE.findall(text) == communicated


def test_explicit_vmap_where_shards_cut_blocks() -> None:
    x = oracle.inputs("mixed", (4, 288, 16), "bfloat16", np.random.default_rng(9))
    mesh = explicit_mesh(x=4, y=2)
    sharded = jax.device_put(x, NamedSharding(mesh, P("x", "y")))

    def function(x: Any) -> list[jax.Array]:
        return run("quantize_per_token_transposed", x)

    with jax.set_mesh(mesh):
        got = jax.jit(jax.vmap(function))(sharded)
    assert_bits_of_one_device("quantize_per_token_transposed", got, x)
    assert jax.typeof(got[0]).sharding.spec == P("x", None, "y")


def test_shard_map_over_some_axes_where_shards_cut_blocks() -> None:
    x = oracle.inputs("mixed", (16, 288), "bfloat16", np.random.default_rng(10))
    mesh = explicit_mesh(x=4, y=2)
    mapped = jax.shard_map(
        lambda x: run("quantize_per_token", x),
        mesh=mesh,
        in_specs=P("x"),
        out_specs=P("x"),
        axis_names={"x"},
    )
    got = jax.jit(mapped)(jax.device_put(x, NamedSharding(mesh, P("x", "y"))))
    assert_bits_of_one_device("quantize_per_token", got, x)
    assert [jax.typeof(array).sharding.spec for array in got] == [P("x", "y"), P("x", None)]


def test_auto_axis_beside_an_explicit_one() -> None:
    x = oracle.inputs("mixed", (16, 256), "bfloat16", np.random.default_rng(11))
    kinds = (AxisType.Explicit, AxisType.Auto)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=kinds, devices=jax.devices("cpu")[:8])
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, P("y", "x")))
        got = jax.jit(lambda x: run("quantize_per_token", x))(sharded)
    assert_bits_of_one_device("quantize_per_token", got, x)
    # What the automatic axis splits stays split.
    assert [array.sharding.shard_shape(array.shape) for array in got] == [(8, 64), (8, 2)]


@pytest.mark.parametrize("op", SIZED_OPS)
@pytest.mark.parametrize(
    ("split", "split_sizes"),
    [
        (P("x"), P("x")),
        (P(("x", "y")), P("x")),
        (P("y", "x"), P("x")),
        (P("x", None, "y"), P()),
        (None, P("x")),
    ],
    ids=str,
)
def test_explicit_types_of_masked_m(op: str, split: P | None, split_sizes: P) -> None:
    x = oracle.inputs("mixed", (8, 8, 256), "bfloat16", np.random.default_rng(12))
    counts = np.array([3, 0, 8, 9, -1, 5, 6, 7], np.int32)
    mesh = explicit_mesh(x=4, y=2)
    operands = (
        x if split is None else jax.device_put(x, NamedSharding(mesh, split)),
        jax.device_put(counts, NamedSharding(mesh, split_sizes)),
    )
    got = jax.jit(lambda x, masked_m: run(op, x, masked_m=masked_m))(*operands)
    assert_bits_of_one_device(op, got, x, masked_m=counts)


@pytest.mark.parametrize("op", SIZED_OPS)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_group_sizes_may_be_split(op: str, kind: AxisType) -> None:
    x = oracle.inputs("mixed", (32, 256), "bfloat16", np.random.default_rng(13))
    sizes = np.array([3, 0, 8, 9, -1, 5, 0, 2], np.int32)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,), devices=jax.devices("cpu")[:8])
    operands = [jax.device_put(array, NamedSharding(mesh, P("x"))) for array in (x, sizes)]
    got = jax.jit(lambda x, sizes: run(op, x, group_sizes=sizes))(*operands)
    assert_bits_of_one_device(op, got, x, group_sizes=sizes)


def test_gemm_of_explicit_shards_that_cut_blocks() -> None:
    rng = np.random.default_rng(14)
    x, w = (oracle.inputs("normal", (rows, 256), "bfloat16", rng) for rows in (16, 64))

    def linear(x: Any, w: Any) -> jax.Array:
        lhs, rhs = jax_deepgemm.quantize_per_token(x), jax_deepgemm.quantize_per_block(w)
        return jax_deepgemm.gemm_fp8_fp8_bf16_nt(lhs, rhs)

    sharding = NamedSharding(explicit_mesh(x=4, y=2), K)
    got = jax.jit(linear)(*(jax.device_put(array, sharding) for array in (x, w)))
    # Parts of the sum over k are rounded to bfloat16.
    wanted = np.asarray(linear(x, w), np.float32)
    assert np.abs(np.asarray(got, np.float32) - wanted).max() < 2**-7 * np.abs(wanted).max()
