"""The kernels' barriers, on a CPU.

The device code itself, compiled against a model of what it asks of the GPU (tests/emulator, whose
machine.h says what is modelled), where threads and copies take any time they like: what a GPU does
wrong once in a million launches, if at all, is wrong here within a few.
"""

import dataclasses
import functools
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent import futures
from typing import NamedTuple

import pytest

from jax_deepgemm import GemmConfig
from jax_deepgemm.config import OPS

ROOT = pathlib.Path(__file__).parents[2]
EMULATOR = ROOT / "tests" / "emulator"
DENSE, CONTIGUOUS, MASKED, RAGGED = range(len(OPS))
PROBLEMS = 30
MAX_M = 300


class Kernel(NamedTuple):
    grouping: int
    n: int
    k: int
    config: GemmConfig
    batch_invariant: int
    has_parts: int
    arrivals_per_warp: int  # 32 as racecheck wants them
    streams_only: int


def kernel(
    grouping: int,
    n: int,
    k: int,
    *config: int,
    batch_invariant: int = 0,
    has_parts: int | None = None,
    arrivals_per_warp: int = 1,
    streams_only: int = 0,
    **fields: int,
) -> Kernel:
    """A kernel whose configuration is given by its first fields and the others' names."""
    whole = GemmConfig(*config, **{"raster_m": 2, **fields})
    if has_parts is None:
        has_parts = whole.cluster_n == 1 and (grouping != CONTIGUOUS or whole.block_m > 128)
    return Kernel(
        grouping, n, k, whole, batch_invariant, int(has_parts), arrivals_per_warp, streams_only
    )


class Fault(NamedTuple):
    file: str
    old: str
    new: str
    kernel: Kernel
    message: str  # what the emulator says of it, a regular expression


# Both kinds of ring (one or two accumulators), rows and columns split over warpgroups, each kind of
# cluster, and each grouping with the epilogue that goes with it; few stages, so that they wrap.
KERNELS = {
    "64x64": kernel(DENSE, 136, 304, 64, 64, 4, 1, raster_m=8),
    "64x64, no parts": kernel(DENSE, 136, 304, 64, 64, 4, 1, has_parts=0),
    "64x64, two stages": kernel(DENSE, 136, 1296, 64, 64, 2, 1),
    "64x48, two warpgroups": kernel(DENSE, 104, 656, 64, 48, 3, raster_m=1),
    "128x72": kernel(DENSE, 392, 144, 128, 72, 3, batch_invariant=1),
    "256x128": kernel(DENSE, 392, 272, 256, 128, 2),
    "256x128, shared B, SMs left idle": kernel(DENSE, 392, 2064, 256, 128, 2, cluster_m=2),
    "128x176, a loop for each offset": kernel(DENSE, 704, 1424, 128, 176, 2),
    "128x224, a loop for each offset": kernel(MASKED, 456, 1424, 128, 224, 2),
    "128x256": kernel(DENSE, 392, 272, 128, 256, 2),
    "128x96, shared B": kernel(DENSE, 264, 400, 128, 96, 3, cluster_m=2),
    "64x64, shared A": kernel(DENSE, 264, 400, 64, 64, 3, 1, cluster_n=2),
    "256x64, shared A": kernel(DENSE, 264, 272, 256, 64, 2, cluster_n=2, arrivals_per_warp=32),
    "64x64, a k-block": kernel(DENSE, 264, 112, 64, 64, 2, 1),
    "64x64, k in 2": kernel(DENSE, 264, 656, 64, 64, 2, 1, cluster_k=2),
    "64x32, k in 2": kernel(DENSE, 136, 656, 64, 32, 3, 1, cluster_k=2),
    "128x112, k in 4": kernel(DENSE, 136, 656, 128, 112, 2, cluster_k=4, arrivals_per_warp=32),
    "contiguous, 64x64": kernel(CONTIGUOUS, 136, 304, 64, 64, 4, 1, raster_m=8),
    "contiguous, 256x64": kernel(CONTIGUOUS, 136, 400, 256, 64, 3),
    "contiguous, 256x64, SMs left idle": kernel(CONTIGUOUS, 136, 2064, 256, 64, 2),
    "contiguous, 128x96, shared A": kernel(CONTIGUOUS, 264, 272, 128, 96, 2, cluster_n=2),
    "masked, 128x224, shared A": kernel(MASKED, 264, 272, 128, 224, 2, cluster_n=2),
    "masked, 64x112": kernel(MASKED, 136, 304, 64, 112, 3, 1, raster_m=8),
    "masked, 64x64, k in 4": kernel(MASKED, 136, 656, 64, 64, 2, 1, cluster_k=4),
    "ragged, 64x64": kernel(RAGGED, 136, 304, 64, 64, 2, 1, raster_m=8),
    "ragged, 256x64, shared A": kernel(RAGGED, 136, 272, 256, 64, 3, cluster_n=2, raster_m=3),
    "ragged, 64x32, k in 2": kernel(RAGGED, 40, 656, 64, 32, 3, cluster_k=2, raster_m=32),
    "loads alone, shared B": kernel(DENSE, 264, 400, 128, 96, 3, cluster_m=2, streams_only=1),
    "loads alone, k in 4": kernel(MASKED, 136, 656, 64, 64, 2, 1, cluster_k=4, streams_only=1),
}

