"""Kernel configurations and their selection."""

import dataclasses
from typing import NamedTuple, SupportsIndex

from jax_deepgemm.arguments import H100_MEMORY_GBS, H100_SMS, boolean, integer
from jax_deepgemm.ffi import _native

OPS = ("dense", "contiguous", "masked", "ragged")
"""The operations, by the numbers that the native side knows them by."""

FP8_TYPES = ("float8_e4m3fn", "float8_e5m2")
"""What A and B may hold, each either, by the same kind of numbers."""


@dataclasses.dataclass(frozen=True)
class GemmConfig:
    """How one GEMM kernel is specialised: tile, pipeline and cluster.

    Which combinations exist depends on the problem; `legal_configs` lists those worth running and
    an operation that is given another one says why it does not. All that is checked here is that
    every field is an integer: TypeError or ValueError otherwise, in the name of the field.

    Attributes:
        block_m: rows of D per tile: 64, 128 or 256.
        block_n: columns of D per tile: a multiple of 8 from 16 to 256.
        num_stages: depth of the shared-memory ring, in k-blocks of 128.
        math_warpgroups: warpgroups of 128 threads that multiply (1 or 2), beside the producers.
        cluster_m: CTAs along m (1 or 2) that share B by TMA multicast.
        cluster_n: CTAs along n (1 or 2) that share A by TMA multicast.
        cluster_k: CTAs (1, 2 or 4) that split k and add their sums in a fixed order.
        raster_m: tile rows per rasterisation swath; tiles in flight form a rectangle of D.
    """

    block_m: int
    block_n: int
    num_stages: int
    math_warpgroups: int = 2
    cluster_m: int = 1
    cluster_n: int = 1
    cluster_k: int = 1
    raster_m: int = 8

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, integer("GemmConfig", name, value, bits=32))

    @property
    def fields(self) -> tuple[int, ...]:
        """The attributes' values, in the order in which the native side takes them."""
        return dataclasses.astuple(self)


class Problem(NamedTuple):
    """What a kernel is chosen and compiled for, in the order in which the native side takes it.

    Attributes:
        op: index into OPS.
        num_groups: weight matrices; 1 for the dense operation.
        m: rows of A, of all groups together.
        expected_m: rows per group that are expected, 0 for m / num_groups.
        n: rows of one weight matrix.
        k: columns of A and B.
        num_sms: SMs the kernel may use; in the custom call 0 for all that the device has.
        a_type: index into FP8_TYPES.
        b_type: the same of B.
        batch_invariant: 1 if a row's bits are to depend on the row, its matrix, n and k alone.
        memory_gbs: peak rate of the GPU's memory, GB/s; the custom call does without.
    """

    op: int
    num_groups: int
    m: int
    expected_m: int
    n: int
    k: int
    num_sms: int
    a_type: int = 0
    b_type: int = 0
    batch_invariant: int = 0
    memory_gbs: int = H100_MEMORY_GBS


# It has room for every configuration there is: k-blocks for four CTAs to split, and SMs for them to
# run on.
_ROOMY_PROBLEM = Problem(op=0, num_groups=1, m=1, expected_m=0, n=8, k=4 * 128, num_sms=H100_SMS)


def select_config(
    m: SupportsIndex,
    n: SupportsIndex,
    k: SupportsIndex,
    *,
    num_sms: SupportsIndex = H100_SMS,
    memory_gbs: SupportsIndex = H100_MEMORY_GBS,
    op: str = "dense",
    num_groups: SupportsIndex = 1,
    expected_m: SupportsIndex | None = None,
    batch_invariant: bool = False,
) -> GemmConfig:
    """Returns the configuration that an operation of this shape runs with.

    The choice depends on nothing but the arguments: no measurement, no state, no GPU.

    Args:
        m: rows of A and D; of all groups together, so num_groups * max_m for op "masked".
        n: rows of one weight matrix, columns of D; a multiple of 8.
        k: columns of A and B; a multiple of 16.
        num_sms: SMs the kernel may use.
        memory_gbs: peak rate of the GPU's memory in GB/s, by default an H100's. It
            decides how much of the weights a kernel keeps in flight.
        op: "dense", "contiguous", "masked" or "ragged".
        num_groups: weight matrices; 1 for op "dense".
        expected_m: for op "masked", the operation's hint; by default max_m.
        batch_invariant: the operation's option.

    Raises:
        TypeError: a size is no integer.
        ValueError: there is no kernel for this problem.
    """
    problem = check_problem(
        "select_config",
        m,
        n,
        k,
        num_sms,
        op=op,
        num_groups=num_groups,
        expected_m=expected_m,
        batch_invariant=batch_invariant,
        memory_gbs=memory_gbs,
    )
    return GemmConfig(*_native.select_config(problem))


