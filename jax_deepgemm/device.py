"""The device: which lowering runs on it, and how many of its SMs kernels may use."""

from typing import SupportsIndex, TypedDict

import jax

from jax_deepgemm.arguments import H100_MEMORY_GBS, integer
from jax_deepgemm.ffi import _native


def default_device() -> jax.Device:
    """The device that JAX puts arrays on now: `jax.default_device`'s, or else the first one."""
    # The context manager jax.default_device sets the option, too, for its thread.
    chosen: jax.Device | str | None = jax.config.jax_default_device  # type: ignore[attr-defined]
    if chosen is None or isinstance(chosen, str):  # a string names a platform
        return jax.local_devices(backend=chosen)[0]
    return chosen


def is_hopper(device: jax.Device) -> bool:
    """Whether the kernels run on this device."""
    return device.platform == "gpu" and getattr(device, "compute_capability", None) == "9.0"


def backend() -> str:
    """Returns what computes this package's operations on JAX's default device.

    For example "cuda: NVIDIA H100 80GB HBM3 (sm_90)" or "cpu: float32 reference".

    Raises:
        RuntimeError: JAX's default device is neither a Hopper GPU nor a CPU, so operations do not
            run on it.
    """
    device = default_device()
    if device.platform == "cpu":
        return "cpu: float32 reference"
    if is_hopper(device):
        return f"cuda: {device.device_kind} (sm_90)"
    capability = getattr(device, "compute_capability", None)
    raise RuntimeError(
        "backend: jax_deepgemm runs on Hopper GPUs (sm_90) and on CPUs, but JAX's default device "
        f"is {device.device_kind} (platform {device.platform}, compute capability {capability})"
    )


_num_sms_limit = 0  # 0: no limit


def set_num_sms(num_sms: SupportsIndex) -> None:
    """Limits the SMs that kernels use, for example to leave some to a communication kernel.

    Operations read the limit when they are traced: a function that `jax.jit` has traced keeps the
    one it saw. A limit above the GPU's number of SMs is none.

    Args:
        num_sms: SMs that kernels may use, at least 1.

    Raises:
        TypeError: num_sms is no integer.
        ValueError: num_sms is not positive, or does not fit into 32 bits.
    """
    limit = integer("set_num_sms", "num_sms", num_sms, bits=32)
    if limit < 1:
        raise ValueError(f"set_num_sms: num_sms must be at least 1, got {limit}")
    global _num_sms_limit
    _num_sms_limit = limit


def get_num_sms() -> int:
    """Returns the SMs that kernels may use: all of the first Hopper GPU, or the limit if lower.

    Without a Hopper GPU it is the limit.

    Raises:
        RuntimeError: no limit is set and there is no Hopper GPU.
    """
    hopper = _first_hopper()
    counts = [hopper["num_sms"]] if hopper else []
    if _num_sms_limit:
        counts.append(_num_sms_limit)
    if not counts:
        raise RuntimeError("get_num_sms: there is no Hopper GPU here; call set_num_sms first")
    return min(counts)


class Gpu(TypedDict):
    """What `select_config` wants to know of a GPU, by its names."""

    num_sms: int
    memory_gbs: int


def selection() -> Gpu:
    """Returns the first Hopper GPU's properties; an H100's memory where that is unknown.

    Raises:
        RuntimeError: as `get_num_sms` does, which has the limit, too.
    """
    hopper = _first_hopper()
    memory_gbs = (hopper["memory_gbs"] if hopper else 0) or H100_MEMORY_GBS
    return {"num_sms": get_num_sms(), "memory_gbs": memory_gbs}


def _first_hopper() -> dict[str, int] | None:
    """Properties of the first Hopper GPU that are numbers; None if there is none."""
    for device in _native.cuda_devices():
        if (device["major"], device["minor"]) == (9, 0):
            return {name: value for name, value in device.items() if isinstance(value, int)}
    return None


def num_sms_limit() -> int:
    """The limit of `set_num_sms`, 0 if there is none."""
    return _num_sms_limit
