"""Every operation inside JAX's control flow and under its transformations, on the CPU.

docs/transformations.md lists these tests, and those of `jax.vmap`, `jax.shard_map` and `jax.export`
that stand with the operations.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_deepgemm
from jax_deepgemm import grouped
from tests import grouped_cases, numerics
from tests.lowering import cuda_calls, cuda_text, problem_of

ROOT = Path(__file__).parents[2]


class Operation(NamedTuple):
    """One operation with its weights: a function of A and SFA, and an argument for it."""

    function: Callable[[Any, Any], jax.Array]
    lhs: tuple[Any, Any]


def make(op: str) -> Operation:
    function, (a, sfa, *others) = all_operands(op)
    return Operation(lambda a, sfa: function(a, sfa, *others), (a, sfa))


OPS = ("dense", *grouped_cases.OPS)


def all_operands(op: str) -> tuple[Callable[..., jax.Array], list[Any]]:
    """One operation as a function of all of its arrays, and these."""
    if op == "dense":
        return (
            lambda a, sfa, b, sfb: jax_deepgemm.gemm_fp8_fp8_bf16_nt((a, sfa), (b, sfb)),
            list(numerics.dense_operands(13, 24, 144, seed=0)),
        )
    rows = {"contiguous": 256, "masked": 13, "ragged": 40}[op]
    problem = grouped_cases.Problem(op, 3, rows, 24, 144)
    arrays = problem.random_arrays(np.random.default_rng(0))
    return lambda *x: grouped_cases.call(op, *x), [*problem.operands(seed=0), *arrays]


@pytest.fixture(params=OPS)
def operation(request: pytest.FixtureRequest) -> Operation:
    return make(request.param)


def bits(d: Any) -> bytes:
    return np.asarray(d).tobytes()


def test_jit(operation: Operation) -> None:
    function, lhs = operation
    assert bits(jax.jit(function)(*lhs)) == bits(function(*lhs))


def test_nested_jit(operation: Operation) -> None:
    function, lhs = operation
    outer = jax.jit(lambda *lhs: jax.jit(jax.jit(function))(*lhs))
    assert bits(outer(*lhs)) == bits(function(*lhs))


def test_disable_jit(operation: Operation) -> None:
    function, lhs = operation
    expected = bits(function(*lhs))
    with jax.disable_jit():
        assert bits(jax.jit(function)(*lhs)) == expected


def scaled(lhs: tuple[Any, Any], count: int) -> tuple[Any, Any]:
    """The same values with other scales, stacked."""
    a, sfa = lhs
    return np.stack([a] * count), np.stack([sfa * 2.0**i for i in range(count)])


def test_scan(operation: Operation) -> None:
    function, lhs = operation
    a, sfa = scaled(lhs, 3)
    _, d = jax.jit(lambda xs: lax.scan(lambda carry, x: (carry, function(*x)), 0, xs))((a, sfa))
    for i in range(3):
        assert bits(d[i]) == bits(function(a[i], sfa[i]))


def test_while_loop(operation: Operation) -> None:
    function, lhs = operation
    a, sfa = lhs

    def body(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, total = state
        return i + 1, total + function(a, sfa * 2.0**i).astype(jnp.float32)

    start = jnp.int32(0), jnp.zeros(function(*lhs).shape)
    _, total = jax.jit(lambda start: lax.while_loop(lambda state: state[0] < 3, body, start))(start)
    # Scales that are powers of two apart change no bit of the numbers but the exponent.
    np.testing.assert_allclose(total, 7 * np.asarray(function(*lhs)).astype(np.float32), rtol=1e-6)


@pytest.mark.parametrize("taken", [False, True])
def test_cond(operation: Operation, taken: bool) -> None:
    function, lhs = operation
    d = jax.jit(
        lambda pred, *lhs: lax.cond(pred, function, lambda *x: jnp.zeros_like(function(*x)), *lhs)
    )(taken, *lhs)
    expected = np.asarray(function(*lhs))
    assert bits(d) == bits(expected if taken else np.zeros_like(expected))


@pytest.mark.parametrize("device", [0, 3])
@pytest.mark.parametrize("op", OPS)
def test_nothing_is_copied_from_the_host(op: str, device: int) -> None:
    """Nor from another device, where the operands are on one that is not the default one."""
    function, operands = all_operands(op)
    arrays = jax.device_put(operands, jax.devices("cpu")[device])
    with jax.transfer_guard("disallow"):
        for call in (function, jax.jit(function)):
            assert call(*arrays).devices() == {jax.devices("cpu")[device]}


def test_default_offset_is_a_constant() -> None:
    """In a program nothing is computed for it, of group sizes or of anything else."""
    sizes = jnp.ones(3, jnp.int32)
    text = jax.jit(lambda sizes: grouped._offset(None, sizes)).lower(sizes).compile().as_text()
    assert text is not None
    assert "s32[1]{0} constant({0})" in text and "parameter(" not in text


QUANTIZERS = (
    "quantize_per_token",
    "quantize_per_block",
    "quantize_per_token_transposed",
    "quantize_per_token_both",
    "silu_mul_quantize",
)
SIZES = {"masked_m": [3, 13], "group_sizes": [3, 4, 2]}
# What computes in this package; after a hyphen the argument that says which rows count.
PUBLIC = (
    *OPS,
    *QUANTIZERS,
    *(f"{name}-{sizes}" for name in (QUANTIZERS[0], QUANTIZERS[-1]) for sizes in SIZES),
    "Linear",
    "dequantize",
    "get_col_major_tma_aligned_tensor",
)


def public(name: str) -> tuple[Callable[..., Any], list[Any]]:
    """One of PUBLIC as a function of arrays, and these."""
    x = np.ones((2, 13, 144), np.float32)
    if name in OPS:
        return all_operands(name)
    if name == "Linear":
        layer = jax_deepgemm.Linear.quantize(x[0, :8], np.ones(8, np.float32))
        return lambda layer, x: layer(x), [layer, x]
    if name == "dequantize":
        pairs = jax_deepgemm.quantize_per_token(x), jax_deepgemm.quantize_per_block(x)
        return lambda *pairs: list(map(jax_deepgemm.dequantize, pairs)), list(pairs)
    name, *sizes = name.split("-")
    function = getattr(jax_deepgemm, name)
    if not sizes:
        return function, [x]
    numbers = np.array(SIZES[sizes[0]], np.int32)
    matrices = x if sizes == ["masked_m"] else x[0]
    return lambda x, numbers: function(x, **{sizes[0]: numbers}), [matrices, numbers]


@pytest.mark.parametrize("name", PUBLIC)
def test_rank_promotion_is_never_needed(name: str) -> None:
    """Programs that forbid it run: op by op, jitted, for CUDA and batched."""
    function, arguments = public(name)
    batched = jax.tree.map(lambda x: np.stack([x, x]), arguments)

    def types(results: Any) -> list[tuple[Any, ...]]:
        return [(x.shape, x.dtype) for x in jax.tree.leaves(results)]

    expected = types(function(*arguments))
    with jax.numpy_rank_promotion("raise"):
        assert types(jax.block_until_ready(function(*arguments))) == expected
        assert types(jax.block_until_ready(jax.jit(function)(*arguments))) == expected
        assert "func.func public @main" in cuda_text(function, *arguments)
        if name != "ragged":  # which takes no batch
            d = jax.block_until_ready(jax.jit(jax.vmap(function))(*batched))
            assert types(d) == [((2, *shape), dtype) for shape, dtype in expected]


@pytest.mark.parametrize("platform", ["rocm", "tpu"])
@pytest.mark.parametrize("name", [*OPS, *QUANTIZERS])
def test_other_platforms_are_refused(name: str, platform: str) -> None:
    """By the name of the operation, and not of a primitive."""
    function, arguments = public(name)
    traced = jax.jit(function).trace(*arguments)
    names = {op: grouped_cases.name_of(op) for op in grouped_cases.OPS}
    names["dense"] = "gemm_fp8_fp8_bf16_nt"
    message = (
        f"{names.get(name, name)}: it exists for CPUs (platform cpu) and for Hopper GPUs (platform "
        f"cuda, sm_90), and not for {platform}"
    )
    for platforms in ((platform,), ("cpu", "cuda", platform)):
        with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}"):
            traced.lower(lowering_platforms=platforms)


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.parametrize("op", OPS)
def test_donated_arguments(op: str) -> None:
    """Every array, the weights and the assignment of rows too."""
    function, operands = all_operands(op)
    expected = bits(function(*operands))
    donating = jax.jit(function, donate_argnums=tuple(range(len(operands))))
    assert bits(donating(*map(jnp.asarray, operands))) == expected


@pytest.mark.parametrize("flow", ["scan", "while_loop", "cond"])
@pytest.mark.parametrize("op", ["dense", "contiguous", "masked"])
def test_vmap_of_control_flow(op: str, flow: str) -> None:
    """The loop stays one, and its body one launch of the whole batch."""
    function, operands = all_operands(op)
    batched = [jnp.stack([x] * 3) for x in operands]
    batched[1] = batched[1] * jnp.exp2(jnp.arange(3.0)).reshape(3, *[1] * operands[1].ndim)

    def zeros(*operands: Any) -> jax.Array:
        return jnp.zeros_like(function(*operands))

    def looped(count: jax.Array, *operands: Any) -> jax.Array:
        if flow == "cond":
            return lax.cond(count > 1, function, zeros, *operands)
        if flow == "scan":
            return lax.scan(lambda carry, _: (carry, function(*operands)), 0, None, length=2)[1][1]

        def body(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return state[0] + 1, state[1] + function(*operands).astype(jnp.float32)

        start = jnp.zeros_like(count), zeros(*operands).astype(jnp.float32)
        return lax.while_loop(lambda state: state[0] < count, body, start)[1]

    counts = jnp.arange(3, dtype=jnp.int32)
    d = jax.jit(jax.vmap(looped))(counts, *batched)
    for i in range(3):
        single = np.asarray(function(*(x[i] for x in batched))).astype(np.float32)
        times = {"scan": 1, "while_loop": i, "cond": i > 1}[flow]
        np.testing.assert_allclose(np.asarray(d[i]).astype(np.float32), times * single, rtol=1e-6)
    text = cuda_text(jax.vmap(looped), counts, *batched)
    assert len(cuda_calls(text)) == 1
    assert text.count("stablehlo.while") == (flow != "cond")


def test_vmap_of_control_flow_with_ragged_is_refused() -> None:
    function, operands = all_operands("ragged")
    batched = [jnp.stack([x] * 3) for x in operands]

    def loop(*operands: Any) -> Any:
        return lax.scan(lambda carry, _: (carry, function(*operands)), 0, None, length=2)[1]

    with pytest.raises(
        NotImplementedError, match=r"ragged: jax\.vmap takes no batch, because rows"
    ):
        jax.vmap(loop)(*batched)


def test_debug_nans(operation: Operation) -> None:
    function, lhs = operation
    a = np.array(lhs[0])
    a[..., 0, 0] = np.nan  # of the first row, which has a group in every operation here
    with jax.debug_nans(True):
        jax.jit(function)(*lhs).block_until_ready()
        with pytest.raises(FloatingPointError, match="nan"):
            jax.jit(function)(a, lhs[1]).block_until_ready()


@pytest.mark.parametrize("check", [jax.debug_nans, jax.debug_infs])
def test_undefined_rows_are_zero_where_values_are_checked(check: Any) -> None:
    """They may hold a NaN that JAX would find, and nobody else reads."""
    problem = grouped_cases.Problem("masked", 2, 16, 24, 144)
    operands = (*problem.operands(seed=0), np.array([3, 16], np.int32))

    def filled() -> int:
        text = cuda_text(lambda *x: grouped_cases.call("masked", *x, fill="undefined"), *operands)
        return problem_of(*cuda_calls(text))["fill_zero"]

    assert filled() == 0
    with check(True):
        assert filled() == 1


def with_gradient(function: Callable[[Any, Any], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """The operation on float32 rows, with a gradient that is made up: one number for all of x."""

    @jax.custom_vjp
    def layer(x: jax.Array) -> jax.Array:
        scales = jnp.ones((*x.shape[:-1], -(-x.shape[-1] // 128)), jnp.float32)
        return function(x.astype(jnp.float8_e4m3fn), scales).astype(jnp.float32)

    def forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return layer(x), x

    def backward(x: jax.Array, d: jax.Array) -> tuple[jax.Array]:
        return (jnp.full_like(x, d.sum()),)

    layer.defvjp(forward, backward)
    return layer


def test_checkpoint_of_a_custom_gradient(operation: Operation) -> None:
    function, (a, _) = operation
    layer = with_gradient(function)
    x = jnp.asarray(a).astype(jnp.float32)

    def gradient(layer: Callable[[jax.Array], jax.Array]) -> Any:
        return jax.jit(jax.grad(lambda x: jnp.sum(layer(x) ** 2)))(x)

    plain = gradient(layer)
    # d(sum of squares) is twice the result, which backward adds up.
    np.testing.assert_allclose(plain, jnp.full_like(x, 2 * layer(x).sum()), rtol=1e-4)
    np.testing.assert_array_equal(gradient(jax.checkpoint(layer)), plain)


def test_table_names_tests_that_exist() -> None:
    table = (ROOT / "docs/transformations.md").read_text()
    links = re.findall(r"\[`?(test_\w+)`?\]\(\.\./(tests/\S+?\.py)\)", table)
    assert len(links) >= 10
    for name, path in links:
        assert f"def {name}(" in (ROOT / path).read_text(), f"{path} has no {name}"
