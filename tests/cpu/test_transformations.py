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
from tests import grouped_cases, numerics

ROOT = Path(__file__).parents[2]


class Operation(NamedTuple):
    """One operation with its weights: a function of A and SFA, and an argument for it."""

    function: Callable[[Any, Any], jax.Array]
    lhs: tuple[Any, Any]


def make(op: str) -> Operation:
    if op == "dense":
        a, sfa, b, sfb = numerics.dense_operands(13, 24, 144, seed=0)
        return Operation(
            lambda a, sfa: jax_deepgemm.gemm_fp8_fp8_bf16_nt((a, sfa), (b, sfb)), (a, sfa)
        )
    rows = {"contiguous": 256, "masked": 13, "ragged": 40}[op]
    problem = grouped_cases.Problem(op, 3, rows, 24, 144)
    a, sfa, b, sfb = problem.operands(seed=0)
    arrays = problem.random_arrays(np.random.default_rng(0))
    return Operation(lambda a, sfa: grouped_cases.call(op, a, sfa, b, sfb, *arrays), (a, sfa))


OPS = ("dense", *grouped_cases.OPS)


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


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_donated_arguments(operation: Operation) -> None:
    function, lhs = operation
    expected = bits(function(*lhs))
    donating = jax.jit(function, donate_argnums=(0, 1))
    assert bits(donating(*map(jnp.asarray, lhs))) == expected


def test_debug_nans(operation: Operation) -> None:
    function, lhs = operation
    a = np.array(lhs[0])
    a[..., 0, 0] = np.nan  # of the first row, which has a group in every operation here
    with jax.debug_nans(True):
        jax.jit(function)(*lhs).block_until_ready()
        with pytest.raises(FloatingPointError, match="nan"):
            jax.jit(function)(a, lhs[1]).block_until_ready()


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
