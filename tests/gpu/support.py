"""What the GPU tests share: seed, tolerances, configurations, and ways to run and to judge."""

import concurrent.futures
import contextlib
import functools
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm
from jax_deepgemm import GemmConfig, device
from tests import numerics

# Every run draws other numbers; DG_TEST_SEED, which a failure prints, brings them back.
SEED = int(os.environ.get("DG_TEST_SEED") or secrets.randbits(32))

# Rounding to bf16 gives a row of few values an error of up to 7.6e-6; one wrong value among the
# 32768 of the longest row here gives 1.5e-5. The tensor cores keep 14 bits of the products of 32
# values of k, aligned to the largest of them.
TENSOR_CORE_SUMS = {"row_tolerance": 1e-5, "value_tolerance": 0.02}

# Finite, and far from every result here: an element that the kernel does not write is seen.
SENTINEL = 16384.0

# XLA's own matrix products are oracles here, so the time to tune them is wasted.
UNTUNED = {"xla_gpu_autotune_level": 0}

# Every structure that the kernel can take on.
CONFIGS = [
    # One math warpgroup.
    GemmConfig(64, 64, 4, 1),
    GemmConfig(64, 16, 16, 1),
    GemmConfig(64, 72, 4, 1, raster_m=1),
    GemmConfig(64, 192, 3, 1),
    # One warpgroup with two waves.
    GemmConfig(128, 64, 3, 1),
    GemmConfig(128, 128, 2, 1),
    # Two warpgroups that split columns.
    GemmConfig(64, 16, 8, 2),
    GemmConfig(64, 112, 4, 2),
    GemmConfig(64, 256, 4, 2),
    # Two warpgroups that split rows, one wave each.
    GemmConfig(128, 16, 6, 2),
    GemmConfig(128, 56, 4, 2),
    GemmConfig(128, 112, 3, 2, raster_m=3),
    GemmConfig(128, 136, 4, 2),
    GemmConfig(128, 176, 4, 2),
    GemmConfig(128, 192, 2, 2, raster_m=1),
    # Split by columns, because rows do not fit into registers.
    GemmConfig(128, 208, 2, 2),
    GemmConfig(128, 256, 3, 2, raster_m=3),
    # Two waves each.
    GemmConfig(256, 40, 3, 2),
    GemmConfig(256, 64, 4, 2),
    GemmConfig(256, 96, 3, 2),
    GemmConfig(256, 128, 3, 2, raster_m=3),
    # Multicast of B.
    GemmConfig(64, 48, 4, 1, cluster_m=2),
    GemmConfig(64, 96, 4, 2, cluster_m=2),
    GemmConfig(128, 128, 4, 2, cluster_m=2, raster_m=1),
    GemmConfig(128, 176, 3, 2, cluster_m=2),
    GemmConfig(128, 256, 3, 2, cluster_m=2),
    GemmConfig(256, 64, 3, 2, cluster_m=2),
    # Multicast of A.
    GemmConfig(64, 64, 4, 1, cluster_n=2),
    GemmConfig(64, 176, 4, 2, cluster_n=2, raster_m=3),
    GemmConfig(128, 56, 2, 2, cluster_n=2),
    GemmConfig(128, 112, 4, 2, cluster_n=2),
    GemmConfig(128, 224, 2, 2, cluster_n=2),
    GemmConfig(256, 128, 3, 2, cluster_n=2),
    # Split-k.
    GemmConfig(64, 64, 4, 1, cluster_k=2),
    GemmConfig(64, 56, 3, 1, cluster_k=4),
    GemmConfig(64, 112, 4, 2, cluster_k=4),
    GemmConfig(64, 256, 3, 2, cluster_k=2),
    GemmConfig(128, 96, 2, 2, cluster_k=2),
    GemmConfig(128, 136, 3, 2, cluster_k=4, raster_m=1),
]


def config_id(config: GemmConfig | None, num_sms: int = 0) -> str:
    """The last part of a test's id: the configuration, if there is one, and the SM limit."""
    text = f"-sms{num_sms}" if num_sms else ""
    if config:
        c = config
        tile = f"{c.block_m}x{c.block_n}-s{c.num_stages}-w{c.math_warpgroups}"
        text = f"-{tile}-c{c.cluster_m}x{c.cluster_n}x{c.cluster_k}-r{c.raster_m}{text}"
    return text


# --- Running -------------------------------------------------------------------------------------

_limit_lock = threading.Lock()


@contextlib.contextmanager
def sm_limit(num_sms: int) -> Iterator[None]:
    """Sets the limit (0: none) for what this thread traces, and puts the old one back."""
    with _limit_lock:
        before = device.num_sms_limit()
        device._num_sms_limit = 0
        if num_sms:
            jax_deepgemm.set_num_sms(num_sms)
        try:
            yield
        finally:
            device._num_sms_limit = before


