"""Kernel configurations and their selection."""

import dataclasses

from jax_deepgemm.arguments import H100_SMS, integer
from jax_deepgemm.ffi import _native

# m, n, k and SMs of a problem that has room for every configuration there is: k-blocks for four
# CTAs to split, and SMs for them to run on.
_ROOMY_PROBLEM = (1, 8, 4 * 128, H100_SMS)


@dataclasses.dataclass(frozen=True)
class GemmConfig:
    """How one GEMM kernel is specialised: tile, pipeline and cluster.

    Which combinations exist depends on the problem; `legal_configs` lists those worth running and
    an operation that is given another one says why it does not. All that is checked here is that
    every field is an integer: TypeError or ValueError otherwise, in the name of the field.

    Attributes:
        block_m: rows of D per tile: 64, 128 or 256.
        block_n: columns of D per tile: a multiple of 8 up to 256.
        num_stages: depth of the shared-memory ring, in k-blocks of 128.
        math_warpgroups: warpgroups of 128 threads that multiply (1 or 2), beside the producer.
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


def select_config(m: int, n: int, k: int, *, num_sms: int = H100_SMS) -> GemmConfig:
    """Returns the configuration that an operation of this shape runs with.

    The choice depends on nothing but the arguments: no measurement, no state, no GPU.

    Args:
        m: rows of A and D.
        n: rows of B, columns of D; a multiple of 8.
        k: columns of A and B; a multiple of 16.
        num_sms: SMs the kernel may use.

    Raises:
        TypeError: an argument is no integer.
        ValueError: there is no kernel for this shape.
    """
    problem = check_problem("select_config", m, n, k, num_sms)
    return GemmConfig(*_native.select_config(*problem))


def legal_configs(m: int, n: int, k: int, *, num_sms: int = H100_SMS) -> list[GemmConfig]:
    """Returns the configurations that `select_config` chooses among, in a fixed order.

    Args:
        m: rows of A and D.
        n: rows of B, columns of D; a multiple of 8.
        k: columns of A and B; a multiple of 16.
        num_sms: SMs the kernel may use.

    Raises:
        TypeError: an argument is no integer.
        ValueError: there is no kernel for this shape.
    """
    problem = check_problem("legal_configs", m, n, k, num_sms)
    return [GemmConfig(*fields) for fields in _native.candidates(*problem)]


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


def check_problem(function: str, m: int, n: int, k: int, num_sms: int) -> tuple[int, int, int, int]:
    """Returns (m, n, k, num_sms), or raises in the name of `function` if no kernel computes it."""
    problem = (
        integer(function, "m", m, bits=64),
        integer(function, "n", n, bits=64),
        integer(function, "k", k, bits=64),
        integer(function, "num_sms", num_sms, bits=32),
    )
    if why := _native.why_unsupported(*problem):
        raise ValueError(f"{function}: {why}")
    return problem


def check_config(function: str, problem: tuple[int, int, int, int], config: GemmConfig) -> None:
    """Raises in the name of `function` if `config` is no kernel for (m, n, k, num_sms)."""
    if not isinstance(config, GemmConfig):
        raise TypeError(f"{function}: config must be a GemmConfig, got {type(config).__name__}")
    if why := _native.why_illegal(*problem, config.fields):
        raise ValueError(f"{function}: config: {why}")
