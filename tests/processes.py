"""Runs tests/device_process.py several times at once, for the CPU and the GPU tests."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def run_processes(count: int, platform: str, *, seconds: float) -> list[str]:
    """What `count` processes, joined by `jax.distributed`, print; all must succeed in time."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]  # free again at once, and hardly taken by another
    environment = os.environ | {
        "JAX_PLATFORMS": platform,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # this process may have most of a GPU's memory
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.device_process", str(i), str(count), str(port)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for i, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"process {i}:\n{output[-4000:]}"
    return outputs