# Each in a copy of the sources; what the emulator cannot see of these, it cannot see of others.
FAULTS = {
    "a stage is released while a wgmma reads it": Fault(
        "mainloop.cuh",
        "    drain<1>(done);\n    release(stage);\n",
        "    release(stage);\n    drain<1>(done);\n",
        KERNELS["64x64, two stages"],
        "of D is",
    ),
    "a stage is loaded before it is released": Fault(
        "gemm.cuh",
        "mbarrier_wait(smem.empty(stage), ring.parity() ^ 1);",
        "",
        KERNELS["ragged, 64x64"],
        "more arrivals|in a later phase|of D is",
    ),
    "a column of tiles begins in its peer's half of k": Fault(
        "scheduler.cuh",
        "? begin_ + count_ / 2 :",
        "? begin_ + count_ :",
        KERNELS["64x32, k in 2"],
        "what are not scales|of D is",
    ),
    "a tile's last part is not copied": Fault(
        "gemm.cuh",
        "(max(tile_rows, 1) + last) & ~last",
        "max(last + 1, tile_rows & ~last)",
        KERNELS["ragged, 64x64"],
        "of D is",
    ),
    "the last row of tiles is a row short": Fault(
        "gemm.cuh",
        "is_whole_ ? config::kBlockM : params.part_rows;\n    } else {",
        "is_whole_ ? config::kBlockM : params.part_rows - 1;\n    } else {",
        KERNELS["64x64"],
        "more bytes|in a later phase|of D is|a deadlock",
    ),
    "the wgmma before is not waited for": Fault(
        "mainloop.cuh",
        "drain<1>(done);",
        "drain<2>(done);",
        KERNELS["64x64, two stages"],
        "of D is",
    ),
    "a tile is announced where the last one still stands": Fault(
        "pipeline.cuh",
        "slot == config::kNumStages ?",
        "slot == config::kNumStages - 1 ?",
        KERNELS["64x64, a k-block"],
        "of D (is|was)|a deadlock",
    ),
    "scales are loaded by TMA before their stage is released": Fault(
        "gemm.cuh",
        "mbarrier_wait(smem.empty(stage), ring.parity() ^ 1);\n"
        "    if (elect_sync()) {\n      mbarrier_expect_tx(full, bytes);",
        "if (elect_sync()) {\n      mbarrier_expect_tx(full, bytes);",
        KERNELS["64x64, two stages"],
        "more arrivals|in a later phase|of D is",
    ),
    "scales are loaded by lanes before their stage is released": Fault(
        "gemm.cuh",
        "mbarrier_wait(smem.empty(stage), ring.parity() ^ 1);\n#pragma unroll\n    for (int row",
        "#pragma unroll\n    for (int row",
        KERNELS["64x64, two stages"],
        "more arrivals|in a later phase|of D is",
    ),
    "the producers do not wait for the barriers": Fault(
        "gemm.cuh",
        "barrier_sync(begin, kBeginThreads);",
        "",
        KERNELS["64x64"],
        "there is no mbarrier at .* yet",
    ),
    "the producers do not wait for the cluster's barriers": Fault(
        "gemm.cuh",
        "barrier_cluster_wait();  // for the peers' as well, which copies signal",
        "",
        KERNELS["128x96, shared B"],
        "there is no mbarrier at .* yet",
    ),
    "an arrival too few is expected": Fault(
        "gemm.cuh",
        "copies_by_tma(params, 0) ? 1 : 32;",
        "copies_by_tma(params, 0) ? 1 : 31;",
        KERNELS["64x64"],
        "more arrivals|in a later phase|a CTA that has ended",
    ),
    "scales are copied by TMA from any address": Fault(
        "gemm.cuh",
        "(params.sfa_pitch | m) % 4 == 0 && ",
        "",
        KERNELS["64x64"],
        "a load begins inside 16 bytes",
    ),
    "scales of a tile that begins at any row are copied by TMA": Fault(
        "gemm.cuh",
        "kTilesAreAligned ? 0 : tile.m",
        "0",
        KERNELS["ragged, 64x64"],
        "a load begins inside 16 bytes",
    ),
    "partial sums are overwritten before they are read": Fault(
        "split_k.cuh",
        "mbarrier_wait(barrier_, parity_ ^ 1);",
        "",
        KERNELS["ragged, 64x32, k in 2"],
        "of D is|in a later phase|a deadlock",
    ),
    "a CTA ends before its peers": Fault(
        "gemm.cuh",
        "  if constexpr (kMulticast > 1) {\n    barrier_cluster_arrive();",
        "  if constexpr (false) {\n    barrier_cluster_arrive();",
        KERNELS["128x96, shared B"],
        "a remote arrival reaches a CTA that has ended",
    ),
}

