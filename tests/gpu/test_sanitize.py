"""The kernel under the tools of NVIDIA's compute-sanitizer, by the commands of sanitize.py."""

import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from jax_deepgemm import GemmConfig
from jax_deepgemm.config import OPS, check_problem
from jax_deepgemm.ffi import _native
from tests.gpu import sanitize

ROOT = pathlib.Path(__file__).parents[2]
TIMEOUT_SECONDS = 200

# The indented lines of the docstring: what sets the shell up, then one command per tool.
LINES = re.findall(r"^ {4}(.+)$", sanitize.__doc__ or "", flags=re.MULTILINE)
COMMANDS = {line.split("--tool ")[1].split()[0]: line for line in LINES if "--tool " in line}
SETUP = [line for line in LINES if line not in COMMANDS.values()]


def check(command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of the docstring with this Python."""
    python = pathlib.Path(sys.executable).parent
    return subprocess.run(
        # `timeout` ends the whole process group; its exit status is then 124.
        ["timeout", str(TIMEOUT_SECONDS), "bash", "-c", "\n".join([*SETUP, command])],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{python}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def result_of() -> Iterator[Callable[[str], subprocess.CompletedProcess[str]]]:
    """Starts all tools together, and hands each one's result out when it is done."""
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("there is no compute-sanitizer on the PATH")
    with concurrent.futures.ThreadPoolExecutor(len(COMMANDS)) as pool:
        results = {tool: pool.submit(check, command) for tool, command in COMMANDS.items()}
        yield lambda tool: results[tool].result()


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_tool_finds_no_errors(
    tool: str, result_of: Callable[[str], subprocess.CompletedProcess[str]]
) -> None:
    # The tools check the kernels whose names contain this, and would find nothing in none.
    assert "kernel_substring=dg_gemm" in "\n".join(SETUP)
    config = GemmConfig(64, 64, 4, 1)
    for op in OPS:
        problem = check_problem("test", 1, 136, 304, num_sms=132, op=op)
        assert "dg_gemm" in _native.kernel_name(problem, config.fields)
    done = result_of(tool)
    assert done.returncode == 0, done.stdout
    assert (
        f"{len(sanitize.DENSE_CASES) + len(sanitize.GROUPED_CASES)} cases, worst error"
        in done.stdout
    )
    clean = "RACECHECK SUMMARY: 0 hazards" if tool == "racecheck" else "ERROR SUMMARY: 0 errors"
    assert clean in done.stdout, done.stdout
