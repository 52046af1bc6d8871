"""Compiles kernels in processes of their own, for the tests of the JIT.

The extension reads its environment once per process and remembers what it has compiled, so most
tests start a fresh process. It loads the extension alone, without jax, which takes 50 ms instead of
a second; `run_package` is for the tests that need the package.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jax_deepgemm.ffi.toolchain import locate_nvrtc

ROOT = Path(__file__).parents[1]

# Loads the extension as `native`; `compile` builds a small kernel, with a header, per name.
PREAMBLE = """
import importlib.util, json, sys, time
spec = importlib.util.spec_from_file_location("_native", {extension!r})
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
NVRTC = {nvrtc!r}
native.set_nvrtc_locator(lambda: NVRTC)

HEADERS = {{"factor.cuh": "constexpr float kFactor = 3.0f;"}}

def text(name):
    return f'''#include "factor.cuh"
    extern "C" __global__ void {{name}}(float* x) {{{{ x[threadIdx.x] *= kFactor; }}}}'''

def compile(name="scale", body=None, headers=HEADERS):
    return native.jit_compile(name, name, text(name) if body is None else body, headers)

def report(result):
    print(json.dumps({{key: value for key, value in result.items() if key != "image"}}), flush=True)
"""

# For `run_package`: `image`, a kernel with two math warpgroups. As ptxas leaves it, its runs of 64
# and 63 FFMA alternate between yielding and not.
GEMM = """
from jax_deepgemm import GemmConfig
from jax_deepgemm.config import check_problem
from jax_deepgemm.ffi import _native
problem = check_problem("test", 1, 4096, 1024, num_sms=132)
config = GemmConfig(block_m=128, block_n=256, num_stages=3).fields
text, headers = _native.kernel_source(problem, config)
image = _native.jit_compile("gemm", _native.kernel_name(problem, config), text, headers)["image"]
"""


@functools.cache
def nvrtc() -> str:
    """The path of libnvrtc; skips the test, with the reason, where there is none."""
    try:
        return locate_nvrtc()
    except RuntimeError as error:
        assert "CI" not in os.environ, "continuous integration must have NVRTC"
        pytest.skip(str(error))


def script(body: str) -> list[str]:
    """The command that runs `body` after PREAMBLE."""
    spec = importlib.util.find_spec("jax_deepgemm.ffi._native")
    assert spec is not None
    return [sys.executable, "-c", PREAMBLE.format(extension=spec.origin, nvrtc=nvrtc()) + body]


def environment(cache: Path | str, variables: dict[str, str]) -> dict[str, str]:
    """This process's environment with `variables` as its only DG_ ones beside the cache folder."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DG_")}
    return inherited | {"DG_CACHE_DIR": str(cache)} | variables


def run(body: str, cache: Path | str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs `body` after PREAMBLE in a new process, which must succeed."""
    return _run(script(body), environment(cache, variables))


def run_package(body: str, cache: Path | str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs `body`, which may import jax and jax_deepgemm, on the CPU in a new process."""
    command = [sys.executable, "-c", body]
    return _run(command, environment(cache, {"JAX_PLATFORMS": "cpu"} | variables))


def _run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def reports(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """What `report` printed, in order."""
    return [json.loads(line) for line in done.stdout.splitlines()]
