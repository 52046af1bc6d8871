"""Quantisation: scales, round trip, edge blocks, values that are not finite, errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepgemm import quantize, quantize_call
from jax_deepgemm.quantize import Quantized, quantize_per_block, quantize_per_token
from tests import numerics

TINY = 2.0**-126  # the smallest normal float32
LARGEST = float(np.finfo(np.float32).max)
# (function, rows of a block): the two public functions differ in nothing else.
RECIPES = [
    pytest.param(quantize_per_token, 1, id="per_token"),
    pytest.param(quantize_per_block, 128, id="per_block"),
]
recipes = pytest.mark.parametrize(("quantize_fn", "block_rows"), RECIPES)
scale_modes = pytest.mark.parametrize("power_of_two", [False, True], ids=["amax", "power_of_two"])


def block_amax(x, block_rows):
    """The largest finite magnitude of each block, float64, in loops that cannot be wrong."""
    x = np.asarray(x).astype(np.float64)
    rows, k = x.shape
    amax = np.zeros((numerics.ceil_div(rows, block_rows), numerics.ceil_div(k, 128)))
    for i, j in np.ndindex(*amax.shape):
        block = x[i * block_rows : (i + 1) * block_rows, j * 128 : (j + 1) * 128]
        amax[i, j] = np.abs(block[np.isfinite(block)]).max(initial=0.0)
    return amax


def assert_round_trip(x, quantized, block_rows):
    """Checks |x - values * scales| against what e4m3fn allows, value by value."""
    values, scales = quantized
    x = np.asarray(x).astype(np.float64)
    back = numerics.dequantize64(values, scales, block_rows=block_rows)
    scale = numerics.dequantize64(np.ones(x.shape), scales, block_rows=block_rows)
    # Half a unit in the last place: 2**-4 of a normal number, 2**-10 of the scale below 2**-6.
    # 1 + 2**-20 is room for the float32 rounding of the scale and of the scaled value.
    bound = np.maximum(np.abs(x) * 2.0**-4, scale * 2.0**-10) * (1 + 2.0**-20)
    assert (np.abs(x - back) <= bound).all()


def bitwise_equal(x, y):
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


@recipes
@scale_modes
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("rows", "k"), [(1, 1), (3, 128), (128, 256), (130, 300), (257, 144)], ids=str
)
def test_round_trip(quantize_fn, block_rows, power_of_two, dtype, rows, k):
    x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, k)), dtype)
    values, scales = quantized = quantize_fn(x, power_of_two=power_of_two)
    assert isinstance(quantized, Quantized)
    assert (values.dtype, scales.dtype) == (jnp.float8_e4m3fn, jnp.float32)
    assert values.shape == x.shape
    amax = block_amax(x, block_rows)
    assert scales.shape == amax.shape
    assert_round_trip(x, quantized, block_rows)
    if power_of_two:
        np.testing.assert_array_equal(scales, np.exp2(np.ceil(np.log2(amax / 448))))
    else:
        np.testing.assert_array_max_ulp(np.asarray(scales), (amax / 448).astype("f4"), maxulp=1)
        # The largest magnitude of every block becomes the largest e4m3fn number.
        top = block_amax(values, block_rows)
        np.testing.assert_array_equal(top, np.full_like(top, 448.0))


@recipes
@scale_modes
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 140),
    k=st.integers(1, 300),
    exponents=st.tuples(st.integers(-126, 126), st.integers(0, 60)),
    seed=st.integers(0, 2**32 - 1),
)
@example(rows=1, k=1, exponents=(-126, 0), seed=0)
@example(rows=129, k=129, exponents=(126, 0), seed=0)
def test_round_trip_of_any_magnitude(
    quantize_fn, block_rows, power_of_two, rows, k, exponents, seed
):
    low, spread = exponents
    rng = np.random.default_rng(seed)
    exponent = np.minimum(rng.integers(low, low + spread + 1, (rows, k)), 126)
    x = np.ldexp(rng.uniform(1, 2, (rows, k)) * rng.choice([-1, 1], (rows, k)), exponent)
    x = x.astype(np.float32)
    values, scales = quantized = quantize_fn(x, power_of_two=power_of_two)
    assert np.isfinite(np.asarray(values).astype(np.float32)).all()
    assert (np.asarray(scales) >= TINY).all()
    assert_round_trip(x, quantized, block_rows)
    if power_of_two:
        np.testing.assert_array_equal(np.frexp(np.asarray(scales))[0], 0.5)
        amax = block_amax(x, block_rows)
        assert (scales * 448.0 >= amax).all()  # rounded up...
        assert ((scales * 224.0 < amax) | (scales == TINY)).all()  # ...and not further


@pytest.mark.parametrize(
    ("amax", "scale"),
    [
        (448.0, 1.0),
        (np.nextafter(np.float32(448), np.float32(np.inf)), 2.0),
        (np.nextafter(np.float32(448), np.float32(0)), 1.0),
        (224.0, 0.5),
        (1.0, 2.0**-8),
        (1.75, 2.0**-8),
        (np.nextafter(np.float32(1.75), np.float32(2)), 2.0**-7),
        (LARGEST, 2.0**120),
        (448 * TINY, TINY),
        (449 * TINY, 2 * TINY),
        (TINY, TINY),
    ],
)
def test_power_of_two_scale_is_exact(amax, scale):
    _, scales = quantize_per_token(np.full((1, 128), -amax, np.float32), power_of_two=True)
    assert scales.tolist() == [[scale]]


@recipes
@scale_modes
def test_e4m3_numbers_come_back_unchanged(quantize_fn, block_rows, power_of_two):
    # Every finite e4m3fn number, 448 among them in each block: the scale is exactly 1.
    numbers = np.arange(256, dtype=np.uint8).view(numerics.E4M3)
    x = np.tile(numbers[np.isfinite(numbers.astype(np.float32))][:128], (130, 2))
    x[:, [0, 128]] = 448
    values, scales = quantize_fn(x.astype(np.float32), power_of_two=power_of_two)
    assert (np.asarray(scales) == 1).all()
    assert bitwise_equal(np.asarray(values), x)


@recipes
@scale_modes
def test_zero_blocks_have_scale_one(quantize_fn, block_rows, power_of_two):
    x = np.random.default_rng(2).standard_normal((256, 256), dtype=np.float32)
    x[:128, 128:] = 0
    x[0, 130] = -0.0
    values, scales = quantize_fn(x, power_of_two=power_of_two)
    zero_blocks = (slice(None, 128 // block_rows), 1)
    assert (np.asarray(scales)[zero_blocks] == 1).all()
    assert (np.asarray(values)[:128, 128:] == 0).all()
    x[:128, 128:] = 1  # the other blocks do not depend on it
    others = quantize_fn(x, power_of_two=power_of_two)
    np.testing.assert_array_equal(scales[:, 0], others.scales[:, 0])
    np.testing.assert_array_equal(values[128:], others.values[128:])


@recipes
@scale_modes
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_not_finite_becomes_nan_alone(quantize_fn, block_rows, power_of_two, bad, dtype):
    x = np.random.default_rng(3).standard_normal((200, 300)).astype(dtype)
    hit = np.zeros(x.shape, bool)
    hit[[0, 0, 130, 199], [0, 127, 200, 299]] = True
    hit[7, 128:256] = True  # a whole 1 x 128 block
    zeroed = np.where(hit, 0, x).astype(dtype)
    values, scales = quantize_fn(np.where(hit, bad, x).astype(dtype), power_of_two=power_of_two)
    expected = quantize_fn(zeroed, power_of_two=power_of_two)
    # All others are what they would be if the bad values were zeros.
    np.testing.assert_array_equal(scales, expected.scales)
    np.testing.assert_array_equal(np.isnan(values), hit)
    np.testing.assert_array_equal(np.asarray(values)[~hit], np.asarray(expected.values)[~hit])


@recipes
@scale_modes
def test_edge_blocks_ignore_what_lies_beyond(quantize_fn, block_rows, power_of_two):
    x = np.random.default_rng(4).standard_normal((200, 300), dtype=np.float32)
    x[128:, 256:] *= 1e-3  # an edge block with an amax of its own
    cut = quantize_fn(x, power_of_two=power_of_two)
    padded = quantize_fn(np.pad(x, ((0, 56), (0, 84))), power_of_two=power_of_two)
    assert bitwise_equal(np.asarray(cut.values), np.asarray(padded.values)[:200, :300])
    rows = cut.scales.shape[0]
    assert bitwise_equal(np.asarray(cut.scales), np.asarray(padded.scales)[:rows])


@recipes
@scale_modes
@pytest.mark.parametrize("amax", [0.0, 1e-45, TINY / 2, TINY, 3 * TINY, 1e-36, 3.2e38])
def test_extreme_blocks_stay_finite(quantize_fn, block_rows, power_of_two, amax):
    x = np.zeros((2, 130), np.float32)
    x[0, :2] = amax, -amax
    values, scales = quantize_fn(x, power_of_two=power_of_two)
    assert np.isfinite(np.asarray(values).astype(np.float32)).all()
    assert np.isfinite(np.asarray(scales)).all()
    assert (np.asarray(scales) >= TINY).all()
    back = numerics.dequantize64(values, scales, block_rows=block_rows)
    assert np.abs(back - x).max() <= max(amax * 2.0**-4, TINY)
    if amax < TINY:
        assert (np.asarray(scales) == 1).all()
        assert (back == 0).all()


@recipes
@scale_modes
@pytest.mark.parametrize("shape", [(0, 128), (128, 0), (0, 0), (2, 0, 16), (0, 3, 130)], ids=str)
def test_empty_arrays(quantize_fn, block_rows, power_of_two, shape):
    values, scales = quantize_fn(jnp.zeros(shape), power_of_two=power_of_two)
    *batch, rows, k = shape
    assert values.shape == shape
    assert scales.shape == (
        *batch,
        numerics.ceil_div(rows, block_rows),
        numerics.ceil_div(k, 128),
    )


@recipes
@scale_modes
def test_jit_vmap_and_batch_dimensions_agree_bitwise(quantize_fn, block_rows, power_of_two):
    function = partial(quantize_fn, power_of_two=power_of_two)
    x = np.random.default_rng(5).standard_normal((2, 3, 130, 200)).astype(np.float32)
    x *= np.exp2(np.arange(-100, 100))
    x[0, 0, 0, 0] = np.nan
    with jax.disable_jit():
        expected = function(x)
    singly = [[function(matrix) for matrix in matrices] for matrices in x]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *[m for ms in singly for m in ms])
    for got in (
        function(x),
        jax.jit(function)(x),
        jax.vmap(jax.vmap(function))(x),
        jax.vmap(function, in_axes=1, out_axes=1)(x),
        Quantized(*(s.reshape(2, 3, *s.shape[1:]) for s in stacked)),
    ):
        assert isinstance(got, Quantized)
        for array, wanted in zip(got, expected, strict=True):
            assert bitwise_equal(np.asarray(array), np.asarray(wanted))


@recipes
@pytest.mark.parametrize("spec", [P("x", None), P(None, "x")], ids=["rows", "k"])
def test_explicit_sharding_of_rows_or_k_is_kept(quantize_fn, block_rows, spec):
    mesh = AbstractMesh((4,), ("x",), axis_types=(AxisType.Explicit,))  # needs no four devices
    with jax.sharding.use_abstract_mesh(mesh):
        x = jax.ShapeDtypeStruct((512, 1024), "bfloat16", sharding=NamedSharding(mesh, spec))
        values, scales = jax.eval_shape(quantize_fn, x)
    assert values.sharding.spec == spec
    assert scales.sharding.spec == spec


@recipes
def test_float64_is_rounded_to_float32_first(quantize_fn, block_rows):
    x = np.random.default_rng(6).standard_normal((130, 200))
    x[0, 0] = 1e300  # beyond float32
    with np.errstate(over="ignore"):
        rounded = x.astype(np.float32)
    expected = quantize_fn(rounded)
    with jax.enable_x64(True):
        got = quantize_fn(jnp.asarray(x))
        assert (got.values.dtype, got.scales.dtype) == (jnp.float8_e4m3fn, jnp.float32)
    for array, wanted in zip(got, expected, strict=True):
        assert bitwise_equal(np.asarray(array), np.asarray(wanted))
    assert np.isnan(np.asarray(got.values)[0, 0])


@pytest.mark.parametrize("name", ["quantize_per_token", "quantize_per_block"])
@pytest.mark.parametrize(
    ("shape", "dtype", "exception"),
    [
        pytest.param((4, 128), "int32", TypeError, id="int32"),
        pytest.param((4, 128), "bool", TypeError, id="bool"),
        pytest.param((4, 128), "complex64", TypeError, id="complex64"),
        pytest.param((4, 128), "float8_e4m3fn", TypeError, id="already_fp8"),
        pytest.param((128,), "float32", ValueError, id="vector"),
        pytest.param((), "bfloat16", ValueError, id="scalar"),
    ],
)
def test_bad_input_raises_while_tracing(name, shape, dtype, exception):
    rows = {"quantize_per_token": "m", "quantize_per_block": "n"}[name]
    message = (
        rf"^{name}: x must be bfloat16, float16, float32 or float64 \[\.\.\., {rows}, k\], "
        rf"got {dtype}\[{', '.join(map(str, shape))}\](\n|$)"
    )
    with pytest.raises(exception, match=message):
        jax.eval_shape(getattr(quantize, name), jax.ShapeDtypeStruct(shape, dtype))


@pytest.mark.parametrize("name", ["quantize_per_token", "silu_mul_quantize"])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        pytest.param(None, "an array, got NoneType", id="none"),
        pytest.param("x", "an array, got str", id="string"),
        pytest.param({"x": 1.0}, "an array, got dict", id="dict"),
        pytest.param([[1.0, 2.0], [3.0]], "an array, got list", id="ragged_list"),
        pytest.param((np.ones((4, 128)),) * 2, "an array, got tuple", id="pair"),
        pytest.param(np.array([["x"]]), r"bfloat16, .*, got str32\[1, 1\]", id="of_strings"),
        pytest.param(np.array([[None]]), r"bfloat16, .*, got object\[1, 1\]", id="of_objects"),
    ],
)
def test_x_that_is_no_array_of_numbers_raises(name, x, message):
    with pytest.raises(TypeError, match=rf"^{name}: x must be {message}(\n|$)"):
        getattr(quantize, name)(x)


@pytest.mark.parametrize("name", quantize_call.OPS)
def test_symbolic_batch_is_refused_while_tracing(name):
    (batch,) = export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, 16, 256), jnp.float32)
    with pytest.raises(ValueError) as raised:
        jax.jit(jax.vmap(getattr(quantize, name))).trace(x)
    assert str(raised.value) == f"{name}: batch must be static, got batch"


def test_no_dtype_raises():
    message = "^quantize_per_token: dtype must be float8_e4m3fn or float8_e5m2, got None"
    with pytest.raises(TypeError, match=message):
        quantize_per_token(np.ones((4, 128), np.float32), dtype=None)
