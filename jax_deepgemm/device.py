"""The device: which lowering runs on it, and how many of its SMs kernels may use."""

import jax

from jax_deepgemm.ffi import _native


def backend() -> str:
    """Returns what computes this package's operations on JAX's default device.

    For example "cuda: NVIDIA H100 80GB HBM3 (sm_90)" or "cpu: float32 reference".

    Raises:
        RuntimeError: JAX's default device is neither a Hopper GPU nor a CPU, so operations do not
            run on it.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return "cpu: float32 reference"
    capability = getattr(device, "compute_capability", None)
    if device.platform == "gpu" and capability == "9.0":
        return f"cuda: {device.device_kind} (sm_90)"
    raise RuntimeError(
        "backend: jax_deepgemm runs on Hopper GPUs (sm_90) and on CPUs, but JAX's default device "
        f"is {device.device_kind} (platform {device.platform}, compute capability {capability})"
    )


_num_sms_limit = 0  # 0: no limit


def set_num_sms(num_sms: int) -> None:
    """Limits the SMs that kernels use, for example to leave some to a communication kernel.

    Operations read the limit when they are traced: a function that `jax.jit` has traced keeps the
    one it saw. A limit above the GPU's number of SMs is none.

    Args:
        num_sms: SMs that kernels may use, at least 1.

    Raises:
        ValueError: num_sms is not positive.
    """
    if num_sms < 1:
        raise ValueError(f"set_num_sms: num_sms must be at least 1, got {num_sms}")
    global _num_sms_limit
    _num_sms_limit = num_sms


def get_num_sms() -> int:
    """Returns the SMs that kernels may use: the limit, or all of the first Hopper GPU.

    Raises:
        RuntimeError: no limit is set and there is no Hopper GPU.
    """
    if _num_sms_limit:
        return _num_sms_limit
    for device in _native.cuda_devices():
        if (device["major"], device["minor"]) == (9, 0):
            return int(device["num_sms"])
    raise RuntimeError("get_num_sms: there is no Hopper GPU here; call set_num_sms first")


def num_sms_limit() -> int:
    """The limit of `set_num_sms`, 0 if there is none."""
    return _num_sms_limit
