"""The kernels that selection can ask for compile to sound sm_90a code; no GPU is needed.

What NVRTC and ptxas do wrong in silence is a failure here: registers spilled, local memory, tensor
core instructions put one after the other, more shared memory than a Hopper SM lends to a block.
"""

import collections
import concurrent.futures
import math
import os
import pathlib
import random
import re
import subprocess
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cuda.pathfinder
import pytest

import jax_deepgemm
from jax_deepgemm import ffi
from jax_deepgemm.arguments import H100_MEMORY_GBS, H100_SMS, H200_MEMORY_GBS
from jax_deepgemm.cli.shapes import NAMED_SHAPES, Shape

# Those and dense ones whose last row of tiles is lower than the others.
SHAPES = (
    *NAMED_SHAPES["seed"],
    *NAMED_SHAPES["ragged"],
    *(Shape.dense(m, 7168, 2048) for m in (72, 200, 1000)),
)

# SMs and memory rates: H100 SXM, H200; and by datasheets, rounded, H100 PCIe, H20.
GPUS = ((H100_SMS, H100_MEMORY_GBS), (H100_SMS, H200_MEMORY_GBS), (114, 2000), (78, 4000))

# What one block may have on sm_90: 228 KiB of an SM less the 1 KiB that the system keeps.
MAX_SMEM_BYTES = 232_448

# How many configurations that selection may choose, beyond those that it does, are compiled.
NUM_SAMPLED = 96


class Kernel(NamedTuple):
    """What a kernel is compiled for; of m only whether dense tiles differ in height."""

    op: str
    n: int
    k: int
    config: jax_deepgemm.GemmConfig
    num_sms: int
    m: int = 1


class Build(NamedTuple):
    """A compiled kernel, and its instructions in their order, where that can be told."""

    report: ffi.KernelReport
    opcodes: list[str] | None


def label(kernel: Kernel) -> str:
    """Names a kernel in a test's id."""
    op, n, k, c, _, m = kernel
    tile = f"bm{c.block_m}-bn{c.block_n}-st{c.num_stages}-wg{c.math_warpgroups}"
    return f"{op}-m{m}-n{n}-k{k}-{tile}-cl{c.cluster_m}x{c.cluster_n}x{c.cluster_k}-ra{c.raster_m}"


def selected() -> list[object]:
    """Returns the kernel of every shape on every GPU, as pytest parameters."""
    return [
        pytest.param(
            Kernel(
                shape.op,
                shape.n,
                shape.k,
                jax_deepgemm.select_config(
                    **shape.selection, num_sms=num_sms, memory_gbs=memory_gbs
                ),
                num_sms,
                shape.m if shape.op == "dense" else 1,
            ),
            id=f"{shape}-sms{num_sms}-gbs{memory_gbs}",
        )
        for num_sms, memory_gbs in GPUS
        for shape in SHAPES
    ]


def sampled() -> list[object]:
    """Returns kernels of legal configurations, a fixed random spread of them, as parameters."""
    kernels = sorted(
        {
            Kernel(shape.op, shape.n, shape.k, config, H100_SMS)
            for shape in SHAPES
            for config in jax_deepgemm.legal_configs(**shape.selection, num_sms=H100_SMS)
        },
        key=repr,
    )
    chosen = random.Random(0).sample(kernels, min(NUM_SAMPLED, len(kernels)))
    dense = [kernel for kernel in chosen if kernel.op == "dense"]
    chosen += [kernel._replace(m=kernel.config.block_m + 1) for kernel in dense[::3]]
    return [pytest.param(kernel, id=label(kernel)) for kernel in chosen]


every_kernel = pytest.mark.parametrize("kernel", selected() + sampled())


def read_opcodes(listing: str) -> list[str]:
    """Returns the opcodes, modifiers dropped, in a listing of nvdisasm.

    WARPGROUP keeps its first modifier, which says what it does (ARRIVE, DEPBAR), and BRA.DIV, which
    is taken where a warp's lanes have diverged, is told from BRA.
    """
    return re.findall(
        r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?(WARPGROUP\.\w+|BRA\.DIV|\w+)",
        listing,
        flags=re.MULTILINE,
    )


def build(kernel: Kernel, disassembler: str | None, folder: pathlib.Path) -> Build:
    """Compiles a kernel, and disassembles it where there is a disassembler."""
    op, n, k, config, num_sms, m = kernel
    report = ffi.compile_kernel(n, k, config, m=m, num_sms=num_sms, op=op)
    if disassembler is None:
        return Build(report, None)
    # The cubin is an ELF file inside the cache file.
    cached = pathlib.Path(report.path).read_bytes()
    cubin = folder / f"{pathlib.Path(report.path).name}.cubin"
    cubin.write_bytes(cached[cached.index(b"\x7fELF") :])
    done = subprocess.run([disassembler, "-c", cubin], capture_output=True, text=True, check=True)
    return Build(report, read_opcodes(done.stdout))


