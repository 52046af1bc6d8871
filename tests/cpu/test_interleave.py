"""The FFMA interleaver on cubins from NVRTC: what it changes, and all that it must not change."""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import cuda.pathfinder
import pytest

from jax_deepgemm.ffi import _native
from tests.jit_process import nvrtc, run

# 128 bits, little endian: opcode 11-0, yield 109 (0 = yield), reuse 125-122.
FFMA = 0x223
OPCODE = 0xFFF
NO_YIELD = 1 << 109
REUSE = 0xF << 122

# Promotion as in a GEMM: two scales of a thread, each for half of its partial sums, here kept in
# registers. Without wgmma ptxas leaves the yield bits alone.
PROMOTE = """
extern "C" __global__ void __launch_bounds__(256) promote(float* x, const float* s) {
  float total[64], part[64];
  for (int i = 0; i < 64; ++i) part[i] = total[i] = x[i * 256 + threadIdx.x];
#pragma unroll 1
  for (int k = 0; k < 1000; ++k) {
    __syncthreads();
    float s0 = s[2 * k], s1 = s[2 * k + 1];
    for (int i = 0; i < 64; ++i) total[i] += (i & 2 ? s1 : s0) * part[i];
  }
  for (int i = 0; i < 64; ++i) x[i * 256 + threadIdx.x] = total[i];
}
extern "C" __global__ void __launch_bounds__(256) few(float* x, float a, float b) {
  float v[8];
  for (int i = 0; i < 8; ++i) v[i] = x[i * 256 + threadIdx.x];
#pragma unroll 1
  for (int k = 0; k < 1000; ++k) {
    __syncthreads();
    for (int i = 0; i < 8; ++i) v[i] = v[i] * a + b;
  }
  for (int i = 0; i < 8; ++i) x[i * 256 + threadIdx.x] = v[i];
}
"""