def compile_ahead(builds: Iterable[Callable[[], Any]]) -> None:
    """Runs the builds, each of which keeps what it compiles, in parallel.

    Not where pytest-xdist has several processes: they share the tests and with them the builds.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        # A failure here is reported again by the case that it belongs to.
        concurrent.futures.wait([pool.submit(build) for build in builds])


@functools.cache
def _busy_work() -> tuple[Callable[..., jax.Array], list[jax.Array]]:
    """A program that keeps the GPU busy, and its operands."""
    operands = [jnp.asarray(x) for x in numerics.dense_operands(1000, 1096, 1040, seed=SEED)]

    def gemm(a: Any, sfa: Any, b: Any, sfb: Any) -> jax.Array:
        return jax_deepgemm.gemm_fp8_fp8_bf16_nt((a, sfa), (b, sfb))

    return jax.jit(gemm).lower(*operands).compile(), operands


@contextlib.contextmanager
def busy_gpu() -> Iterator[None]:
    """Another thread keeps running another program meanwhile."""
    stop = threading.Event()
    other, operands = _busy_work()
    expected = bits(other(*operands))
    rounds: list[bool] = []

    def work() -> None:
        while not stop.is_set():
            results = [other(*operands) for _ in range(8)]
            rounds.append(all(bits(result) == expected for result in results))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert rounds
    assert all(rounds)


# --- Memory around and under a result ------------------------------------------------------------


def neighbours(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Three bfloat16 arrays full of SENTINEL, one right behind the other in device memory.

    Their bytes must be a multiple of the allocator's 256, so that one begins where another ends.
    """
    nbytes = np.prod(shape).item() * 2
    assert nbytes % 256 == 0
    arrays: dict[int, jax.Array] = {}
    for _ in range(64):
        array = jnp.full(shape, SENTINEL, jnp.bfloat16)
        array.block_until_ready()
        arrays[array.unsafe_buffer_pointer()] = array
        for start in arrays:
            run = [arrays.get(start + i * nbytes) for i in range(3)]
            if all(part is not None for part in run):
                return run[0], run[1], run[2]  # type: ignore[return-value]
    pytest.fail("the allocator put no three of 64 arrays side by side")


def write_into(
    function: Callable[..., jax.Array], poison: jax.Array, *operands: Any, num_sms: int = 0
) -> jax.Array:
    """Runs an operation with its result in the donated memory of `poison`."""
    pointer = poison.unsafe_buffer_pointer()
    jitted = jax.jit(
        lambda _poison, *operands: function(*operands), donate_argnums=0, keep_unused=True
    )
    with sm_limit(num_sms):
        d: jax.Array = jitted(poison, *operands)
    # Otherwise the test would show nothing.
    assert d.unsafe_buffer_pointer() == pointer, "XLA did not write into the donated array"
    return d


# --- Judging -------------------------------------------------------------------------------------


def bits(d: jax.Array) -> bytes:
    return np.asarray(d).tobytes()


def check(d: jax.Array, expected: np.ndarray[Any, Any]) -> None:
    """Compares every element with the float64 product, on the host."""
    numerics.check(d, expected, **TENSOR_CORE_SUMS)


def judge(
    a: jax.Array, sfa: jax.Array, b: jax.Array, sfb: jax.Array, d: jax.Array, count: Any = None
) -> tuple[jax.Array, ...]:
    """The errors that `check` looks at, of the first `count` rows (None: all); needs 64-bit types.

    One product: a [m, k], b [n, k]. For the GPU, where its own float64 product takes no time.
    """

    def dequantize(values: jax.Array, scales: jax.Array, block_rows: int) -> jax.Array:
        rows, columns = values.shape
        spread = jnp.repeat(jnp.repeat(scales, block_rows, axis=0), 128, axis=1)
        return values.astype(jnp.float64) * spread[:rows, :columns].astype(jnp.float64)

    x = dequantize(a, sfa, 1) @ dequantize(b, sfb, 128).T
    d = d.astype(jnp.float64)
    if count is not None:
        valid = jnp.arange(len(a))[:, None] < count
        x, d = jnp.where(valid, x, 0), jnp.where(valid, d, 0)
    distance = jnp.square(d - x).sum(axis=1)
    power = (jnp.square(d) + jnp.square(x)).sum(axis=1)
    excess = jnp.abs(d - x) - jnp.abs(x) / 256
    rms = jnp.sqrt(jnp.square(x).mean(axis=1, keepdims=True))

    def ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
        return jnp.where(whole == 0, part, part / whole)  # zeros where right, and NaN stays NaN

    return (
        ratio(distance.sum(), power.sum()),
        ratio(distance, power).max(),
        ratio(excess, rms).max(),
    )


def check_errors(errors: tuple[jax.Array, ...]) -> None:
    """Asserts that what `judge` returned is small; a NaN is not."""
    error, worst_row, worst_value = map(float, errors)
    assert error < numerics.BF16_TOLERANCE
    assert worst_row < TENSOR_CORE_SUMS["row_tolerance"]
    assert worst_value < TENSOR_CORE_SUMS["value_tolerance"]


def random_bytes(rng: np.random.Generator, *shape: int) -> np.ndarray[Any, Any]:
    """Every finite e4m3 value equally often: far faster to make than normal numbers."""
    values = np.frombuffer(rng.bytes(np.prod(shape).item()), np.uint8).copy()
    values[values & 0x7F == 0x7F] = 0  # the two NaNs
    return values.view(numerics.E4M3).reshape(shape)
