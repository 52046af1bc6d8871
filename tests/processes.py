"""Runs tests/device_process.py several times at once, for the CPU and the GPU tests."""

import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

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
        "PYTHONUNBUFFERED": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        # Into files: who waits for one's output would not see another one fail.
        paths = [pathlib.Path(folder, f"{i}.txt") for i in range(count)]
        processes = []
        for i, path in enumerate(paths):
            command = [sys.executable, "-m", "tests.device_process", str(i), str(count), str(port)]
            with path.open("w") as file:
                processes.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
                    )
                )
        try:
            end = time.monotonic() + seconds
            # The others of one that failed wait for it: not for long here.
            while any(process.poll() is None for process in processes) and time.monotonic() < end:
                if any(process.poll() for process in processes):
                    end = min(end, time.monotonic() + 5)
                time.sleep(0.05)
            codes = [process.poll() for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        outputs = [path.read_text() for path in paths]
    report = "\n".join(
        f"process {i}, exit status {code} (None: ran out of time):\n{output[-4000:]}"
        for i, (code, output) in enumerate(zip(codes, outputs, strict=True))
    )
    assert codes == [0] * count, report
    return outputs
