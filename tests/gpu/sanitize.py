"""Runs the kernels on a few small problems, for NVIDIA's compute-sanitizer.

Run it from the repository's root, on a Hopper GPU, under each of the four tools (`pip install
nvidia-cuda-sanitizer-api` brings them where there is no CUDA toolkit); test_sanitize.py runs these
very lines where compute-sanitizer is on the PATH:

    export XLA_PYTHON_CLIENT_ALLOCATOR=platform
    export XLA_FLAGS="--xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=0"
    check="compute-sanitizer --error-exitcode 1"
    ours="--kernel-name kernel_substring=dg_gemm"
    $check --tool memcheck $ours --padding 512 python -m tests.gpu.sanitize
    DG_RACECHECK=1 $check --tool racecheck $ours python -m tests.gpu.sanitize
    $check --tool synccheck $ours python -m tests.gpu.sanitize
    $check --tool initcheck --check-api-memory-access no python -m tests.gpu.sanitize

The allocator makes every array an allocation of its own, whose ends memcheck then knows; the flags
keep launches out of CUDA graphs and XLA's autotuner, whose own kernels read what nothing wrote, out
of the run; the kernel's name keeps XLA's kernels from being checked, which would take most of the
time, but initcheck must see them write what ours read. initcheck does not see what TMA stores
write, so it would call every copy of a result to the host uninitialised; it checks the kernels
alone. The cases are few and small because the tools slow kernels down a hundredfold.

racecheck (of CUDA 13.0) follows mbarriers, but takes an arrival for that of one thread: where a
lane arrives for its warp, after a __syncwarp that costs no instruction, it reports what the other
lanes have read. With DG_RACECHECK every thread arrives for itself. It also expects all warps of a
block to wait for a cluster barrier, or it hangs.

Prints every case before it runs, so that a hang has a name, then the number of cases and the worst
error of a row. The exit status is 1 if a result is wrong.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

import jax_deepgemm
from jax_deepgemm import GemmConfig
from tests import numerics
from tests.grouped_cases import Problem, call

# Few enough that every CTA walks through several tiles, enough for a cluster of four.
NUM_SMS = 8

# A row's; see support.py.
MAX_ERROR = 1e-5

# One of each structure: warpgroups, waves, column split, multicast, split-k; sizes that are no
# multiples of the tile, n of 128 or k of 128.
DENSE_CASES = [
    ((130, 136, 304), GemmConfig(64, 64, 4, 1)),
    ((130, 136, 304), GemmConfig(128, 64, 2, 1)),
    ((20, 264, 400), GemmConfig(64, 64, 3, 1)),
    ((1, 136, 304), GemmConfig(64, 32, 4, 1)),
    ((3, 264, 400), GemmConfig(64, 64, 3, 1, cluster_m=2)),
    ((333, 264, 400), GemmConfig(64, 112, 4, 2)),
    ((333, 392, 144), GemmConfig(128, 72, 3, 2, raster_m=1)),
    ((333, 392, 272), GemmConfig(256, 128, 3, 2)),
    ((333, 264, 400), GemmConfig(128, 96, 3, 2, cluster_m=2)),
    ((333, 520, 272), GemmConfig(128, 256, 3, 2, cluster_m=2)),
    ((200, 264, 400), GemmConfig(64, 64, 3, 1, cluster_n=2)),
    ((333, 392, 272), GemmConfig(256, 64, 3, 2, cluster_n=2)),
    ((130, 264, 656), GemmConfig(64, 64, 2, 1, cluster_k=2)),
    ((200, 264, 656), GemmConfig(128, 112, 3, 2, cluster_k=4)),
    ((130, 8, 16), None),
]

# Empty and small groups, groups of several tiles, tiles of several groups; padding in blocks. Rows
# are a multiple of 4 in some, whose scales are copied in bulk, and not in others.
RAGGED = [0, 5, 70, 1, 130]
MASKED = [33, 0, 70, 1]
CONTIGUOUS = [0] * 128 + [2] * 70 + [-1] * 58 + [-1] * 128 + [1, -1] * 10

GROUPED_CASES = [
    (Problem("ragged", 5, 221, 136, 304), RAGGED, GemmConfig(64, 64, 4, 1)),
    (Problem("ragged", 5, 220, 264, 400), RAGGED, GemmConfig(128, 96, 3, 2)),
    (Problem("ragged", 5, 220, 264, 272), RAGGED, GemmConfig(256, 64, 3, 2, cluster_n=2)),
    (Problem("ragged", 5, 222, 264, 656), RAGGED, GemmConfig(64, 64, 2, 1, cluster_k=2)),
    (Problem("masked", 3, 71, 136, 304), MASKED[:3], GemmConfig(64, 112, 4, 2)),
    (Problem("masked", 4, 70, 264, 400), MASKED, GemmConfig(128, 96, 3, 2, cluster_n=2)),
    (Problem("masked", 4, 70, 264, 272), MASKED, GemmConfig(128, 224, 2, 2)),
    (Problem("contiguous", 3, 405, 136, 304), [*CONTIGUOUS, -1], GemmConfig(64, 64, 4, 1)),
    (Problem("contiguous", 3, 404, 264, 656), CONTIGUOUS, GemmConfig(256, 64, 3, 2)),
]


class Case(NamedTuple):
    """One run: what prints, the operation, its arguments and the right result."""

    name: str
    operation: Callable[..., jax.Array]
    arguments: tuple[Any, ...]
    expected: Any


def dense(a: Any, sfa: Any, b: Any, sfb: Any, config: GemmConfig | None) -> jax.Array:
    return jax_deepgemm.gemm_fp8_fp8_bf16_nt((a, sfa), (b, sfb), config=config)


def cases() -> Iterator[Case]:
    for (m, n, k), config in DENSE_CASES:
        operands = numerics.dense_operands(m, n, k, seed=0)
        operation = functools.partial(dense, config=config)
        expected = numerics.dense_oracle(operands)
        yield Case(f"dense m={m} n={n} k={k} {config}", operation, operands, expected)
    for problem, groups, config in GROUPED_CASES:
        grouped = problem.operands(seed=0)
        array = np.array(groups, np.int32)
        operation = functools.partial(call, problem.op, config=config)
        expected = problem.oracle(grouped, array)
        yield Case(f"{problem} {config}", operation, (*grouped, array), expected)


def main() -> int:
    """Runs all cases and returns the exit status."""
    jax_deepgemm.set_num_sms(NUM_SMS)
    print(f"running on {jax_deepgemm.backend()}")
    worst = 0.0
    count = 0
    for name, operation, arguments, expected in cases():
        print(name, flush=True)
        d = jax.jit(operation)(*map(jax.device_put, arguments))
        error = numerics.worst_row_error(d, expected)
        if error >= MAX_ERROR:
            print(f"wrong: error {error:.2g}")
        worst = max(worst, error)
        count += 1
    print(f"{count} cases, worst error of a row {worst:.2g} (limit {MAX_ERROR:.0e})")
    return int(worst >= MAX_ERROR)


if __name__ == "__main__":
    sys.exit(main())
