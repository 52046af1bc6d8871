"""The custom call that every operation becomes on a GPU: its operands, its attributes, its options.

One target serves all operations. It takes A, SFA, B and SFB as matrices, the groups one below the
other, then the arrays that assign rows to groups, and a struct of integers that says which
operation on which sizes it is; csrc/ffi/handlers.cc is the other side.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.arguments import H100_SMS
from jax_deepgemm.config import FP8_TYPES, OPS, GemmConfig, Problem, check_config, check_problem
from jax_deepgemm.device import num_sms_limit
from jax_deepgemm.ffi import _native
from jax_deepgemm.ffi.primitive import Batching, Operation, declare
from jax_deepgemm.operands import Sizes
from jax_deepgemm.partitioning import Partitioning


def declare_gemm(
    name: str,
    *,
    op: str,
    reference: Callable[..., jax.Array],
    batching: Batching,
    partitioning: Partitioning,
    num_arrays: int = 0,
    assign: Callable[..., Sequence[jax.Array]] = lambda num_groups, *arrays: arrays,
) -> Operation:
    """Declares an operation's primitive; see `ffi.primitive.declare`.

    Its operands are a [..., k], sfa, b [..., n, k] and sfb, then any that assign rows to groups;
    its parameters are those of `options`, and fill_zero where the operation has it.

    Args:
        name: the public operation.
        op: which of `config.OPS` it is.
        reference: (*operands) -> bfloat16[..., n] in jax.numpy.
        batching: the rules for `jax.vmap`.
        partitioning: how the operation is split over devices.
        num_arrays: arrays that the target takes beside the matrices.
        assign: (number of groups, *operands behind the matrices) -> these arrays.
    """

    def problem_of(
        a: Any, b: Any, *, num_sms: int, expected_m: int, batch_invariant: bool
    ) -> Problem:
        *rows, k = a.shape
        *groups, n, _k = b.shape
        return Problem(
            op=OPS.index(op),
            num_groups=math.prod(groups),
            m=math.prod(rows),
            expected_m=expected_m,
            n=n,
            k=k,
            num_sms=num_sms,
            a_type=FP8_TYPES.index(a.dtype.name),
            b_type=FP8_TYPES.index(b.dtype.name),
            batch_invariant=batch_invariant,
        )

    def attributes(
        a: Any,
        sfa: Any,
        b: Any,
        *_: Any,
        config: GemmConfig | None,
        fill_zero: bool = False,
        **parameters: Any,
    ) -> dict[str, int]:
        problem = problem_of(a, b, **parameters)
        # A configuration of zeros: the device that the call runs on selects one.
        names = GemmConfig.__dataclass_fields__
        fields = config.fields if config else (0,) * len(names)
        sizes = problem._asdict()
        del sizes["memory_gbs"]  # the device's, too
        return {
            **sizes,
            "fill_zero": fill_zero,
            **dict(zip(names, fields, strict=True)),
        }

    def check(a: Any, b: Any, parameters: dict[str, Any]) -> None:
        """Raises if the caller's configuration is none for one device's part of the operation."""
        config = parameters["config"]
        if config is None:
            return
        problem = problem_of(
            a,
            b,
            num_sms=parameters["num_sms"] or H100_SMS,
            expected_m=parameters["expected_m"],
            batch_invariant=parameters["batch_invariant"],
        )
        try:
            check_config(name, problem, config)
        except ValueError as error:
            part = f"m = {problem.m}, n = {problem.n}, k = {problem.k}"
            raise ValueError(f"{error}: {config}, on one device's {part}") from None

    def prepare(
        a: jax.Array, sfa: jax.Array, b: jax.Array, sfb: jax.Array, *arrays: jax.Array
    ) -> Sequence[jax.Array]:
        matrices = (x.reshape(-1, x.shape[-1]) for x in (a, sfa, b, sfb))
        return (*matrices, *assign(math.prod(b.shape[:-2]), *arrays))

    partitioning = partitioning._replace(check=check)
    return declare(
        name,
        target=_native.GEMM_TARGET,
        dtype=jnp.bfloat16,
        attributes=attributes,
        reference=reference,
        # SFA is read m-contiguous.
        operand_layouts=(None, (1, 0), None, None, *(None,) * num_arrays),
        prepare=prepare,
        batching=batching,
        partitioning=partitioning,
    )


def options(
    function: str,
    op: str,
    sizes: Sizes,
    config: GemmConfig | None,
    *,
    expected_m: int | None = None,
    batch_invariant: bool = False,
    num_sms: int | None = None,
) -> dict[str, Any]:
    """Returns a primitive's parameters, or raises in the name of `function` if no kernel fits.

    Args:
        function: the public operation.
        op: which of `config.OPS` it is.
        sizes: n, k, num_groups where there are groups, and m or else max_m.
        config: the caller's kernel, None for the selected one.
        expected_m: the hint of the masked operation.
        batch_invariant: whether the kernel is to be one whose results do not depend on m.
        num_sms: the limit on SMs that an earlier call returned, None for today's.
    """
    num_groups = sizes.get("num_groups", 1)
    if num_sms is None:
        num_sms = num_sms_limit()
    problem = check_problem(
        function,
        sizes["m"] if "m" in sizes else num_groups * sizes["max_m"],
        sizes["n"],
        sizes["k"],
        num_sms or H100_SMS,
        op=op,
        num_groups=num_groups,
        expected_m=expected_m,
        batch_invariant=batch_invariant,
    )
    if config is not None:
        check_config(function, problem, config)
    return {
        "config": config,
        "num_sms": num_sms,
        "expected_m": problem.expected_m,
        "batch_invariant": bool(problem.batch_invariant),
    }


def check_options(function: str, op: str, sizes: Sizes, parameters: dict[str, Any]) -> None:
    """Raises if no kernel fits a larger problem with the parameters that `options` returned."""
    options(
        function,
        op,
        sizes,
        parameters["config"],
        batch_invariant=parameters["batch_invariant"],
        num_sms=parameters["num_sms"],
    )
