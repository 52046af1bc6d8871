"""The native extension: loaded, checked against the runtime, and registered with XLA.

Importing this package loads neither CUDA nor a compiler; both are found when a GPU program is
compiled.
"""

import dataclasses
import importlib.metadata
import pathlib
import re
from typing import TYPE_CHECKING

import jax
import jaxlib

from jax_deepgemm.arguments import H100_SMS
from jax_deepgemm.ffi import _native
from jax_deepgemm.ffi.toolchain import ToolchainInfo, locate_nvrtc, toolchain

if TYPE_CHECKING:
    from jax_deepgemm.config import GemmConfig

__all__ = ["CUSTOM_CALL_TARGETS", "KernelReport", "ToolchainInfo", "compile_kernel", "toolchain"]

CUSTOM_CALL_TARGETS: tuple[str, ...] = (_native.GEMM_TARGET, _native.QUANTIZE_TARGET)
"""The custom calls that this package's operations become on a GPU. `jax.export.export` wants their
names: disabled_checks=[DisabledSafetyCheck.custom_call(name) for name in CUSTOM_CALL_TARGETS]."""


def _runtime_api_version() -> tuple[int, int]:
    """The FFI API version of the installed jaxlib, from the header it ships."""
    header = pathlib.Path(jaxlib.__file__).parent / "include/xla/ffi/api/c_api.h"
    text = header.read_text()

    def number(name: str) -> int:
        match = re.search(rf"#define XLA_FFI_API_{name} (\d+)", text)
        if match is None:
            raise ImportError(f"jax_deepgemm: no XLA_FFI_API_{name} in {header}")
        return int(match.group(1))

    return number("MAJOR"), number("MINOR")


def _check_api_version(built: tuple[int, int], runtime: tuple[int, int]) -> None:
    """Raises ImportError if the extension's FFI API is newer than what jaxlib accepts."""
    if built > runtime:
        raise ImportError(
            f"jax_deepgemm was built against XLA FFI API {built[0]}.{built[1]}, which jaxlib "
            f"{importlib.metadata.version('jaxlib')} (API {runtime[0]}.{runtime[1]}) does not "
            "accept: upgrade jaxlib "
            "(pip install -U jax jaxlib) or reinstall jax_deepgemm with "
            "`pip install --force-reinstall --no-cache-dir jax_deepgemm`"
        )


_check_api_version(_native.FFI_API_VERSION, _runtime_api_version())
_native.set_nvrtc_locator(locate_nvrtc)
# XLA wants a state's type before the handlers that use it. The platform is spelt "CUDA" here and
# "cuda" in lowering rules.
jax.ffi.register_ffi_type(_native.GEMM_STATE_TYPE, _native.gemm_state_type(), platform="CUDA")
jax.ffi.register_ffi_target(_native.GEMM_TARGET, _native.gemm_handlers(), platform="CUDA")
jax.ffi.register_ffi_type(
    _native.QUANTIZE_STATE_TYPE, _native.quantize_state_type(), platform="CUDA"
)
jax.ffi.register_ffi_target(_native.QUANTIZE_TARGET, _native.quantize_handlers(), platform="CUDA")


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """What compiling one kernel gave.

    Attributes:
        name: the kernel's symbol, as profilers show it.
        registers: per thread at entry, before warpgroups exchange registers.
        spill_bytes: bytes per thread that ptxas spilled.
        stack_bytes: bytes of local memory per thread.
        smem_bytes: dynamic shared memory per CTA.
        wgmma_serialized: ptxas could not keep wgmma asynchronous, or ignored setmaxnreg.
        compile_seconds: wall time of the compile, 0 for a cache hit.
        source: "compiled", "disk" or "memory".
        log: the compiler's messages.
        path: the cache file, "" if there is none.
    """

    name: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    smem_bytes: int
    wgmma_serialized: bool
    compile_seconds: float
    source: str
    log: str
    path: str


def compile_kernel(
    n: int,
    k: int,
    config: "GemmConfig",
    *,
    m: int = 1,
    num_sms: int = H100_SMS,
    op: str = "dense",
    a_dtype: str = "float8_e4m3fn",
    b_dtype: str = "float8_e4m3fn",
    batch_invariant: bool = False,
) -> KernelReport:
    """Compiles a kernel for sm_90a through the JIT and its caches; needs no GPU.

    Args:
        n: rows of one weight matrix; a compile-time constant of the kernel, as k is.
        k: columns of A and B.
        config: see `GemmConfig`.
        m: rows of A. One kernel serves every m and every number of groups, but for dense
            products whose m is more than `config.block_m` and no multiple of it: these share
            another one, unless `config.cluster_n` is 2.
        num_sms: SMs the kernel may use.
        op: the operation that runs the kernel: "dense", "contiguous", "masked" or "ragged".
        a_dtype: what A holds: "float8_e4m3fn" or "float8_e5m2".
        b_dtype: what B holds.
        batch_invariant: the operation's option.

    Raises:
        TypeError: config is no GemmConfig, or another argument no integer.
        ValueError: there is no kernel for these sizes, or the configuration is illegal for them.
        RuntimeError: there is no compiler, or it failed; the message has its log.
    """
    # Which imports this package.
    from jax_deepgemm.config import FP8_TYPES, check_config, check_problem

    for argument, dtype in (("a_dtype", a_dtype), ("b_dtype", b_dtype)):
        if dtype not in FP8_TYPES:
            raise ValueError(
                f"compile_kernel: {argument} must be {' or '.join(FP8_TYPES)}, got {dtype!r}"
            )
    problem = check_problem(
        "compile_kernel", m, n, k, num_sms, op=op, batch_invariant=batch_invariant
    )._replace(a_type=FP8_TYPES.index(a_dtype), b_type=FP8_TYPES.index(b_dtype))
    check_config("compile_kernel", problem, config)
    text, headers = _native.kernel_source(problem, config.fields)
    name = _native.kernel_name(problem, config.fields)
    result = _native.jit_compile(name, name, text, headers)
    resources = result["resources"]
    return KernelReport(
        name=name,
        registers=resources["registers"],
        spill_bytes=resources["spill_bytes"],
        stack_bytes=resources["stack_bytes"],
        smem_bytes=_native.smem_bytes(config.fields),
        wgmma_serialized=resources["wgmma_serialized"],
        compile_seconds=result["compile_seconds"],
        source=result["origin"],
        log=result["log"],
        path=result["path"],
    )
