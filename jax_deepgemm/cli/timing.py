"""Times: GPU kernels after a flush of the L2, by JAX's profiler; wall and host time."""

import contextlib
import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.profiler import ProfileData, ProfileOptions

GIGABYTE = 10**9

# What flushes begin by reading, by turns: eighths of what an H200 reads in 0.1 ms. See Flush.
READ_BYTES = tuple(GIGABYTE // 20 * eighths for eighths in (0, 3, 6, 1, 4, 7, 2, 5))

# Where a profile keeps kernels. The device plane's other lines repeat them by module and by op.
DEVICE_PLANE = "/device:GPU"
STREAM_LINE = "Stream #"

# Kernels that XLA launches as one CUDA graph could not be told apart in a trace.
NO_CUDA_GRAPHS: dict[str, str | bool] = {"xla_gpu_graph_min_graph_size": str(2**30)}

_call_numbers = itertools.count()


class Call:
    """A compiled call whose kernels can be told apart in a trace, by the name of its HLO module."""

    def __init__(
        self, function: Callable[..., jax.Array], *operands: Any, kernel_prefix: str = ""
    ) -> None:
        """Compiles `function(*operands)`.

        Args:
            function: jittable.
            *operands: what it is called with.
            kernel_prefix: what the names of the kernels of interest begin with.
        """

        def call(*operands: Any) -> jax.Array:
            return function(*operands)

        call.__name__ = f"timed_call_{next(_call_numbers)}"
        self.module = f"jit_{call.__name__}"
        self.kernel_prefix = kernel_prefix
        self._operands = operands
        self._compiled = jax.jit(call).lower(*operands).compile(NO_CUDA_GRAPHS)

    def __call__(self) -> jax.Array:
        """Dispatches the call; the result may not be ready."""
        result: jax.Array = self._compiled(*self._operands)
        return result


class KernelEvent(NamedTuple):
    """One kernel (or copy) on a GPU stream."""

    name: str
    module: str  # HLO module that launched it
    start_ns: float
    duration_ns: float


class CallTimes(NamedTuple):
    """Times of the repetitions of a call, in microseconds."""

    kernel_us: list[float]  # of the kernels of interest
    op_us: list[float]  # of all kernels, also those in which XLA prepares operands


class Flush:
    """Empties the L2 before a timed call.

    Writing gigabytes gives the GPU time to cool but leaves up to 50 MB of dirty lines, whose
    write-back would compete with the timed kernel; reading another buffer afterwards leaves clean
    lines, as streaming a model's other weights does.

    An H200's memory seems to pause for 1 to 2 us about every 0.1 ms. Calls at one distance may keep
    step with that, and most of them meet a pause, or none; so each begins with a read of another
    length.
    """

    def __init__(self, device: jax.Device, *, dirty_l2: bool) -> None:
        """Allocates the buffers.

        Args:
            device: the GPU.
            dirty_l2: leave the reading that follows the writing out.
        """
        memory_bytes = (device.memory_stats() or {}).get("bytes_limit", 0)
        gigabytes = 8 if memory_bytes >= 32 * GIGABYTE else 4
        self.method = (
            f"the GPU reads 0 to 0.35 GB, eight lengths by turns, then writes {gigabytes} GB"
        )
        self._value = jnp.float32(1)
        self._written = jnp.zeros(gigabytes * GIGABYTE // 4, jnp.float32)
        # Donated, so that calls that are queued ahead share one buffer.
        self._write = jax.jit(jnp.full_like, donate_argnums=0, keep_unused=True)
        self._unchanged = jnp.ones(GIGABYTE // 4, jnp.float32)  # 20 times the L2 of an H100
        self._read = None
        if not dirty_l2:
            self.method += ", then reads 1 GB"
            self._read = jax.jit(jnp.sum)
        read_some = jax.jit(lambda x, count: jnp.sum(x[:count]), static_argnums=1)
        self._read_some = itertools.cycle(
            [read_some.lower(self._unchanged, length // 4).compile() for length in READ_BYTES]
        )

    def __call__(self) -> None:
        """Queues the passes. Separate calls, because XLA may reorder them within one."""
        next(self._read_some)(self._unchanged)
        self._written = self._write(self._written, self._value)
        if self._read:
            self._read(self._unchanged)


def kernel_times_us(
    calls: Sequence[Call],
    flush: Callable[[], None],
    iterations: int,
    advance: Callable[[], None] = lambda: None,
    together: Sequence[int] | None = None,
) -> list[CallTimes]:
    """Kernel times of every call, in one profiler trace.

    Args:
        calls: compiled calls that have run before and are idle.
        flush: queued before each.
        iterations: timed repetitions of each call.
        advance: called for each call when its repetitions are done.
        together: numbers of neighbouring calls that take turns, in another order each time, so that
            what they are compared by is not how the clock or the memory drifts; their sum is
            `len(calls)`. By default each call has its repetitions one after the other.

    Returns:
        For each call the times of its `iterations` repetitions.
    """
    rng = np.random.default_rng(0)
    flush()  # compiles it
    with profiled() as profiles:
        first = 0
        for count in together or [1] * len(calls):
            for _ in range(iterations):
                for turn in rng.permutation(count):
                    flush()
                    result = calls[first + turn]()
            result.block_until_ready()
            for _ in range(count):
                advance()
            first += count
    events = kernel_events(profiles[0])
    return [
        CallTimes(
            call_times_us(events, call.module, iterations, call.kernel_prefix),
            call_times_us(events, call.module, iterations),
        )
        for call in calls
    ]


@contextlib.contextmanager
def profiled() -> Iterator[list[ProfileData]]:
    """Traces its body; the list that it yields holds the profile afterwards."""
    options = ProfileOptions()
    options.python_tracer_level = 0  # slows every dispatch
    options.enable_hlo_proto = False
    profiles: list[ProfileData] = []
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            yield profiles
        (path,) = Path(folder).glob("plugins/profile/*/*.xplane.pb")
        profiles.append(ProfileData.from_file(str(path)))


def kernel_events(profile: ProfileData) -> list[KernelEvent]:
    """Kernels of all GPUs in the order of their start."""
    with warnings.catch_warnings():
        # The type of `event.stats` has no __module__, which Python 3.12 and later complain about.
        warnings.simplefilter("ignore", DeprecationWarning)
        events = [
            KernelEvent(
                event.name,
                next((str(value) for key, value in event.stats if key == "hlo_module"), ""),
                event.start_ns,
                event.duration_ns,
            )
            for plane in profile.planes
            if plane.name.startswith(DEVICE_PLANE)
            for line in plane.lines
            if line.name.startswith(STREAM_LINE)
            for event in line.events
        ]
    return sorted(events, key=lambda event: event.start_ns)


def call_times_us(
    events: Sequence[KernelEvent], module: str, repetitions: int, prefix: str = ""
) -> list[float]:
    """Time of each repetition of a call: the sum over its kernels, gaps left out.

    Args:
        events: of the whole trace, in order.
        module: the call's HLO module.
        repetitions: of the call in the trace.
        prefix: only kernels whose name begins so count.
    """
    mine = [event for event in events if event.module == module and event.name.startswith(prefix)]
    per_call, rest = divmod(len(mine), repetitions)
    if not per_call or rest:
        seen = sorted({f"{event.module}:{event.name}" for event in events})
        raise RuntimeError(
            f"the trace has {len(mine)} kernels {prefix}* of {module} for "
            f"{repetitions} calls; it holds {len(events)} kernels: {', '.join(seen[:20])}"
        )
    return [
        sum(event.duration_ns for event in mine[i : i + per_call]) / 1e3
        for i in range(0, len(mine), per_call)
    ]


def wall_times_us(call: Call, iterations: int) -> list[float]:
    """Wall time of each call, result awaited."""
    times = []
    for _ in range(iterations):
        start = time.perf_counter()
        call().block_until_ready()
        times.append((time.perf_counter() - start) * 1e6)
    return times


def host_calls_us(
    calls: Mapping[str, Callable[[], jax.Array]], rounds: int = 9, repetitions: int = 400
) -> dict[str, float]:
    """What calls cost the host: many are queued and waited for once.

    Args:
        calls: jitted functions with their operands, by the names of the result.
        rounds: by turns, because the host's pace drifts; the median counts.
        repetitions: calls of each in a round.

    Returns:
        Microseconds per call, by name.
    """
    times_us: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call().block_until_ready()
    for _, (name, call) in itertools.product(range(rounds), calls.items()):
        start = time.perf_counter()
        for _ in range(repetitions):
            result = call()
        result.block_until_ready()
        times_us[name].append((time.perf_counter() - start) * 1e6 / repetitions)
    return {name: round(statistics.median(each), 2) for name, each in times_us.items()}
