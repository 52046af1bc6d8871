"""Kernels of every way through the JIT, run on a Hopper GPU in processes of their own.

The extension reads its environment once per process, so each way is a process. They are started
together, once, and take a few seconds each, most of it to start JAX.
"""

import concurrent.futures
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]

# `run(m, n, k, config)` compiles a kernel, runs the operation and prints a line of JSON.
PREAMBLE = """
import hashlib, json, sys
import jax, numpy as np
from jax_deepgemm import GemmConfig, ffi, gemm_fp8_fp8_bf16_nt
from jax_deepgemm.config import check_problem
from jax_deepgemm.ffi import _native
from tests import numerics

def kernel(m, n, k, config):
    problem = check_problem("test", m, n, k, num_sms=132)
    text, headers = _native.kernel_source(problem, config.fields)
    name = _native.kernel_name(problem, config.fields)
    return hashlib.sha256(_native.jit_compile(name, name, text, headers)["image"]).hexdigest()

def multiply(operands, config):
    a, sfa, b, sfb = operands
    return jax.jit(lambda *o: gemm_fp8_fp8_bf16_nt(o[:2], o[2:], config=config))(a, sfa, b, sfb)

def run(m, n, k, *fields):
    config = GemmConfig(*fields)
    source = ffi.compile_kernel(n, k, config, m=m).source
    operands = numerics.dense_operands(m, n, k, seed=0)
    d = np.asarray(multiply(operands, config))
    print(json.dumps({
        "source": source,
        "kernel": kernel(m, n, k, config),
        "error": numerics.worst_row_error(d, numerics.dense_oracle(operands)),
        "bits": hashlib.sha256(d.tobytes()).hexdigest(),
    }), flush=True)
"""

# Kernels of one math warpgroup, which the interleaver leaves as they are, and of two.
ALL = """
for shape, fields in (
    ((200, 264, 656), (64, 64, 4, 1)),
    ((200, 264, 656), (64, 72, 4, 1, 1, 1, 2)),
    ((333, 392, 400), (64, 192, 3, 1)),
    ((333, 392, 400), (128, 64, 3, 1)),
    ((200, 264, 656), (64, 112, 4, 2, 1, 1, 4)),
    ((333, 392, 400), (128, 128, 4, 2, 2)),
    ((333, 392, 400), (256, 128, 3, 2)),
):
    run(*shape, *fields)
"""

FEW = """
run(200, 264, 656, 64, 112, 4, 2, 1, 1, 4)
run(333, 392, 400, 256, 128, 3, 2)
"""

# No NVRTC, and later one.
NO_NVRTC = """
def absent():
    raise RuntimeError("NVRTC not found: the test hides it")
_native.set_nvrtc_locator(absent)
operands = numerics.dense_operands(64, 136, 144, seed=0)
for _ in range(2):
    try:
        multiply(operands, None)
    except jax.errors.JaxRuntimeError as error:
        print(json.dumps({"message": str(error)}), flush=True)
print(json.dumps({"other": int(jax.jit(lambda x: x.sum())(np.arange(8)))}), flush=True)
_native.set_nvrtc_locator(ffi.locate_nvrtc)
run(64, 136, 144, 64, 64, 2, 1)
"""


def nvcc() -> str | None:
    named = os.environ.get("DG_NVCC_COMPILER")
    usual = "/usr/local/cuda/bin/nvcc"
    return named or shutil.which("nvcc") or (usual if os.access(usual, os.X_OK) else None)


class Processes:
    """Runs scripts in parallel, each with its own cache folder and its own DG_ variables."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(8)
        self._caches = folder
        start = self._pool.submit
        self.interleaved = start(self._run, ALL, "interleaved", DG_DISABLE_FFMA_INTERLEAVE="0")
        self.plain = start(self._run, ALL, "plain", DG_DISABLE_FFMA_INTERLEAVE="1")
        self.cached = start(self._run_twice, ALL, "cached")
        self.unwritable = start(self._run, FEW, "/proc")
        self.no_nvrtc = start(self._run, NO_NVRTC, "no_nvrtc")
        if path := nvcc():
            self.nvcc = start(self._run, FEW, "nvcc", DG_NVCC_COMPILER=path)

    def _run(self, body: str, cache: str, **variables: str) -> tuple[list[dict[str, Any]], str]:
        """Returns the lines that the script printed, and its stderr."""
        inherited = {name: x for name, x in os.environ.items() if not name.startswith("DG_")}
        done = subprocess.run(
            [sys.executable, "-c", PREAMBLE + body],
            cwd=ROOT,
            # Pytest's own process holds most of the GPU's memory.
            env=inherited
            | {"DG_CACHE_DIR": str(self._caches / cache), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            | variables,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()], done.stderr

    def _run_twice(self, body: str, cache: str) -> list[list[dict[str, Any]]]:
        return [self._run(body, cache)[0] for _ in range(2)]

    def close(self) -> None:
        self._pool.shutdown()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    started = Processes(tmp_path_factory.mktemp("caches"))
    yield started
    started.close()


def check(results: list[dict[str, Any]], source: str) -> None:
    assert results
    for result in results:
        assert result["source"] == source
        assert result["error"] < 1e-5  # one row's; see test_gemm.py


def test_interleaved_kernels_give_the_same_bits(processes: Processes) -> None:
    interleaved, _ = processes.interleaved.result()
    plain, _ = processes.plain.result()
    check(interleaved, "compiled")
    check(plain, "compiled")
    assert [x["bits"] for x in interleaved] == [x["bits"] for x in plain]
    # They are not all the same kernels.
    assert [x["kernel"] for x in interleaved] != [x["kernel"] for x in plain]


def test_second_process_takes_kernels_from_the_cache(processes: Processes) -> None:
    first, second = processes.cached.result()
    check(first, "compiled")
    check(second, "disk")
    for key in ("kernel", "bits"):
        assert [x[key] for x in first] == [x[key] for x in second]


def test_nvcc_compiles_kernels_that_run(processes: Processes) -> None:
    if nvcc() is None:
        pytest.skip("there is no nvcc on the PATH")
    results, _ = processes.nvcc.result()
    check(results, "compiled")


def test_unwritable_cache_warns_once_and_goes_on(processes: Processes) -> None:
    results, stderr = processes.unwritable.result()
    check(results, "compiled")
    warnings = [line for line in stderr.splitlines() if "jax_deepgemm" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("jax_deepgemm: warning: cannot ")
    assert "/proc" in warnings[0]
    assert "kept in memory only" in warnings[0]


def test_missing_nvrtc_is_one_error_and_the_process_goes_on(processes: Processes) -> None:
    results, _ = processes.no_nvrtc.result()
    first, second, other, good = results
    for failed in (first, second):
        message = failed["message"]
        assert message.count("NVRTC not found: the test hides it") == 1
        assert "gemm_fp8_fp8_bf16_nt: NVRTC not found" in message
    assert other == {"other": 28}
    check([good], "compiled")
