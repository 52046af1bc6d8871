"""What this machine is: GPU, driver, clocks, versions, commit."""

import importlib.metadata
import re
import subprocess
from pathlib import Path

import jax

import jax_deepgemm
from jax_deepgemm.device import default_device, is_hopper

PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda12-pjrt",
    "jax-cuda13-plugin",
    "jax-cuda13-pjrt",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-nvrtc-cu12",
    "cuda-pathfinder",
    "numpy",
)

# nvidia-smi's names; the last ones change from moment to moment.
GPU_FIELDS = (
    "name",
    "driver_version",
    "memory.total",
    "clocks.max.sm",
    "power.limit",
    "clocks.sm",
    "power.draw",
    "temperature.gpu",
)


def hopper_gpu() -> jax.Device | None:
    """JAX's default device when it can run the kernels (sm_90), else None."""
    device = default_device()
    return device if is_hopper(device) else None


def why_no_gpu() -> str:
    """One sentence that says which device JAX sees instead of an sm_90 GPU."""
    device = default_device()
    found = device.device_kind
    if device.platform == "gpu":
        found += f" (compute capability {getattr(device, 'compute_capability', 'unknown')})"
    return f"The kernels need an sm_90 GPU (H100, H200); JAX's default device here is {found}."


def cuda_version(device: jax.Device) -> str:
    """CUDA version that the plugin was built with, like "13.0"; empty when it does not say."""
    match = re.search(r"cuda (\d+)(\d\d)0", device.client.platform_version)
    return f"{int(match[1])}.{int(match[2])}" if match else ""


def gpu_stem(device_kind: str) -> str:
    """`h100` for "NVIDIA H100 80GB HBM3": what its results file is called."""
    match = re.search(r"\b[A-Z]{1,2}\d{2,4}\b", device_kind)
    return (match[0] if match else device_kind.replace(" ", "_")).lower()


def query_gpus() -> list[dict[str, str]]:
    """`GPU_FIELDS` of every GPU that nvidia-smi lists; empty where it is missing or fails."""
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [
        dict(zip(GPU_FIELDS, line.split(", "), strict=True)) for line in output.splitlines() if line
    ]


def installed_versions() -> dict[str, str]:
    """Versions of this package and of those installed that matter to it."""
    versions = {"jax_deepgemm": jax_deepgemm.__version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def commit() -> str:
    """Commit of the checkout that runs, "-dirty" with local changes; else the package version."""
    checkout = Path(jax_deepgemm.__file__).parents[1]
    for folder in (checkout, Path.cwd()):
        if (folder / ".git").exists() and (folder / "jax_deepgemm").is_dir():
            command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode == 0:
                return result.stdout.strip()
    return jax_deepgemm.__version__
