"""How operations check their operands: pairs of values and scales, and arrays that assign rows."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_deepgemm.arguments import is_array
from jax_deepgemm.config import FP8_TYPES
from jax_deepgemm.reference import BLOCK

Operand = tuple[ArrayLike, ArrayLike]

Sizes = dict[str, int]
"""The sizes of an operation's dimensions, by the names that docstrings and messages give them."""


def check_pairs(
    function: str,
    lhs: Operand,
    rhs: Operand,
    *,
    rows: Sequence[str] = ("m",),
    groups: Sequence[str] = (),
) -> tuple[tuple[jax.Array, jax.Array, jax.Array, jax.Array], Sizes]:
    """Returns (a, sfa, b, sfb) and their sizes, or raises in the name of `function`.

    Args:
        function: the public function, which messages begin with.
        lhs: what came as (a, sfa): FP8 [*rows, k] and float32[*rows, ceil(k/128)]. FP8 is either
            of FP8_TYPES, here and in b.
        rhs: what came as (b, sfb): FP8 [*groups, n, k] and
            float32[*groups, ceil(n/128), ceil(k/128)].
        rows: the names of A's dimensions before k.
        groups: the names of B's dimensions before n. A name that stands in `rows`, too, is the
            same size.

    Raises:
        TypeError: an operand is no pair of arrays, or an array has the wrong dtype.
        ValueError: an array has the wrong shape, or a symbolic one.
    """
    a, sfa = _pair(function, "lhs", "(a, sfa)", lhs)
    b, sfb = _pair(function, "rhs", "(b, sfb)", rhs)
    sizes: Sizes = {}
    check_array(function, "a", a, FP8_TYPES, (*rows, "k"), sizes)
    check_array(function, "b", b, FP8_TYPES, (*groups, "n", "k"), sizes)
    for size in ("n", "k"):
        sizes[f"ceil({size}/{BLOCK})"] = -(-sizes[size] // BLOCK)
    check_array(function, "sfa", sfa, ("float32",), (*rows, "ceil(k/128)"), sizes)
    check_array(function, "sfb", sfb, ("float32",), (*groups, "ceil(n/128)", "ceil(k/128)"), sizes)
    return (jnp.asarray(a), jnp.asarray(sfa), jnp.asarray(b), jnp.asarray(sfb)), sizes


def check_array(
    function: str,
    argument: str,
    array: Any,
    dtypes: Sequence[str],
    names: Sequence[str],
    sizes: Sizes,
) -> None:
    """Raises unless the array has one of these dtypes and dimensions of these names.

    A name that `sizes` knows wants that size; another one is added to it, with the array's size.
    """
    wanted = [sizes.get(name) for name in names]
    right_dtype = any(array.dtype == np.dtype(dtype) for dtype in dtypes)
    right_shape = len(array.shape) == len(names) and all(
        want is None or size == want for size, want in zip(array.shape, wanted, strict=True)
    )
    if not (right_dtype and right_shape):
        expected = ", ".join(
            name if want is None else str(want) for name, want in zip(names, wanted, strict=True)
        )
        error = ValueError if right_dtype else TypeError
        types = " or ".join(
            f"{dtype}[{expected}]" for dtype in ([array.dtype.name] if right_dtype else dtypes)
        )
        raise error(
            f"{function}: {argument} must be {types} ({', '.join(names)}), got {describe(array)}"
        )
    found = dict(zip(names, array.shape, strict=True))
    check_static(function, **found)
    sizes |= found


def check_integers(
    function: str, argument: str, value: Any, names: Sequence[str], sizes: Sizes
) -> jax.Array:
    """Returns an argument that counts or names rows as int32 array, or raises like `check_array`.

    Other integer types are refused and not converted: the conversion would run on the device, at
    every call, and what does not fit would change in silence.
    """
    if not is_array(value):
        raise TypeError(f"{function}: {argument} must be an array, got {type(value).__name__}")
    if value.dtype != np.int32 and jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(
            f"{function}: {argument} must be int32, got {describe(value)}: "
            f"cast it with {argument}.astype(jnp.int32)"
        )
    check_array(function, argument, value, ("int32",), names, sizes)
    return jnp.asarray(value)


def check_static(function: str, **sizes: Any) -> None:
    """Raises if a size is symbolic, as `jax.export` may make it: kernels are compiled for sizes."""
    for argument, size in sizes.items():
        if not isinstance(size, int):
            raise ValueError(f"{function}: {argument} must be static, got {size}")


def values_are_checked() -> bool:
    """Whether `jax.debug_nans` or `jax.debug_infs` is on.

    What they look for must not be found in rows that nobody reads.
    """
    return any(getattr(jax.config, f"jax_debug_{kind}", False) for kind in ("nans", "infs"))


def describe(array: Any) -> str:
    """The array's type as messages show it, for example "int32[16, 3]"."""
    # Of the other byte order NumPy's types have the same name.
    name = array.dtype.name if getattr(array.dtype, "isnative", True) else array.dtype.str
    return f"{name}[{', '.join(map(str, array.shape))}]"


def unconverted(array: Any) -> Any:
    """Returns an array whose dtype is what the caller gave.

    `jnp.asarray` makes float64 float32 in silence, and refuses types that are NumPy's alone in
    JAX's words: it is for what has been checked, or says its dtype in another way than NumPy.
    """
    return array if isinstance(array.dtype, np.dtype) else jnp.asarray(array)


def _pair(function: str, argument: str, form: str, pair: Any) -> tuple[Any, Any]:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(
            f"{function}: {argument} must be a pair {form} of values and scales, "
            f"got {type(pair).__name__}"
        )
    for part in pair:
        if not is_array(part):
            raise TypeError(
                f"{function}: {argument} must be a pair {form} of arrays, got {type(part).__name__}"
            )
    return unconverted(pair[0]), unconverted(pair[1])
