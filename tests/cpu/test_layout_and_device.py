"""Alignment helpers, the SM limit, and what `backend` says."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm
from jax_deepgemm import device
from jax_deepgemm.cli import machine
from jax_deepgemm.ffi import _native
from tests import numerics


@pytest.fixture(autouse=True)
def no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """No SM limit, and afterwards the one from before: the public API cannot take one back."""
    monkeypatch.setattr(device, "_num_sms_limit", 0)


# --- Layout --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "element_size", "expected"),
    [
        (0, 4, 0),
        (1, 4, 4),
        (4, 4, 4),
        (5, 4, 8),
        (4097, 4, 4100),
        (1, 1, 16),
        (16, 1, 16),
        (17, 1, 32),
        (9, 2, 16),
        (3, 8, 4),
        (3, 16, 3),
    ],
)
def test_tma_aligned_size(x: int, element_size: int, expected: int) -> None:
    assert jax_deepgemm.get_tma_aligned_size(x, element_size) == expected


@pytest.mark.parametrize("element_size", [-4, 0, 3, 5, 12, 32])
def test_tma_aligned_size_of_odd_elements(element_size: int) -> None:
    with pytest.raises(ValueError) as raised:
        jax_deepgemm.get_tma_aligned_size(8, element_size)
    assert str(raised.value) == (
        f"get_tma_aligned_size: element_size must divide 16, got {element_size}"
    )


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((-1, 4), ValueError, "x must be at least 0, got -1"),
        ((2**64, 4), ValueError, f"x must fit into 64 bits, got {2**64}"),
        ((8.0, 4), TypeError, "x must be an integer, got 8.0"),
        ((8, "4"), TypeError, "element_size must be an integer, got '4'"),
        ((8, 4.0), TypeError, "element_size must be an integer, got 4.0"),
    ],
    ids=str,
)
def test_tma_aligned_size_of_bad_numbers(
    arguments: tuple[Any, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as raised:
        jax_deepgemm.get_tma_aligned_size(*arguments)
    assert str(raised.value) == f"get_tma_aligned_size: {message}"


def test_m_alignment() -> None:
    alignment = jax_deepgemm.get_m_alignment_for_contiguous_layout()
    assert alignment == 128
    # Every tile of a group lies inside it.
    configs = jax_deepgemm.legal_configs(4096, 4096, 7168)
    assert all(c.block_m % alignment == 0 or alignment % c.block_m == 0 for c in configs)


@pytest.mark.parametrize("shape", [(7, 3), (1, 1), (0, 5), (2, 7, 3), (2, 3, 4, 5)], ids=str)
def test_col_major_keeps_the_values(shape: tuple[int, ...]) -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))
    convert = jax_deepgemm.get_col_major_tma_aligned_tensor
    for result in (convert(x), jax.jit(convert)(x), jax.jit(lambda x: convert(x) + 0)(x)):
        assert (result.shape, result.dtype) == (x.shape, x.dtype)
        np.testing.assert_array_equal(result, x)


def test_col_major_states_the_layout() -> None:
    convert = jax.jit(jax_deepgemm.get_col_major_tma_aligned_tensor)
    assert "dense<[0, 1]> : tensor<2xindex>" in convert.lower(jnp.zeros((7, 3))).as_text()
    # Minor to major: m, groups, k-blocks. Flattening the first two of it moves nothing.
    assert "dense<[1, 0, 2]> : tensor<3xindex>" in convert.lower(jnp.zeros((2, 7, 3))).as_text()


def test_col_major_scales_go_into_the_gemm() -> None:
    operands = numerics.dense_operands(33, 136, 272, seed=0)

    @jax.jit
    def gemm(a: Any, sfa: Any, b: Any, sfb: Any) -> jax.Array:
        sfa = jax_deepgemm.get_col_major_tma_aligned_tensor(sfa)
        return jax_deepgemm.gemm_fp8_fp8_bf16_nt((a, sfa), (b, sfb))

    error = numerics.worst_row_error(gemm(*operands), numerics.dense_oracle(operands))
    assert error < numerics.BF16_TOLERANCE


@pytest.mark.parametrize("shape", [(), (4,)], ids=str)
def test_col_major_needs_two_dimensions(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as raised:
        jax_deepgemm.get_col_major_tma_aligned_tensor(jnp.zeros(shape))
    assert str(raised.value) == (
        f"get_col_major_tma_aligned_tensor: x must have at least 2 dimensions, got {len(shape)}"
    )


def test_col_major_takes_numpy_arrays() -> None:
    x = np.arange(21, dtype=np.float32).reshape(7, 3)
    result = jax_deepgemm.get_col_major_tma_aligned_tensor(x)
    assert isinstance(result, jax.Array)
    np.testing.assert_array_equal(result, x)


@pytest.mark.parametrize("x", [1.0, [[1.0]], None, "x"], ids=str)
def test_col_major_of_no_array(x: Any) -> None:
    with pytest.raises(TypeError) as raised:
        jax_deepgemm.get_col_major_tma_aligned_tensor(x)
    assert str(raised.value) == (
        f"get_col_major_tma_aligned_tensor: x must be an array, got {type(x).__name__}"
    )


# --- SM limit ------------------------------------------------------------------------------------

A100 = {"name": "NVIDIA A100", "major": 8, "minor": 0, "num_sms": 108}
H100_PCIE = {"name": "NVIDIA H100 PCIe", "major": 9, "minor": 0, "num_sms": 114}


def see_gpus(monkeypatch: pytest.MonkeyPatch, *gpus: dict[str, Any]) -> None:
    monkeypatch.setattr(_native, "cuda_devices", lambda: list(gpus))


def test_limit_is_what_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch)
    for num_sms in (1, 66, 1000, np.int64(7)):
        jax_deepgemm.set_num_sms(num_sms)
        assert jax_deepgemm.get_num_sms() == num_sms
        assert device.num_sms_limit() == num_sms
        assert type(device.num_sms_limit()) is int


def test_limit_above_the_gpu_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, A100, H100_PCIE)
    for num_sms, expected in ((1, 1), (66, 66), (110, 110), (114, 114), (115, 114), (1000, 114)):
        jax_deepgemm.set_num_sms(num_sms)
        assert jax_deepgemm.get_num_sms() == expected


@pytest.mark.parametrize("num_sms", [0, -1])
def test_limit_must_be_positive(num_sms: int) -> None:
    jax_deepgemm.set_num_sms(66)
    with pytest.raises(ValueError) as raised:
        jax_deepgemm.set_num_sms(num_sms)
    assert str(raised.value) == f"set_num_sms: num_sms must be at least 1, got {num_sms}"
    assert jax_deepgemm.get_num_sms() == 66


@pytest.mark.parametrize(
    ("num_sms", "kind", "message"),
    [
        (1.5, TypeError, "must be an integer, got 1.5"),
        ("3", TypeError, "must be an integer, got '3'"),
        (10**12, ValueError, "must fit into 32 bits, got 1000000000000"),
    ],
)
def test_limit_must_be_an_integer(num_sms: Any, kind: type[Exception], message: str) -> None:
    jax_deepgemm.set_num_sms(66)
    with pytest.raises(kind) as raised:
        jax_deepgemm.set_num_sms(num_sms)
    assert str(raised.value) == f"set_num_sms: num_sms {message}"
    assert device.num_sms_limit() == 66


def test_without_a_limit_it_is_the_first_hopper_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, A100, H100_PCIE)
    assert jax_deepgemm.get_num_sms() == 114


@pytest.mark.parametrize("gpus", [(), (A100,)], ids=["no-gpu", "a100"])
def test_without_limit_and_hopper_gpu(
    gpus: tuple[dict[str, Any], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    see_gpus(monkeypatch, *gpus)
    with pytest.raises(RuntimeError) as raised:
        jax_deepgemm.get_num_sms()
    assert str(raised.value) == ("get_num_sms: there is no Hopper GPU here; call set_num_sms first")


def test_traced_function_keeps_the_limit_it_saw() -> None:
    operands = numerics.dense_operands(16, 136, 144, seed=1)

    def gemm(a: Any, sfa: Any, b: Any, sfb: Any) -> jax.Array:
        return jax_deepgemm.gemm_fp8_fp8_bf16_nt((a, sfa), (b, sfb))

    def limit_in(function: Any) -> str:
        text = function.trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
        return next(part for part in text.split(", ") if part.startswith("num_sms = "))

    first = jax.jit(lambda *operands: gemm(*operands))
    assert limit_in(first) == "num_sms = 0 : i64"
    jax_deepgemm.set_num_sms(66)
    second = jax.jit(lambda *operands: gemm(*operands))
    assert limit_in(first) == "num_sms = 0 : i64"
    assert limit_in(second) == "num_sms = 66 : i64"


def test_traced_batch_keeps_the_limit_it_saw() -> None:
    """Its configuration, too, is checked for the SMs of that time."""
    config = jax_deepgemm.GemmConfig(64, 64, 4, 1, cluster_k=4)

    def gemm(a: Any, sfa: Any, b: Any, sfb: Any) -> jax.Array:
        return jax_deepgemm.gemm_fp8_fp8_bf16_nt((a, sfa), (b, sfb), config=config)

    operands = numerics.dense_operands(16, 128, 512, seed=1)
    traced = []
    for axes in ((0, 0, None, None), (None, None, 0, 0), (0, 0, 0, 0)):
        batched = [
            x if axis is None else np.stack([x] * 4) for x, axis in zip(operands, axes, strict=True)
        ]
        traced.append(jax.jit(jax.vmap(gemm, in_axes=axes)).trace(*batched))
    jax_deepgemm.set_num_sms(1)
    for each in traced:
        assert "num_sms = 0 : i64" in each.lower(lowering_platforms=("cuda",)).as_text()


# --- Backend -------------------------------------------------------------------------------------


def see_default(monkeypatch: pytest.MonkeyPatch, **attributes: Any) -> None:
    seen = [SimpleNamespace(**attributes)]
    monkeypatch.setattr(jax, "local_devices", lambda backend: seen if backend is None else [])


H100_DEVICE = {
    "platform": "gpu",
    "device_kind": "NVIDIA H100 80GB HBM3",
    "compute_capability": "9.0",
}


@pytest.mark.parametrize("chosen", ["cpu", lambda: jax.devices("cpu")[0]], ids=["name", "device"])
def test_backend_of_a_chosen_cpu(chosen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cpus = jax.devices("cpu")
    with jax.default_device(chosen if isinstance(chosen, str) else chosen()):
        assert jax_deepgemm.backend() == "cpu: float32 reference"
        # Also where there is a GPU, which would be the default.
        devices = {None: [SimpleNamespace(**H100_DEVICE)], "cpu": cpus}
        monkeypatch.setattr(jax, "local_devices", lambda backend: devices[backend])
        assert jax_deepgemm.backend() == "cpu: float32 reference"
        assert machine.hopper_gpu() is None
        assert machine.why_no_gpu().endswith("JAX's default device here is cpu.")
    assert jax_deepgemm.backend().startswith("cuda: ")
    assert machine.hopper_gpu() is devices[None][0]


def test_default_device_is_where_arrays_go() -> None:
    for chosen in (jax.devices("cpu")[3], "cpu"):
        with jax.default_device(chosen):
            assert jnp.zeros(1).devices() == {device.default_device()}


def test_backend_of_a_hopper_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    see_default(monkeypatch, **H100_DEVICE)
    assert jax_deepgemm.backend() == "cuda: NVIDIA H100 80GB HBM3 (sm_90)"


def test_backend_of_another_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    see_default(monkeypatch, platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0")
    with pytest.raises(RuntimeError) as raised:
        jax_deepgemm.backend()
    assert str(raised.value) == (
        "backend: jax_deepgemm runs on Hopper GPUs (sm_90) and on CPUs, but JAX's default device "
        "is NVIDIA A100 (platform gpu, compute capability 8.0)"
    )


def test_backend_of_a_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    see_default(monkeypatch, platform="tpu", device_kind="TPU v5e")
    with pytest.raises(RuntimeError, match=r"is TPU v5e \(platform tpu, compute capability None\)"):
        jax_deepgemm.backend()
