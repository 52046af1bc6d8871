"""Prints the include folders of XLA's FFI (jaxlib) and of cuda.h, as a CMake list."""

import importlib.util
import pathlib
import sys


def folders_of(package: str) -> list[pathlib.Path]:
    """The folders of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return []
    return [pathlib.Path(folder) for folder in spec.submodule_search_locations or ()]


def find(header: str, candidates: list[pathlib.Path], package: str) -> str:
    """The first candidate folder that has the header."""
    for folder in candidates:
        if (folder / header).is_file():
            return folder.as_posix()
    sys.exit(f"{header} not found: the build needs the PyPI package {package}")


jaxlib = [folder / "include" for folder in folders_of("jaxlib")]
# nvidia-cuda-runtime (CUDA 13) installs nvidia/cu13/include, nvidia-cuda-runtime-cu12 the other.
cuda = [
    folder / variant / "include"
    for folder in folders_of("nvidia")
    for variant in ("cu13", "cuda_runtime")
]
print(
    find("xla/ffi/api/ffi.h", jaxlib, "jaxlib"),
    find("cuda.h", cuda, "nvidia-cuda-runtime"),
    sep=";",
)
