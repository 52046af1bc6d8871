"""Kernel configurations and their selection."""

import dataclasses

from jax_deepgemm.ffi import _native

_H100_SMS = 132  # streaming multiprocessors of an H100 or H200 SXM module


@dataclasses.dataclass(frozen=True)
class GemmConfig:
    """How one GEMM kernel is specialised: tile, pipeline and cluster.

    Which combinations exist depends on the problem; `legal_configs` lists those worth running and
    an operation that is given another one says why it does not.

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

    @property
    def fields(self) -> tuple[int, ...]:
        """The attributes' values, in the order in which the native side takes them."""
        return dataclasses.astuple(self)


def select_config(m: int, n: int, k: int, *, num_sms: int = _H100_SMS) -> GemmConfig:
    """Returns the configuration that an operation of this shape runs with.

    The choice depends on nothing but the arguments: no measurement, no state, no GPU.

    Args:
        m: rows of A and D.
        n: rows of B, columns of D; a multiple of 8.
        k: columns of A and B; a multiple of 16.
        num_sms: SMs the kernel may use.

    Raises:
        ValueError: there is no kernel for this shape.
    """
    _check_supported("select_config", m, n, k, num_sms)
    return GemmConfig(*_native.select_config(m, n, k, num_sms))


def legal_configs(m: int, n: int, k: int, *, num_sms: int = _H100_SMS) -> list[GemmConfig]:
    """Returns the configurations that `select_config` chooses among, in a fixed order.

    Args:
        m: rows of A and D.
        n: rows of B, columns of D; a multiple of 8.
        k: columns of A and B; a multiple of 16.
        num_sms: SMs the kernel may use.

    Raises:
        ValueError: there is no kernel for this shape.
    """
    _check_supported("legal_configs", m, n, k, num_sms)
    return [GemmConfig(*fields) for fields in _native.candidates(m, n, k, num_sms)]


def _check_supported(function: str, m: int, n: int, k: int, num_sms: int) -> None:
    if why := _native.why_unsupported(m, n, k, num_sms):
        raise ValueError(f"{function}: {why}")


def smem_bytes(config: GemmConfig) -> int:
    """Returns the dynamic shared memory of one CTA, in bytes.

    Args:
        config: the kernel's configuration; no GPU is needed.
    """
    return _native.smem_bytes(config.fields)
