"""What is saved: exported programs, older ones too, and the persistent compilation cache."""

import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_deepgemm
from jax_deepgemm import GemmConfig, ffi
from tests import grouped_cases, numerics
from tests.lowering import cuda_calls, cuda_text, problem_of

DATA = pathlib.Path(__file__).parents[1] / "data"
ROOT = pathlib.Path(__file__).parents[2]

# What the attributes' struct had before it had types.
FIRST_MEMBERS = [
    "op",
    "num_groups",
    "m",
    "expected_m",
    "n",
    "k",
    "num_sms",
    "fill_zero",
    *GemmConfig.__dataclass_fields__,
]


def old_exports() -> list[pathlib.Path]:
    """Programs that earlier releases exported for CUDA: OP-VERSION.jax_export."""
    return sorted(DATA.glob("*.jax_export"))


@pytest.mark.parametrize("path", old_exports(), ids=lambda path: path.stem)
def test_older_export_still_lowers(path: pathlib.Path) -> None:
    """To a target that this release registers, with the attributes of that one."""
    pytest.importorskip("flatbuffers", reason="jax.export saves through flatbuffers")
    exported = export.deserialize(bytearray(path.read_bytes()))
    assert exported.platforms == ("cuda",)
    arguments = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in exported.in_avals]
    (call,) = cuda_calls(cuda_text(exported.call, *arguments))
    assert sorted(problem_of(call)) == sorted(FIRST_MEMBERS)


def test_export_carries_every_attribute() -> None:
    pytest.importorskip("flatbuffers", reason="jax.export saves through flatbuffers")
    operands = numerics.dense_operands(70, 136, 256, seed=0)
    allowed = [export.DisabledSafetyCheck.custom_call(name) for name in ffi.CUSTOM_CALL_TARGETS]
    exported = export.export(
        jax.jit(lambda a, sfa, b, sfb: jax_deepgemm.gemm_fp8_fp8_bf16_nt((a, sfa), (b, sfb))),
        platforms=["cuda"],
        disabled_checks=allowed,
    )(*operands)
    restored = export.deserialize(exported.serialize())
    (call,) = cuda_calls(cuda_text(restored.call, *operands))
    assert sorted(problem_of(call)) == sorted(
        [*FIRST_MEMBERS, "a_type", "b_type", "batch_invariant"]
    )


@pytest.mark.parametrize("bias", [None, np.ones(136, np.float32)], ids=["plain", "bias"])
def test_export_of_a_layer_as_argument(bias: Any) -> None:
    pytest.importorskip("flatbuffers", reason="jax.export saves through flatbuffers")
    rng = np.random.default_rng(0)
    layer = jax_deepgemm.Linear.quantize(rng.standard_normal((136, 272), np.float32), bias)
    x = rng.standard_normal((3, 272), np.float32)
    saved = export.export(jax.jit(lambda layer, x: (layer, layer(x))))(layer, x).serialize()
    same, y = export.deserialize(saved).call(layer, x)
    assert isinstance(same, jax_deepgemm.Linear)
    np.testing.assert_array_equal(np.asarray(y), np.asarray(layer(x)))


def test_export_of_a_sharded_program() -> None:
    """Under `jax.shard_map`; one that XLA partitions has a callback into this process."""
    devices = jax.devices("cpu")
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,), devices=devices)
    rows, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("x"), PartitionSpec()))
    operands = [
        jax.device_put(x, s)
        for x, s in zip(
            numerics.dense_operands(64, 136, 256, seed=0), (rows, rows, whole, whole), strict=True
        )
    ]

    def gemm(a: Any, sfa: Any, b: Any, sfb: Any) -> jax.Array:
        return jax_deepgemm.gemm_fp8_fp8_bf16_nt((a, sfa), (b, sfb))

    allowed = [export.DisabledSafetyCheck.custom_call(name) for name in ffi.CUSTOM_CALL_TARGETS]
    mapped = jax.shard_map(
        gemm,
        mesh=mesh,
        in_specs=(rows.spec, rows.spec, whole.spec, whole.spec),
        out_specs=rows.spec,
    )
    exported = export.export(jax.jit(mapped), platforms=["cuda"], disabled_checks=allowed)(
        *operands
    )
    assert exported.nr_devices == 8
    (call,) = cuda_calls(exported.mlir_module())
    assert problem_of(call)["m"] == 8
    with pytest.raises(NotImplementedError, match="serialization of host_callbacks"):
        export.export(jax.jit(gemm), platforms=["cuda"], disabled_checks=allowed)(*operands)