Runs = dict[str, futures.Future[subprocess.CompletedProcess[str]]]


@functools.cache
def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if found is None:
        pytest.skip("there is no C++ compiler")
    return found


def run(*command: str | pathlib.Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def build_object(source: pathlib.Path, directory: pathlib.Path, *options: str) -> pathlib.Path:
    path = directory / f"{source.stem}.o"
    run(compiler(), "-std=c++20", f"-I{ROOT}", *options, "-c", "-o", path, source)
    return path


def copy_kernels(directory: pathlib.Path, fault: Fault | None = None) -> None:
    """csrc/kernels, but for what only a CUDA compiler understands."""
    for source in (ROOT / "csrc" / "kernels").iterdir():
        text = source.read_text()
        if fault is not None and fault.file == source.name:
            assert fault.old in text, "the kernel has changed: where is this fault now?"
            text = text.replace(fault.old, fault.new)
        text = text.replace(
            "extern __shared__ __align__(1024) char dynamic_smem[];",
            "char* dynamic_smem = nullptr;",
        )
        text = text.replace('"+f"', '"+m"')
        (directory / source.name).write_text(text)
    shutil.copy(EMULATOR / "ptx.cuh", directory)


@pytest.fixture(scope="module")
def machine() -> Iterator[list[pathlib.Path]]:
    """What is the same for all kernels, compiled."""
    compiler()  # or skip
    sources = [EMULATOR / "machine.cc", EMULATOR / "main.cc"]
    sources += [ROOT / "csrc" / "gemm" / name for name in ("config.cc", "tensor_maps.cc")]
    with tempfile.TemporaryDirectory() as directory, futures.ThreadPoolExecutor() as pool:
        yield list(pool.map(lambda s: build_object(s, pathlib.Path(directory), "-O2"), sources))


def emulate(
    kernel: Kernel, machine: list[pathlib.Path], fault: Fault | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs random problems; the same ones every time."""
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        copy_kernels(directory, fault)
        numbers = kernel._asdict() | dataclasses.asdict(kernel.config)
        del numbers["config"]
        constants = [f"-D{name.upper()}={value}" for name, value in numbers.items()]
        # The kernels' pragmas and asm are not for this compiler to warn of.
        options = ["-O1", "-w", f"-I{directory}", *constants]
        program = directory / "emulator"
        kernel_object = build_object(EMULATOR / "kernel.cc", directory, *options)
        run(compiler(), "-o", program, kernel_object, *machine)
        return subprocess.run(
            [program, "0", str(PROBLEMS), str(MAX_M)],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, machine: list[pathlib.Path]) -> Iterator[Runs]:
    """The runs of all tests that were asked for, side by side."""
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        started = {}
        for item in request.session.items:
            name = getattr(item, "callspec", None) and item.callspec.params.get("emulated")
            if name in KERNELS:
                started[name] = pool.submit(emulate, KERNELS[name], machine)
            elif name in FAULTS:
                fault = FAULTS[name]
                started[name] = pool.submit(emulate, fault.kernel, machine, fault)
        yield started
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("emulated", KERNELS)
def test_kernel(emulated: str, runs: Runs) -> None:
    done = runs[emulated].result()
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("emulated", FAULTS)
def test_fault_is_noticed(emulated: str, runs: Runs) -> None:
    done = runs[emulated].result()
    assert done.returncode == 1, "the emulator sees nothing wrong"
    assert re.search(FAULTS[emulated].message, done.stderr), done.stderr