@pytest.fixture(scope="module")
def build_of(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Kernel], Build]]:
    """Compiles the kernels of all chosen tests in threads, and hands each out when it is ready."""
    try:
        cuda.pathfinder.load_nvidia_dynamic_lib("nvrtc")
    except cuda.pathfinder.DynamicLibNotFoundError:
        assert "CI" not in os.environ, "continuous integration must have NVRTC"
        pytest.skip("NVRTC is not installed (pip install 'jax_deepgemm[test]' brings it)")
    disassembler = cuda.pathfinder.find_nvidia_binary_utility("nvdisasm")
    folder = tmp_path_factory.mktemp("cubins")
    kernels = {
        item.callspec.params["kernel"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and "build_of" in item.fixturenames
    }
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        builds = {kernel: pool.submit(build, kernel, disassembler, folder) for kernel in kernels}
        yield lambda kernel: builds[kernel].result()
        pool.shutdown(cancel_futures=True)


@every_kernel
def test_resources(kernel: Kernel, build_of: Callable[[Kernel], Build]) -> None:
    report = build_of(kernel).report
    assert report.spill_bytes == 0, f"registers spill: {report.log}"
    assert report.stack_bytes == 0, f"local memory without spills (an array indexed): {report.log}"
    assert 0 < report.smem_bytes <= MAX_SMEM_BYTES
    assert report.smem_bytes == jax_deepgemm.smem_bytes(kernel.config)
    # ptxas' advisories on wgmma and setmaxnreg are numbered C75xx: serialised, ignored, inserted.
    assert "(C75" not in report.log
    assert not report.wgmma_serialized


@every_kernel
def test_instructions(kernel: Kernel, build_of: Callable[[Kernel], Build]) -> None:
    opcodes = build_of(kernel).opcodes
    if opcodes is None:
        assert "CI" not in os.environ, "continuous integration must have nvdisasm"
        pytest.skip("nvdisasm is not installed (pip install 'jax_deepgemm[test]' brings it)")
    count = collections.Counter(opcodes)
    assert count["QGMMA"] > 0, "no FP8 tensor core instruction"
    assert count["UTMALDG"] > 0, "no TMA load"
    assert count["UTMASTG"] > 0, "no TMA store"
    assert count["LDL"] + count["STL"] == 0, "local memory is used"
    # A batch of wgmma covers 128 of k, 32 an instruction, and is waited for once.
    assert count["WARPGROUP.DEPBAR"] <= count["QGMMA"] // 2, "wgmma is serialised"
    # A loop of which it does keeps addresses in vector registers: m = 1 took a fifth longer.
    assert count["BRA.DIV"] == 0, "ptxas takes the lanes of a warp for diverged"
    # What every kernel waits for first is the shortest way into it.
    assert opcodes.index("UTMALDG") < opcodes.index("QGMMA"), "the loads' code is behind the math's"
    c = kernel.config
    if c.block_m == 128 and c.block_n > 128 and kernel.k >= 12 * 128 * c.cluster_k:
        # A loop for each place in a block of 128 columns at which a warpgroup's may begin. Beyond
        # 192 it has half of a tile's, in two waves.
        waves = 1 if c.block_n <= 192 else 2
        assert count["QGMMA"] == 4 * waves * 128 // math.gcd(c.block_n // waves, 128)
        # Contiguous groups choose rows where a tile ends.
        assert count["FSEL"] == 0 or kernel.op == "contiguous", (
            "scales are chosen between additions"
        )


def test_listing_is_read() -> None:
    listing = """
        .headerflags @"EF_CUDA_SM90"
        /*0010*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR4], RZ, !UPT ;
        /*0020*/              @!P0 QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24, gsb0 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0040*/             @!UP1 UTMALDG.2D [UR8], [UR4] ;
        /*12f0*/               @P2 STL.64 [R1+0x8], R2 ;
        /*1300*/                   BRA.DIV UR4, `(.L_x_44) ;
        /*1310*/              @!P0 BRA `(.L_x_45) ;
    """
    assert read_opcodes(listing) == [
        "QGMMA",
        "QGMMA",
        "WARPGROUP.DEPBAR",
        "UTMALDG",
        "STL",
        "BRA.DIV",
        "BRA",
    ]