def run(code: str, **environment: str) -> Any:
    """Runs code in a process of its own, on four CPU devices; returns its last line as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
        | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


# The handlers are host code until they ask for the driver, so that XLA's CPU backend can call them.
DECODE = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax_deepgemm.ffi import _native
jax.devices()
jax.ffi.register_ffi_type(_native.GEMM_STATE_TYPE, _native.gemm_state_type(), platform="cpu")
jax.ffi.register_ffi_target(_native.GEMM_TARGET, _native.gemm_handlers(), platform="cpu")

def error(**problem):
    call = jax.ffi.ffi_call(_native.GEMM_TARGET, jax.ShapeDtypeStruct((8, 8), jnp.bfloat16))
    problem = {name: np.int64(value) for name, value in problem.items()}
    arrays = [jnp.zeros((8, 16))] * 4
    try:
        jax.jit(lambda *x: call(*x, problem=problem)).lower(*arrays).compile()
    except jax.errors.JaxRuntimeError as error:
        return str(error)

first = dict.fromkeys(FIRST.split(), 0) | dict(num_groups=1, m=8, n=8, k=16, expected_m=8)
without = {name: value for name, value in first.items() if name != "k"}
print(json.dumps([
    error(**first), error(**first, a_type=1, b_type=0), error(**first, shape_of_things=1),
    error(**without),
]))
"""


def test_attributes_that_older_and_newer_releases_write() -> None:
    """Missing types mean e4m3fn; what is not known is refused, and so is what lacks more."""
    old, current, newer, broken = run(
        DECODE.replace("FIRST", repr(" ".join(FIRST_MEMBERS))), CUDA_VISIBLE_DEVICES="-1"
    )
    for message in (old, current):  # they are read, and then there is no GPU
        assert "attribute" not in message
        assert re.search(r"gemm_fp8_fp8_bf16_nt: .*(libcuda|driver|device)", message)
    assert "unknown attribute shape_of_things: the program was exported by a newer" in newer
    assert "no attribute k" in broken


CACHED = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import jax_deepgemm
from tests import numerics

events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
operands = [
    jax.device_put(x, NamedSharding(mesh, PartitionSpec("x")) if SHARDED and i < 2 else None)
    for i, x in enumerate(numerics.dense_operands(64, 136, 256, seed=0))
]
if SHARDED:
    operands[2:] = [jax.device_put(x, NamedSharding(mesh, PartitionSpec())) for x in operands[2:]]
events.clear()
gemm = jax.jit(lambda a, sfa, b, sfb: jax_deepgemm.gemm_fp8_fp8_bf16_nt((a, sfa), (b, sfb)))
gemm(*operands)
print(json.dumps([event.rsplit("/", 1)[1] for event in events if "compilation_cache" in event]))
"""


@pytest.mark.parametrize("sharded", [False, True], ids=["one-device", "sharded"])
def test_persistent_compilation_cache(sharded: bool, tmp_path: pathlib.Path) -> None:
    """A second process finds what the first one compiled.

    Partitioned programs carry the number of a callback, which JAX leaves out of the key if told to.
    """
    code = CACHED.replace("SHARDED", str(sharded))
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY": "1",
    }
    assert "cache_misses" in run(code, **environment)
    second = run(code, **environment)
    assert "cache_hits" in second
    assert "cache_misses" not in second


def test_programs_that_differ_in_an_attribute_differ_without_the_callback() -> None:
    """Or the persistent cache would return one for the other, where it leaves the callback out."""
    problem = grouped_cases.Problem("masked", 8, 16, 64, 128)
    operands = problem.operands(seed=0)
    counts = np.full(8, 3, np.int32)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu"))
    arguments = [
        jax.device_put(jnp.asarray(x), NamedSharding(mesh, PartitionSpec("x")))
        for x in (*operands, counts)
    ]

    def text(**options: Any) -> str:
        function = jax.jit(lambda *x: grouped_cases.call("masked", *x, **options))
        lowered = function.lower(*arguments).as_text()
        assert "CustomSPMDPartitioning" in lowered
        return re.sub(r'backend_config = "\d+"', "", lowered)

    assert text(fill="zero") == text(fill="zero")
    assert text(fill="zero") != text(fill="undefined")
    assert text(expected_m=3) != text(expected_m=16)
