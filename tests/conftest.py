"""What every test shares: the environment JAX and the JIT start in, and the `gpu` marker.

The environment is set here, before any test module imports jax or jax_deepgemm, because both read
it once.
"""

import functools
import os
import pathlib
import tempfile

import pytest

# The JIT's disk cache of this run: empty at the start, gone at the end, never the user's own.
_CACHE = tempfile.TemporaryDirectory(prefix="jax_deepgemm-tests-")
os.environ["DG_CACHE_DIR"] = _CACHE.name

# Eight CPU devices, so that sharding is tested without a GPU. JAX_PLATFORMS stays the user's.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
    )

_GPU_TESTS = pathlib.Path(__file__).parent / "gpu"


@functools.cache
def _why_no_hopper() -> str | None:
    """Returns why the gpu tests cannot run here, or None where JAX sees an sm_90 GPU."""
    import jax

    try:
        devices = jax.devices("cuda")
    except RuntimeError as error:  # How JAX says that a platform is absent.
        return f"needs an sm_90 GPU, but JAX has none: {error}"
    if devices[0].compute_capability != "9.0":
        return f"needs an sm_90 GPU, but this is an sm_{devices[0].compute_capability}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests under tests/gpu, and skips them where there is no Hopper GPU."""
    for item in items:
        if item.path.is_relative_to(_GPU_TESTS):
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and (reason := _why_no_hopper()):
            item.add_marker(pytest.mark.skip(reason=reason))
