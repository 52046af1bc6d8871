"""QuantizedArray is a pair, a pytree and an array's description; linear layers use it."""

import copy
import pathlib
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jax_deepgemm
from jax_deepgemm import QuantizedArray, dequantize, quantized_sharding
from jax_deepgemm.linear import Linear, linear
from tests import numerics

QUANTIZERS = {"quantize_per_token": 1, "quantize_per_block": 128}


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh(
        (4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu")
    )


def normal(*shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


def same(got: Any, wanted: Any) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def test_is_a_pair_and_a_pytree() -> None:
    q = jax_deepgemm.quantize_per_token(normal(3, 5, 300))
    values, scales = q
    assert values is q[0] is q.values
    assert scales is q[1] is q.scales
    assert (q.shape, q.ndim, q.dtype) == ((3, 5, 300), 3, jnp.float8_e4m3fn)
    assert q.nbytes == 3 * 5 * 300 + 3 * 5 * 3 * 4
    assert len(jax.tree.leaves(q)) == 2
    doubled = jax.tree.map(lambda x: jnp.concatenate([x, x]), q)
    assert isinstance(doubled, QuantizedArray)
    assert doubled.shape == (6, 5, 300)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(q)]
    assert paths == [".values", ".scales"]
    same(copy.deepcopy(q), q)
    assert jax_deepgemm.Quantized is QuantizedArray


def test_arithmetic_is_refused() -> None:
    """A tuple's would repeat and join the pair."""
    q = jax_deepgemm.quantize_per_token(np.ones((4, 128), np.float32))
    for operation in (lambda: q * 2, lambda: 2 * q, lambda: q + q):
        with pytest.raises(TypeError, match="call its dequantize"):
            operation()


def test_bytes_of_shapes_alone() -> None:
    x = jax.ShapeDtypeStruct((4, 256), "bfloat16")
    assert jax.eval_shape(jax_deepgemm.quantize_per_token, x).nbytes == 4 * 256 + 4 * 4 * 2


def test_a_pair_is_no_array() -> None:
    q = jax_deepgemm.quantize_per_token(np.ones((4, 128), np.float32))
    w = jax_deepgemm.quantize_per_block(np.ones((8, 128), np.float32))
    for function in (
        jax_deepgemm.quantize_per_token,
        jax_deepgemm.silu_mul_quantize,
        lambda x: jax_deepgemm.Linear(w)(x),
    ):
        with pytest.raises(TypeError, match="x must be an array, got QuantizedArray"):
            function(q)


def test_linear_of_no_columns() -> None:
    w = jax_deepgemm.quantize_per_block(np.ones((8, 128), np.float32))
    with pytest.raises(ValueError, match="k"):
        jax_deepgemm.Linear(w)(np.ones((4, 0), np.float32))


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("fp8", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("shape", [(1, 128), (130, 300), (2, 3, 200, 40)], ids=str)
def test_dequantize(name: str, fp8: str, shape: tuple[int, ...]) -> None:
    x = normal(*shape)
    q = getattr(jax_deepgemm, name)(x, dtype=fp8)
    rows = QUANTIZERS[name] if shape[-2] > 1 else 1
    assert q.block_shape == (rows, 128)
    wanted = numerics.dequantize64(*q, block_rows=rows).astype(np.float32)
    np.testing.assert_array_equal(q.dequantize(), wanted)
    np.testing.assert_array_equal(jax.jit(dequantize)(tuple(q)), wanted)
    assert q.dequantize(jnp.bfloat16).dtype == jnp.bfloat16
    error = np.linalg.norm(wanted - np.asarray(x, np.float32)) / np.linalg.norm(wanted)
    assert 0.001 < error < (0.05 if fp8 == "float8_e4m3fn" else 0.1)


@pytest.mark.parametrize(
    ("quantized", "kind", "message"),
    [
        (np.ones((2, 2)), TypeError, "quantized must be a pair .values, scales., got ndarray"),
        ((1, 2), TypeError, "quantized must be a pair .values, scales. of arrays, got int"),
        (
            (np.ones((2, 128)), np.ones((2, 1))),
            TypeError,
            "values must be float8_e4m3fn or .*float64",
        ),
        (
            (jnp.zeros((2, 128), "float8_e4m3fn"), jnp.ones((2, 1), jnp.bfloat16)),
            TypeError,
            r"scales must be float32, got bfloat16\[2, 1\]",
        ),
        (
            (np.zeros((2, 128), ml_dtypes.float8_e4m3fn), np.ones((2, 1))),
            TypeError,
            r"scales must be float32, got float64\[2, 1\]",
        ),
        (
            (np.zeros((2, 128), object), np.ones((2, 1), np.float32)),
            TypeError,
            r"values must be float8_e4m3fn or .*, got object\[2, 128\]",
        ),
        (
            (np.zeros((2, 128), ml_dtypes.float8_e4m3fn), np.ones((2, 1), ">f4")),
            TypeError,
            r"scales must be float32, got >f4\[2, 1\]",
        ),
        (
            (jnp.zeros((3, 256, 128), "float8_e4m3fn"), jnp.ones((3, 1, 1))),
            ValueError,
            r"scales of values \[3, 256, 128\] must be \[3, 256, 1\] \(1 x 128 blocks\) or "
            r"\[3, 2, 1\] \(128 x 128 blocks\), got \[3, 1, 1\]",
        ),
    ],
    ids=[
        "array",
        "numbers",
        "float-values",
        "bf16-scales",
        "float64-scales",
        "objects",
        "big-endian",
        "shape",
    ],
)
def test_dequantize_of_something_else(quantized: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^dequantize: {message}"):
        dequantize(quantized)


def test_sharding_of_a_pair(mesh: jax.sharding.Mesh) -> None:
    q = jax_deepgemm.quantize_per_block(normal(2, 512, 1024))
    shardings = quantized_sharding(NamedSharding(mesh, P(None, "x", "y")), q.shape)
    put = jax.device_put(q, shardings)
    assert put.values.sharding.shard_shape(put.shape) == (2, 128, 512)
    assert put.scales.sharding.shard_shape(put.scales.shape) == (2, 1, 4)
    same(put, q)
    same(jax.jit(lambda q: q, in_shardings=(shardings,))(q), q)
    with pytest.raises(ValueError, match=r"shards of k must be a multiple of 128.* got 64 of 256"):
        quantized_sharding(NamedSharding(mesh, P(None, "x")), (128, 256))
    tokens = quantized_sharding(NamedSharding(mesh, P("x")), (8, 256), block_rows=1)
    assert tokens.scales.spec == P("x")
    for block_rows in (0, 64, -1):
        with pytest.raises(ValueError, match=rf"block_rows must be 1 or 128, got {block_rows}$"):
            quantized_sharding(NamedSharding(mesh, P("x")), (256, 256), block_rows)
    with pytest.raises(TypeError, match=r"must be a NamedSharding, got SingleDeviceSharding$"):
        quantized_sharding(SingleDeviceSharding(jax.devices()[0]), q.shape)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must be that of values \[..., rows, k\], got \[256\]$"):
        quantized_sharding(NamedSharding(mesh, P("x")), (256,))


def test_as_a_tree_of_two_arrays() -> None:
    """Scanned over, replaced in part, donated, pickled and only shaped."""
    experts = jax_deepgemm.quantize_per_block(normal(3, 256, 128))
    q = jax_deepgemm.quantize_per_token(normal(8, 128))
    multiply = jax_deepgemm.gemm_fp8_fp8_bf16_nt
    scanned = jax.lax.scan(lambda carry, weight: (carry, multiply(q, weight)), 0, experts)[1]
    wanted = [multiply(q, jax.tree.map(lambda x, i=i: x[i], experts)) for i in range(3)]
    same(scanned, jnp.stack(wanted))
    same(jax.vmap(multiply, in_axes=(None, 0))(q, experts), jnp.stack(wanted))
    same(experts._replace(scales=2 * experts.scales).dequantize(), 2 * experts.dequantize())
    same(pickle.loads(pickle.dumps(experts)), experts)
    shapes = jax.eval_shape(jax_deepgemm.quantize_per_block, normal(3, 256, 128))
    assert isinstance(shapes, QuantizedArray)
    assert (shapes.shape, shapes.block_shape, shapes.nbytes) == (
        experts.shape,
        (128, 128),
        experts.nbytes,
    )
    given = jax.tree.map(jnp.copy, experts)
    same(jax.jit(lambda x: jax.tree.map(lambda y: y, x), donate_argnums=0)(given), experts)
    assert all(part.is_deleted() for part in given)


@pytest.mark.parametrize("shape", [(0, 4, 128), (2, 0, 128), (2, 4, 0)])
def test_linear_and_quantisers_of_nothing(shape: tuple[int, ...]) -> None:
    q = jax.vmap(jax_deepgemm.quantize_per_token)(jnp.ones(shape))
    assert q.shape == shape
    assert q.scales.shape == (*shape[:-1], -(-shape[-1] // 128))
    assert q.dequantize().shape == shape


@pytest.mark.parametrize("sharded", [False, True])
def test_orbax_checkpoint(tmp_path: pathlib.Path, mesh: jax.sharding.Mesh, sharded: bool) -> None:
    orbax = pytest.importorskip("orbax.checkpoint", reason="needs orbax-checkpoint")
    q = jax_deepgemm.quantize_per_block(normal(512, 1024))
    if sharded:
        q = jax.device_put(q, quantized_sharding(NamedSharding(mesh, P("x", "y")), q.shape))
    state = {"layer": {"weight": q, "step": jnp.int32(3)}}
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        restored = checkpointer.restore(tmp_path / "state", abstract)
    weight = restored["layer"]["weight"]
    assert isinstance(weight, QuantizedArray)
    same(restored, state)
    assert weight.values.sharding == q.values.sharding
    d = jax_deepgemm.gemm_fp8_fp8_bf16_nt(jax_deepgemm.quantize_per_token(normal(4, 1024)), weight)
    assert d.shape == (4, 512)


# --- Linear layers -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (3,), (2, 5), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(batch: tuple[int, ...], with_bias: bool) -> None:
    x, w = normal(*batch, 272), normal(136, 272, dtype=jnp.float32)
    bias = normal(136) if with_bias else None
    layer = Linear.quantize(w, bias)
    y = jax.jit(lambda layer, x: layer(x))(layer, x)
    assert (y.shape, y.dtype) == ((*batch, 136), jnp.bfloat16)
    same(y, linear(x, layer.weight, bias))
    rows = jax_deepgemm.quantize_per_token(x.reshape(-1, 272)).dequantize()
    wanted = jnp.dot(rows, layer.weight.dequantize().T, precision="highest")
    wanted = wanted.astype(jnp.bfloat16).astype(jnp.float32)
    if bias is not None:
        wanted = wanted + bias
    np.testing.assert_allclose(
        y.astype(jnp.float32).reshape(-1, 136), wanted, rtol=2**-7, atol=2**-7
    )


@pytest.mark.parametrize(
    ("x", "bias", "kind", "message"),
    [
        (np.float32(1), None, ValueError, r"linear: x must be \[..., k\], got float32\[\]"),
        (np.ones(272), np.ones(3), ValueError, r"linear: bias must be \[136\] \(n\), got float"),
        (
            np.ones(272),
            np.ones(136, int),
            TypeError,
            r"linear: bias must be floating point \[136\]",
        ),
        (
            np.ones(272),
            np.ones(136, object),
            TypeError,
            r"linear: bias must be floating point \[136\], got object\[136\]",
        ),
        (np.ones(272), 3.0, TypeError, r"linear: bias must be an array \[136\], got float"),
        (np.ones(256), None, ValueError, r"gemm_fp8_fp8_bf16_nt: b must be .*\[n, 256\]"),
        (np.ones(272, int), None, TypeError, r"quantize_per_token: x must be"),
    ],
    ids=["scalar", "bias-size", "bias-type", "bias-objects", "bias-number", "k", "integers"],
)
def test_linear_refuses(x: Any, bias: Any, kind: type[Exception], message: str) -> None:
    weight = jax_deepgemm.quantize_per_block(normal(136, 272))
    with pytest.raises(kind, match=f"^{message}"):
        linear(x, weight, bias)


@pytest.mark.parametrize("use_bias", [False, True])
def test_flax_nnx(use_bias: bool) -> None:
    nnx = pytest.importorskip("flax.nnx", reason="needs the extra `flax`")
    from jax_deepgemm import nnx as dg_nnx

    layer = nnx.Linear(272, 136, use_bias=use_bias, rngs=nnx.Rngs(0))
    if use_bias:
        layer.bias[...] = jnp.arange(136.0)
    quantized = dg_nnx.Linear.from_linear(layer)
    x = normal(2, 3, 272)
    y = nnx.jit(lambda layer, x: layer(x))(quantized, x)
    bias = layer.bias[...] if use_bias else None
    same(y, linear(x, jax_deepgemm.quantize_per_block(layer.kernel[...].T), bias))
    wanted = layer(x.astype(jnp.float32))
    assert float(jnp.linalg.norm(y - wanted) / jnp.linalg.norm(wanted)) < 0.05
    # Weights are no parameters that an optimiser sees, and survive split and merge.
    assert len(jax.tree.leaves(nnx.state(quantized, nnx.Param))) == int(use_bias)
    assert len(jax.tree.leaves(nnx.state(quantized, dg_nnx.QuantizedWeight))) == 2
    graph, state = nnx.split(quantized)
    same(nnx.merge(graph, state)(x), y)
    assert isinstance(quantized.weight, QuantizedArray)


def test_flax_nnx_from_a_checkpoint_weight() -> None:
    pytest.importorskip("flax.nnx", reason="needs the extra `flax`")
    from jax_deepgemm import nnx as dg_nnx

    weight = jax_deepgemm.quantize_per_block(normal(136, 272))
    layer = dg_nnx.Linear(272, 136, use_bias=False, weight=weight)
    same(layer(normal(4, 272)), linear(normal(4, 272), weight))
    assert not np.asarray(dg_nnx.Linear(272, 136)(normal(4, 272))).any()
    same(dg_nnx.Linear(272, 136, use_bias=False, weight=tuple(weight)).weight, weight)
    with jax.enable_x64(True):
        assert dg_nnx.Linear(272, 136).weight.scales.dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"out_features": 128},
            ValueError,
            r"weight's values must be float8_e4m3fn\[128, 272\] \(n, k\), got \S+\[136, 272\]",
        ),
        (
            {"weight": jax_deepgemm.quantize_per_token(jnp.ones((136, 272)))},
            ValueError,
            r"weight's scales must be float32\[2, 3\] .* got float32\[136, 3\]",
        ),
        (
            {"weight": (jnp.ones((136, 272)), jnp.ones((2, 3)))},
            TypeError,
            r"weight's values must be float8_e4m3fn.* got float32\[136, 272\]",
        ),
        ({"weight": jnp.ones((136, 272))}, TypeError, r"weight must be a pair .* got ArrayImpl"),
        ({"weight": ([], [])}, TypeError, r"weight's values must be an array, got list"),
        ({"bias": jnp.ones(3)}, ValueError, r"bias must be float32\[136\] \(n\), got float32\[3\]"),
        ({"bias": jnp.ones(136, int)}, TypeError, r"bias must be bfloat16.* got int32\[136\]"),
        ({"bias": [1.0] * 136}, TypeError, r"bias must be an array, got list"),
        (
            {"bias": jnp.ones(136), "use_bias": False},
            ValueError,
            r"bias must be None where use_bias is False",
        ),
    ],
    ids=[
        "features",
        "token-blocks",
        "float-values",
        "float-weight",
        "lists",
        "bias-size",
        "bias-type",
        "bias-list",
        "unused-bias",
    ],
)
def test_flax_nnx_refuses(options: Any, kind: type[Exception], message: str) -> None:
    pytest.importorskip("flax.nnx", reason="needs the extra `flax`")
    from jax_deepgemm import nnx as dg_nnx

    arguments = {
        "in_features": 272,
        "out_features": 136,
        "weight": jax_deepgemm.quantize_per_block(jnp.ones((136, 272))),
    }
    with pytest.raises(kind, match=rf"^nnx.Linear: {message}"):
        dg_nnx.Linear(**(arguments | options))
