"""The kernel compiler: where NVRTC is found, and what the extension compiles with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ToolchainInfo:
    """The compiler that kernels are built with, and where they are kept.

    Attributes:
        compiler: "NVRTC", or "NVCC" when DG_NVCC_COMPILER is set.
        version: The compiler's version, such as "13.0".
        path: The shared library or executable.
        cache_dir: DG_CACHE_DIR or its default; cubins lie in its folder `cache`. Empty when
            there is neither the variable nor a home folder.
    """

    compiler: str
    version: str
    path: str
    cache_dir: str


def locate_nvrtc() -> str:
    """Finds NVRTC the way JAX's own CUDA libraries are found, and loads it.

    NVIDIA's pathfinder looks into the installed pip packages, then conda, the system's library
    folders and CUDA_HOME. The extension calls this at the first compile, never at import.

    Returns:
        The absolute path of libnvrtc.

    Raises:
        RuntimeError: "NVRTC not found: ..." with what was looked for and how to install it.
    """
    try:
        from cuda import pathfinder  # type: ignore[import-untyped, unused-ignore]

        path: str | None = pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path
    except (ImportError, RuntimeError) as error:
        # Pathfinder's reason may run over many lines: one per place it looked at.
        reason = " ".join(str(error).split())
        raise RuntimeError(
            "NVRTC not found: looked for libnvrtc with cuda-pathfinder (pip packages, conda, "
            "system libraries, CUDA_HOME). Install it with: pip install "
            '"jax_deepgemm[cuda13]" (or cuda12 for CUDA 12). '
            f"{type(error).__name__}: {reason}"
        ) from error
    if path is None:
        raise RuntimeError("NVRTC not found: it is loaded already, but from an unknown path")
    return path


def toolchain() -> ToolchainInfo:
    """Loads the kernel compiler and says which one it is; needs no GPU.

    Returns:
        The compiler, its version and path, and the cache folder.

    Raises:
        RuntimeError: NVRTC cannot be found or loaded, or DG_NVCC_COMPILER is not an nvcc.
    """
    from jax_deepgemm.ffi import _native

    return ToolchainInfo(**_native.toolchain())
