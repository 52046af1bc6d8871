"""What public functions share about their arguments: how they are checked, and two GPUs."""

import operator
from typing import Any

import jax

H100_SMS = 132  # streaming multiprocessors of an H100 or H200 SXM module
H100_MEMORY_GBS = 3352  # peak rate of an H100 SXM's memory, GB/s, as its driver says
H200_MEMORY_GBS = 4814  # of an H200's


def integer(function: str, argument: str, value: Any, *, bits: int) -> int:
    """Returns `value` as an int that the native side can take.

    Args:
        function: the public function, which messages begin with.
        argument: the name of its argument.
        value: what the caller gave; NumPy's integers will do, a float will not.
        bits: width of the native side's signed integer.

    Raises:
        TypeError: value is no integer.
        ValueError: value does not fit.
    """
    try:
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{function}: {argument} must be an integer, got {value!r}") from error
    if not -(2 ** (bits - 1)) <= number < 2 ** (bits - 1):
        raise ValueError(f"{function}: {argument} must fit into {bits} bits, got {number}")
    return number


def is_array(value: Any) -> bool:
    """Whether value is an array of JAX or NumPy, or a tracer of one; numbers and lists are none."""
    # A QuantizedArray has both, too, and so has what only says how an array would look.
    if isinstance(value, tuple | jax.ShapeDtypeStruct):
        return False
    return hasattr(value, "dtype") and hasattr(value, "shape")


def boolean(function: str, argument: str, value: Any) -> bool:
    """Returns `value`, or raises a TypeError if it is not True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{function}: {argument} must be True or False, got {value!r}")
    return value
