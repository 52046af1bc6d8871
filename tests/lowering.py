"""What operations become for CUDA, seen from a machine without a GPU."""

import re
from collections.abc import Callable
from typing import Any

import jax

from jax_deepgemm.ffi import _native


def cuda_text(function: Callable[..., Any], *arguments: Any) -> str:
    """The StableHLO of a function for CUDA; no GPU is needed."""
    traced = jax.jit(function).trace(*arguments)
    text: str = traced.lower(lowering_platforms=("cuda",)).as_text()
    return text


def cuda_calls(text: str) -> list[str]:
    """The lines of StableHLO that call this package's target."""
    return [line for line in text.splitlines() if f"custom_call @{_native.GEMM_TARGET}(" in line]


def problem_of(call: str) -> dict[str, int]:
    """The struct attribute `problem` of a custom call; every member must be an int64."""
    match = re.search(r"problem = \{(.*?)\}", call)
    assert match is not None
    members = dict(member.split(" = ") for member in match[1].split(", "))
    assert all(value.endswith(" : i64") for value in members.values())
    return {name: int(value.removesuffix(" : i64")) for name, value in members.items()}