def legal_configs(
    m: SupportsIndex,
    n: SupportsIndex,
    k: SupportsIndex,
    *,
    num_sms: SupportsIndex = H100_SMS,
    memory_gbs: SupportsIndex = H100_MEMORY_GBS,
    op: str = "dense",
    num_groups: SupportsIndex = 1,
    expected_m: SupportsIndex | None = None,
    batch_invariant: bool = False,
) -> list[GemmConfig]:
    """Returns the configurations that `select_config` chooses among, in a fixed order.

    Args:
        m: as for `select_config`, like all that follow.
        n: rows of one weight matrix.
        k: columns of A and B.
        num_sms: SMs the kernel may use.
        memory_gbs: peak rate of the GPU's memory in GB/s, by default an H100's. It
            decides how much of the weights a kernel keeps in flight.
        op: the operation.
        num_groups: weight matrices.
        expected_m: the hint of op "masked".
        batch_invariant: the operation's option.

    Raises:
        TypeError: a size is no integer.
        ValueError: there is no kernel for this problem.
    """
    problem = check_problem(
        "legal_configs",
        m,
        n,
        k,
        num_sms,
        op=op,
        num_groups=num_groups,
        expected_m=expected_m,
        batch_invariant=batch_invariant,
        memory_gbs=memory_gbs,
    )
    return [GemmConfig(*fields) for fields in _native.candidates(problem)]


def smem_bytes(config: GemmConfig) -> int:
    """Returns the dynamic shared memory of one CTA, in bytes.

    Args:
        config: the kernel's configuration; no GPU is needed.

    Raises:
        TypeError: config is no GemmConfig.
        ValueError: no problem has a kernel of this configuration, for example because it needs
            more shared memory than a CTA can have.
    """
    check_config("smem_bytes", _ROOMY_PROBLEM, config)
    return _native.smem_bytes(config.fields)


def check_problem(
    function: str,
    m: SupportsIndex,
    n: SupportsIndex,
    k: SupportsIndex,
    num_sms: SupportsIndex,
    *,
    op: str = "dense",
    num_groups: SupportsIndex = 1,
    expected_m: SupportsIndex | None = None,
    batch_invariant: bool = False,
    memory_gbs: SupportsIndex = H100_MEMORY_GBS,
) -> Problem:
    """Returns the problem, or raises in the name of `function` if no kernel computes it.

    The arguments are those of `select_config`. An expected_m beyond the rows of a group is cut off.
    """
    if op not in OPS:
        raise ValueError(f"{function}: op must be one of {', '.join(OPS)}, got {op!r}")
    problem = Problem(
        op=OPS.index(op),
        num_groups=integer(function, "num_groups", num_groups, bits=32),
        m=integer(function, "m", m, bits=64),
        expected_m=0,
        n=integer(function, "n", n, bits=64),
        k=integer(function, "k", k, bits=64),
        num_sms=integer(function, "num_sms", num_sms, bits=32),
        batch_invariant=boolean(function, "batch_invariant", batch_invariant),
        memory_gbs=integer(function, "memory_gbs", memory_gbs, bits=32),
    )
    if problem.memory_gbs < 1:
        raise ValueError(f"{function}: memory_gbs must be at least 1, got {memory_gbs}")
    if expected_m is not None:
        if op != "masked":
            raise ValueError(f'{function}: expected_m is for op "masked", not for "{op}"')
        hint = integer(function, "expected_m", expected_m, bits=64)
        if hint < 1:
            raise ValueError(f"{function}: expected_m must be at least 1, got {hint}")
        max_m = problem.m // max(1, problem.num_groups)
        problem = problem._replace(expected_m=max(1, min(hint, max_m)))
    if why := _native.why_unsupported(problem):
        raise ValueError(f"{function}: {why}")
    return problem


def check_config(function: str, problem: Problem, config: GemmConfig) -> None:
    """Raises in the name of `function` if `config` is no kernel for the problem."""
    if not isinstance(config, GemmConfig):
        raise TypeError(f"{function}: config must be a GemmConfig, got {type(config).__name__}")
    if why := _native.why_illegal(problem, config.fields):
        raise ValueError(f"{function}: config: {why}")