@pytest.fixture(scope="module")
def cubin(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """PROMOTE as NVRTC compiles it."""
    nvrtc()
    cache = tmp_path_factory.mktemp("cache")
    body = f"print(native.jit_compile('promote', 'promote', '''{PROMOTE}''', {{}})['image'].hex())"
    return bytes.fromhex(run(body, cache, DG_DISABLE_FFMA_INTERLEAVE="1").stdout)


def words(image: bytes, offset: int, count: int) -> list[int]:
    """`count` instructions from a byte offset."""
    return [
        int.from_bytes(image[offset + 16 * i : offset + 16 * (i + 1)], "little")
        for i in range(count)
    ]


def text_section(image: bytes, kernel: str) -> tuple[int, int]:
    """The file offset and size of a kernel's code, from the ELF section headers."""
    table = int.from_bytes(image[0x28:0x30], "little")
    count = int.from_bytes(image[0x3C:0x3E], "little")
    names_index = int.from_bytes(image[0x3E:0x40], "little")
    headers = [image[table + 64 * i : table + 64 * (i + 1)] for i in range(count)]
    offsets = [int.from_bytes(header[24:32], "little") for header in headers]
    for header, offset in zip(headers, offsets, strict=True):
        name = image[offsets[names_index] + int.from_bytes(header[:4], "little") :]
        if name.startswith(f".text.{kernel}\0".encode()):
            return offset, int.from_bytes(header[32:40], "little")
    raise AssertionError(f"no code of {kernel}")


def text_offset(image: bytes, kernel: str) -> int:
    return text_section(image, kernel)[0]


def test_runs_alternate_afterwards(cubin: bytes) -> None:
    image, runs = _native.interleave(cubin)
    assert runs
    assert sum(ffmas["length"] for ffmas in runs) >= 48
    for ffmas in runs:
        assert ffmas["section"] == ".text.promote"
        assert ffmas["length"] >= 16
        assert not ffmas["alternating"]
        offset = text_offset(image, "promote") + ffmas["offset"]
        before = words(cubin, offset, ffmas["length"])
        after = words(image, offset, ffmas["length"])
        yields = [not word & NO_YIELD for word in after]
        assert all(a != b for a, b in itertools.pairwise(yields))
        # What yields keeps no operand; what does not yield keeps what ptxas gave it.
        for old, new, yielding in zip(before, after, yields, strict=True):
            assert new & REUSE == (0 if yielding else old & REUSE)
        assert ffmas["yield_before"] == sum(not word & NO_YIELD for word in before)
        assert ffmas["yield_after"] == sum(yields)
        assert ffmas["reuse_before"] == sum(bool(word & REUSE) for word in before)
        assert ffmas["reuse_after"] == sum(bool(word & REUSE) for word in after)


def test_pass_clears_reuse_somewhere(cubin: bytes) -> None:
    # Otherwise the check above would say little.
    _, runs = _native.interleave(cubin)
    assert any(ffmas["reuse_after"] < ffmas["reuse_before"] for ffmas in runs)


def test_nothing_but_yield_and_reuse_bits_of_the_runs_changes(cubin: bytes) -> None:
    image, runs = _native.interleave(cubin)
    assert image != cubin
    assert len(image) == len(cubin)
    expected = bytearray(image)
    for ffmas in runs:
        start = text_offset(image, "promote") + ffmas["offset"]
        for offset in range(start, start + 16 * ffmas["length"], 16):
            (old,), (new,) = words(cubin, offset, 1), words(image, offset, 1)
            assert old & OPCODE == FFMA
            assert (old ^ new) & ~(NO_YIELD | REUSE) == 0
            assert new & REUSE & ~old == 0
            expected[offset : offset + 16] = cubin[offset : offset + 16]
    assert bytes(expected) == cubin


def test_runs_are_maximal(cubin: bytes) -> None:
    _, runs = _native.interleave(cubin)
    for ffmas in runs:
        start = text_offset(cubin, "promote") + ffmas["offset"]
        before, after = (
            words(cubin, start - 16, 1)[0],
            words(cubin, start + 16 * ffmas["length"], 1)[0],
        )
        assert before & OPCODE != FFMA
        assert after & OPCODE != FFMA


def test_short_runs_stay(cubin: bytes) -> None:
    image, runs = _native.interleave(cubin)
    offset, size = text_section(cubin, "few")
    is_ffma = [word & OPCODE == FFMA for word in words(cubin, offset, size // 16)]
    longest = max(len(list(group)) for same, group in itertools.groupby(is_ffma) if same)
    assert 4 <= longest < 16
    assert image[offset : offset + size] == cubin[offset : offset + size]
    assert {ffmas["section"] for ffmas in runs} == {".text.promote"}


@pytest.mark.parametrize("half", [0, 1], ids=["even", "odd"])
def test_half_without_reuse_yields(half: int, cubin: bytes) -> None:
    _, (ffmas,) = _native.interleave(cubin)
    start = text_offset(cubin, "promote") + ffmas["offset"]
    changed = bytearray(cubin)
    for offset in range(start + 16 * half, start + 16 * ffmas["length"], 32):
        (word,) = words(cubin, offset, 1)
        changed[offset : offset + 16] = (word & ~REUSE).to_bytes(16, "little")
    image, (ffmas,) = _native.interleave(bytes(changed))
    assert ffmas["reuse_before"] == ffmas["reuse_after"] > 0
    yields = [not word & NO_YIELD for word in words(image, start, ffmas["length"])]
    assert all(yields[half::2])


def test_pass_is_idempotent(cubin: bytes) -> None:
    image, _ = _native.interleave(cubin)
    again, runs = _native.interleave(image)
    assert again == image
    assert all(ffmas["alternating"] for ffmas in runs)
    assert all(ffmas["reuse_before"] == ffmas["reuse_after"] for ffmas in runs)


def test_run_that_alternates_save_for_one_pair_stays(cubin: bytes) -> None:
    # ptxas leaves such irregularities; redoing the run would cost reuse bits behind them.
    image, (ffmas,) = _native.interleave(cubin)
    offset = text_offset(image, "promote") + ffmas["offset"] + 16 * (ffmas["length"] // 2)
    (word,) = words(image, offset, 1)
    irregular = image[:offset] + (word ^ NO_YIELD).to_bytes(16, "little") + image[offset + 16 :]
    again, (ffmas,) = _native.interleave(irregular)
    assert ffmas["alternating"]
    assert again == irregular


@functools.cache
def nvdisasm() -> str:
    """The path of nvdisasm; skips the test, with the reason, where there is none."""
    path = cuda.pathfinder.find_nvidia_binary_utility("nvdisasm")
    if path is None:
        assert "CI" not in os.environ, "continuous integration must have nvdisasm"
        pytest.skip('there is no nvdisasm; pip install "nvidia-cuda-nvdisasm"')
    return path


def disassemble(image: bytes, folder: Path) -> str:
    file = folder / "kernel.cubin"
    file.write_bytes(image)
    return subprocess.run(
        [nvdisasm(), "--print-code", file], check=True, capture_output=True, text=True
    ).stdout


def test_disassembly_differs_in_reuse_only(cubin: bytes, tmp_path: Path) -> None:
    image, runs = _native.interleave(cubin)
    before, after = disassemble(cubin, tmp_path), disassemble(image, tmp_path)
    assert before.count(" FFMA ") >= sum(ffmas["length"] for ffmas in runs)
    assert before != after
    assert before.replace(".reuse", "") == after.replace(".reuse", "")
    count = sum(ffmas["reuse_before"] - ffmas["reuse_after"] for ffmas in runs)
    lines = [len(re.findall(r"FFMA.*\.reuse", text)) for text in (before, after)]
    assert lines[0] - lines[1] == count


@pytest.mark.parametrize("length", [64, 1000, 4000])
def test_truncated_image_is_an_error(length: int, cubin: bytes) -> None:
    with pytest.raises(_native.Error, match=r"^not an sm_90 cubin: .* outside the file"):
        _native.interleave(cubin[:length])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda image: b"", "too short for an ELF header"),
        (lambda image: b"x" * 1000, "not a 64-bit ELF file with sections"),
        (lambda image: image[:4] + b"\x01" + image[5:], "not a 64-bit ELF file with sections"),
        (
            lambda image: image[:0x28] + b"\xff" * 8 + image[0x30:],
            "section header outside the file",
        ),
    ],
    ids=["empty", "foreign", "32-bit", "wild-offset"],
)
def test_malformed_image_is_an_error(
    damage: Callable[[bytes], bytes], message: str, cubin: bytes
) -> None:
    with pytest.raises(_native.Error, match=f"^not an sm_90 cubin: {message}$"):
        _native.interleave(damage(cubin))
