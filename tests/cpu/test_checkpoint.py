"""DeepSeek-style checkpoints: written, read back bit for bit, sharded, and never misread."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_deepgemm
from jax_deepgemm import QuantizedArray, checkpoint
from jax_deepgemm.checkpoint import Checkpoint, save_checkpoint, to_ue8m0_scales

NUM_EXPERTS = 8
HIDDEN, INTER = 512, 256


def bits(array: Any) -> tuple[Any, Any, bytes]:
    array = np.asarray(array)
    return array.dtype, array.shape, array.tobytes()


def assert_same(got: Any, wanted: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert bits(a) == bits(b)


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh(
        (4, 2), ("e", "t"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu")
    )


def two_layers(power_of_two: bool = False) -> dict[str, Any]:
    """A dense layer and one of experts, in DeepSeek-V3's naming, with parts that are not FP8."""
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> QuantizedArray:
        x = rng.standard_normal(shape, np.float32) * np.exp2(rng.integers(-3, 3, (shape[-2], 1)))
        return jax_deepgemm.quantize_per_block(x, power_of_two=power_of_two)

    def vector(size: int) -> Any:
        return jnp.asarray(rng.standard_normal(size), jnp.bfloat16)

    model: dict[str, Any] = {
        "model.embed_tokens.weight": jnp.asarray(rng.standard_normal((96, HIDDEN)), jnp.bfloat16),
        "model.norm.weight": vector(HIDDEN),
        "lm_head.weight": jnp.asarray(rng.standard_normal((96, HIDDEN)), jnp.bfloat16),
    }
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        model[f"{prefix}.input_layernorm.weight"] = vector(HIDDEN)
        # kv_a's 576 rows are no multiple of 128.
        model[f"{prefix}.self_attn.kv_a_proj_with_mqa"] = weight(576, HIDDEN)
        model[f"{prefix}.self_attn.o_proj"] = weight(HIDDEN, 1024)
    for name, shape in {
        "gate_proj": (INTER, HIDDEN),
        "up_proj": (INTER, HIDDEN),
        "down_proj": (HIDDEN, INTER),
    }.items():
        model[f"model.layers.0.mlp.{name}"] = weight(*shape)
        model["model.layers.1.mlp.experts.{}." + name] = weight(NUM_EXPERTS, *shape)
    model["model.layers.1.mlp.gate.weight"] = jnp.asarray(
        rng.standard_normal((NUM_EXPERTS, HIDDEN)), jnp.bfloat16
    )
    model["model.layers.1.mlp.gate.e_score_correction_bias"] = jnp.asarray(
        rng.standard_normal(NUM_EXPERTS), jnp.float32
    )
    return model


def load_model(
    opened: Checkpoint,
    model: dict[str, Any],
    shardings: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Loads everything that `model` has."""
    shardings = shardings or {}
    result: dict[str, Any] = {}
    for name, tensor in model.items():
        sharding = shardings.get(name)
        if not isinstance(tensor, QuantizedArray):
            result[name] = opened.load(name, sharding=sharding)
        elif "{}" in name:
            result[name] = opened.load_experts(
                name, range(NUM_EXPERTS), sharding=sharding, **options
            )
        else:
            result[name] = opened.load_quantized(name, sharding=sharding, **options)
    return result


@pytest.mark.parametrize("max_file_bytes", [10**9, 300_000], ids=["one-file", "many-files"])
def test_round_trip(tmp_path: pathlib.Path, max_file_bytes: int) -> None:
    model = two_layers()
    save_checkpoint(tmp_path, model, max_file_bytes=max_file_bytes)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (max_file_bytes == 10**9)
    with Checkpoint(tmp_path) as opened:
        assert "model.layers.1.mlp.experts.7.down_proj.weight_scale_inv" in opened.names
        assert opened.is_quantized("model.layers.0.mlp.up_proj")
        assert not opened.is_quantized("model.norm")
        loaded = load_model(opened, model)
    assert_same(loaded, model)


def test_round_trip_onto_a_mesh(tmp_path: pathlib.Path, mesh: jax.sharding.Mesh) -> None:
    model = two_layers()
    save_checkpoint(tmp_path, model, max_file_bytes=10**6)

    def sharding(*spec: Any) -> NamedSharding:
        return NamedSharding(mesh, P(*spec))

    shardings = {
        "model.embed_tokens.weight": sharding("e", "t"),
        "model.norm.weight": sharding(("e", "t")),
        "model.layers.0.self_attn.o_proj": sharding(None, ("e", "t")),
        "model.layers.1.self_attn.o_proj": sharding("e", "t"),
        "model.layers.0.mlp.gate_proj": sharding("t", None),
        "model.layers.0.mlp.down_proj": sharding("e", "t"),
        "model.layers.1.mlp.experts.{}.gate_proj": sharding(("e", "t"), None, None),
        "model.layers.1.mlp.experts.{}.up_proj": sharding("t", None, "e"),
        "model.layers.1.mlp.experts.{}.down_proj": sharding("e", None, "t"),
    }
    loaded = load_model(Checkpoint(tmp_path), model, shardings)
    assert_same(loaded, model)
    for name, wanted in shardings.items():
        for array in jax.tree.leaves(loaded[name]):
            assert array.sharding == wanted
            assert len(array.sharding.device_set) == 8


def test_a_device_reads_only_its_part(
    tmp_path: pathlib.Path, mesh: jax.sharding.Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = two_layers()
    save_checkpoint(tmp_path, model)
    read: list[tuple[str, tuple[int, ...]]] = []
    original = Checkpoint.read

    def counting(self: Checkpoint, name: str, index: Any = ...) -> Any:
        array = original(self, name, index)
        read.append((name, array.shape))
        return array

    monkeypatch.setattr(Checkpoint, "read", counting)
    name = "model.layers.1.mlp.experts.{}.down_proj"
    Checkpoint(tmp_path).load_experts(
        name, range(NUM_EXPERTS), sharding=NamedSharding(mesh, P("e", None, "t"))
    )
    assert {shape for name, shape in read if name.endswith(".weight")} == {(HIDDEN, INTER // 2)}
    assert {shape for name, shape in read if name.endswith("_inv")} == {(HIDDEN // 128, 1)}
    assert len(read) == 2 * NUM_EXPERTS * 2  # values and scales, two parts of each expert


def test_bytes_of_other_devices_are_not_touched(tmp_path: pathlib.Path) -> None:
    """The rest of the file is cut off below the mapping: whoever touches it is killed."""
    program = """
        import os, sys
        import jax, ml_dtypes
        import numpy as np
        from jax.sharding import NamedSharding, PartitionSpec
        from jax_deepgemm.checkpoint import Checkpoint, save_checkpoint

        folder, device = sys.argv[1], int(sys.argv[2])
        rng = np.random.default_rng(0)
        values = rng.integers(0, 100, (4096, 1024), np.uint8).view(ml_dtypes.float8_e4m3fn)
        scales = rng.random((32, 8), np.float32)
        save_checkpoint(folder, {"w.weight": values, "w.weight_scale_inv": scales})
        file = folder + "/model-00001-of-00001.safetensors"
        checkpoint = Checkpoint(folder)
        checkpoint.read("w.weight_scale_inv")  # which maps the file
        os.truncate(file, os.path.getsize(file) - values.nbytes // 2)

        def one_device(shape, sharding, callback):  # as on a host that has no other
            return callback(sharding.devices_indices_map(shape)[jax.devices()[device]])

        jax.make_array_from_callback = one_device
        mesh = jax.make_mesh((2,), ("n",))
        sharding = NamedSharding(mesh, PartitionSpec("n", None))
        loaded = checkpoint.load_quantized("w", sharding=sharding)
        assert loaded.values.tobytes() == values[2048 * device :][:2048].tobytes()
        np.testing.assert_array_equal(loaded.scales, scales[16 * device :][:16])
        print("loaded")
    """
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    runs = [
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), str(tmp_path), str(device)],
            env=os.environ | flags,
            capture_output=True,
            text=True,
            check=False,
        )
        for device in range(2)
    ]
    assert (runs[0].returncode, runs[0].stdout) == (0, "loaded\n"), runs[0].stderr
    assert runs[1].returncode == -signal.SIGBUS  # its half is what was cut off


def test_gate_and_up_side_by_side(tmp_path: pathlib.Path, mesh: jax.sharding.Mesh) -> None:
    model = two_layers()
    save_checkpoint(tmp_path, model)
    template = "model.layers.1.mlp.experts.{}."
    names = [template + "gate_proj", template + "up_proj"]
    experts = [5, 0, 3, 1]
    wanted = QuantizedArray(
        *(
            jnp.concatenate([model[name][part][np.array(experts)] for name in names], axis=1)
            for part in range(2)
        )
    )
    opened = Checkpoint(tmp_path)
    assert_same(opened.load_experts(names, experts), wanted)
    # Two shards of rows each have a half of gate or of up; one spans neither.
    for spec in (P("e", "t", None), P(None, "e", "t"), P("t", None, None)):
        assert_same(opened.load_experts(names, experts, sharding=NamedSharding(mesh, spec)), wanted)
    dense = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")]
    assert opened.load_quantized(dense).shape == (2 * INTER, HIDDEN)


def test_loaded_experts_multiply(tmp_path: pathlib.Path) -> None:
    model = two_layers()
    save_checkpoint(tmp_path, model)
    name = "model.layers.1.mlp.experts.{}.up_proj"
    loaded = Checkpoint(tmp_path).load_experts(name, range(NUM_EXPERTS))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((40, HIDDEN)), jnp.bfloat16)
    sizes = jnp.full(NUM_EXPERTS, 5, jnp.int32)
    d = jax_deepgemm.m_grouped_gemm_fp8_fp8_bf16_nt_ragged(
        jax_deepgemm.quantize_per_token(x), loaded, sizes
    )
    wanted = jax.lax.ragged_dot(
        x.astype(jnp.float32), model[name].dequantize().mT, sizes, precision="highest"
    )
    assert float(jnp.abs(d - wanted).max() / jnp.abs(wanted).max()) < 0.05


def test_safetensors_reads_what_we_write(tmp_path: pathlib.Path) -> None:
    safetensors = pytest.importorskip("safetensors", reason="needs the extra `examples`")
    from safetensors.numpy import load_file, save_file

    model = two_layers(power_of_two=True)
    save_checkpoint(tmp_path, model, scale_format="ue8m0")
    (file,) = tmp_path.glob("*.safetensors")
    with safetensors.safe_open(file, framework="np") as opened:
        weight = opened.get_slice("model.layers.0.mlp.up_proj.weight")
        assert (weight.get_dtype(), weight.get_shape()) == ("F8_E4M3", [INTER, HIDDEN])
        scale = opened.get_slice("model.layers.0.mlp.up_proj.weight_scale_inv")
        assert (scale.get_dtype(), scale.get_shape()) == ("F8_E8M0", [2, 4])
        name = "model.layers.1.mlp.gate.e_score_correction_bias"
        assert bits(opened.get_tensor(name)) == bits(model[name])
    # And the other way round, a pair as any two arrays.
    pair = model["model.layers.0.mlp.up_proj"]
    arrays = {"w.scales": np.asarray(pair.scales), "w.bytes": np.asarray(pair.values).view("u1")}
    save_file(arrays, tmp_path / "pair.safetensors")
    mine = Checkpoint(tmp_path / "pair.safetensors")
    restored = load_file(tmp_path / "pair.safetensors")
    for name, array in arrays.items():
        assert bits(mine.read(name)) == bits(restored[name]) == bits(array)


# --- Saving over a checkpoint, and failing to ---------------------------------------------------


def tensors_of(folder: pathlib.Path) -> dict[str, Any]:
    with Checkpoint(folder) as opened:
        return {name: bits(opened.read(name)) for name in opened.names}


def floats(count: int, value: float) -> dict[str, Any]:
    return {f"x{i}": np.full(16, value + i, np.float32) for i in range(count)}


def test_saving_again_leaves_one_checkpoint(tmp_path: pathlib.Path) -> None:
    others = ["config.json", "model.safetensors.bak", "model-00001-of-00002.safetensors.md5"]
    save_checkpoint(tmp_path, floats(5, 1.0), max_file_bytes=64)
    assert len(list(tmp_path.glob("*.safetensors"))) == 5
    for other in others:
        (tmp_path / other).write_text("mine")
    (tmp_path / "model-00007-of-00009.safetensors.incomplete").write_text("of a killed process")
    save_checkpoint(tmp_path, floats(2, 7.0), max_file_bytes=64)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert {file.name for file in tmp_path.iterdir()} == {*files, *others, checkpoint.INDEX}
    assert tensors_of(tmp_path) == {name: bits(x) for name, x in floats(2, 7.0).items()}
    # Without the index too.
    (tmp_path / checkpoint.INDEX).unlink()
    assert tensors_of(tmp_path) == {name: bits(x) for name, x in floats(2, 7.0).items()}


def test_an_open_checkpoint_outlives_saving_over_it(tmp_path: pathlib.Path) -> None:
    save_checkpoint(tmp_path, floats(2, 1.0))
    with Checkpoint(tmp_path) as opened:
        np.testing.assert_array_equal(opened.read("x0"), np.full(16, 1.0))
        save_checkpoint(tmp_path, floats(1, 5.0))
        np.testing.assert_array_equal(opened.read("x1"), np.full(16, 2.0))


class _Full(OSError):
    pass


def test_what_fails_leaves_the_old_checkpoint(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, floats(3, 1.0), max_file_bytes=64)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    # A tensor that cannot be written is found before anything is.
    with pytest.raises(
        TypeError, match="bad must be of a type that safetensors files have, got <U"
    ):
        save_checkpoint(tmp_path, floats(3, 9.0) | {"bad": np.array("text")}, max_file_bytes=64)
    # The disk is full at the last shard.
    fetch, fetched = checkpoint._fetch, []

    def failing(array: Any, expert: int | None = None) -> Any:
        fetched.append(array)
        if len(fetched) == 3:
            raise _Full
        return fetch(array, expert)

    monkeypatch.setattr(checkpoint, "_fetch", failing)
    with pytest.raises(_Full):
        save_checkpoint(tmp_path, floats(3, 9.0), max_file_bytes=64)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_process_killed_between_two_names(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, floats(3, 1.0), max_file_bytes=64)
    replace = pathlib.Path.replace

    def killed(self: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
        if target.name.startswith("model-00002"):
            raise _Full
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(pathlib.Path, "replace", killed)
        with pytest.raises(_Full):
            save_checkpoint(tmp_path, floats(3, 9.0), max_file_bytes=64)
    with pytest.raises(ValueError, match=r"was being saved and is not complete$"):
        Checkpoint(tmp_path)
    save_checkpoint(tmp_path, floats(3, 9.0), max_file_bytes=64)
    assert tensors_of(tmp_path) == {name: bits(x) for name, x in floats(3, 9.0).items()}
    assert not list(tmp_path.glob("*.incomplete"))


def test_tensors_are_fetched_when_their_file_is_written(
    tmp_path: pathlib.Path, mesh: jax.sharding.Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Split ones too, from the devices that have them, and experts one at a time."""
    model = two_layers()
    template = "model.layers.1.mlp.experts.{}.down_proj"
    specs = {
        "model.embed_tokens.weight": P("e", "t"),
        "model.norm.weight": P("t"),  # and copies along e
        template: P("e", None, "t"),
        "model.layers.1.mlp.experts.{}.up_proj": P(None, "t", None),
    }
    split = model | {
        name: jax.device_put(model[name], NamedSharding(mesh, spec)) for name, spec in specs.items()
    }
    save_checkpoint(tmp_path / "whole", model, max_file_bytes=300_000)
    wanted = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    events: list[Any] = []
    fetch, write = checkpoint._fetch, checkpoint._write_file

    def fetching(array: Any, expert: int | None = None) -> Any:
        result = fetch(array, expert)
        events.append(result.nbytes)
        return result

    def writing(file: pathlib.Path, tensors: Any) -> None:
        events.append(file.name)
        write(file, tensors)

    monkeypatch.setattr(checkpoint, "_fetch", fetching)
    monkeypatch.setattr(checkpoint, "_write_file", writing)
    save_checkpoint(tmp_path / "split", split, max_file_bytes=300_000)
    assert {file.name: file.read_bytes() for file in (tmp_path / "split").iterdir()} == wanted
    assert isinstance(events[0], str)  # nothing before the first file
    largest = max(event for event in events if not isinstance(event, str))
    assert largest == HIDDEN * 1024  # o_proj; the experts together have more
    assert largest < NUM_EXPERTS * HIDDEN * INTER
    starts = [i for i, event in enumerate(events) if isinstance(event, str)]
    for start, stop in zip(starts, [*starts[1:], len(events)], strict=True):
        held = sum(events[start + 1 : stop])
        assert held <= max(300_000, largest)


@pytest.mark.parametrize(
    "array",
    [np.float32(3), np.zeros((0, 4), np.int8), np.arange(12).reshape(3, 4).T, [1.5, 2.5], True],
    ids=["scalar", "empty", "transposed", "list", "bool"],
)
def test_other_arrays(tmp_path: pathlib.Path, array: Any) -> None:
    save_checkpoint(tmp_path, {"x": array})
    assert bits(Checkpoint(tmp_path).read("x")) == bits(array)


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize(
    "array",
    [np.array([2**40 + 5, 1]), np.array([1.0, 1e300]), np.array([2**63], np.uint64)],
    ids=["int64", "float64", "uint64"],
)
def test_64_bits_are_never_cut_off(
    tmp_path: pathlib.Path, mesh: jax.sharding.Mesh, array: Any, sharded: bool
) -> None:
    save_checkpoint(tmp_path, {"counts": array})
    sharding = NamedSharding(mesh, P()) if sharded else None
    with Checkpoint(tmp_path) as opened:
        with pytest.raises(TypeError) as raised:
            opened.load("counts", sharding=sharding)
        assert str(raised.value) == (
            "Checkpoint.load: counts must be of at most 32 bits where jax_enable_x64 is off, "
            f"got {array.dtype}[{len(array)}]: read() returns it as a NumPy array"
        )
        assert bits(opened.read("counts")) == bits(array)
        with jax.enable_x64(True):
            assert bits(opened.load("counts", sharding=sharding)) == bits(array)


# --- Powers of two -------------------------------------------------------------------------------


def test_ue8m0_scales_come_back_as_float32(tmp_path: pathlib.Path, mesh: jax.sharding.Mesh) -> None:
    model = two_layers(power_of_two=True)
    save_checkpoint(tmp_path, model, scale_format="ue8m0")
    opened = Checkpoint(tmp_path)
    assert opened.read("model.layers.0.mlp.up_proj.weight_scale_inv").dtype.name == (
        "float8_e8m0fnu"
    )
    for scale_format in (None, "ue8m0"):
        assert_same(load_model(opened, model, scale_format=scale_format), model)
    name = "model.layers.0.mlp.down_proj"
    sharding = NamedSharding(mesh, P("e", "t"))
    assert_same(opened.load_quantized(name, sharding=sharding), model[name])
    with pytest.raises(TypeError, match=r"weight_scale_inv must be F32, got F8_E8M0$"):
        opened.load_quantized(name, scale_format="float32")


def one_weight(
    folder: pathlib.Path, scales: Any, values: Any = None, name: str = "w"
) -> Checkpoint:
    if values is None:
        values = np.zeros((256, 384), ml_dtypes.float8_e4m3fn)
    save_checkpoint(folder, {f"{name}.weight": values, f"{name}.weight_scale_inv": scales})
    return Checkpoint(folder)


EXPONENTS = np.arange(120, 126, dtype=np.uint8).reshape(2, 3)


def test_raw_exponents_only_on_request(tmp_path: pathlib.Path) -> None:
    opened = one_weight(tmp_path, EXPONENTS)
    message = (
        r"^Checkpoint.load_quantized: w.weight_scale_inv must be F32 or F8_E8M0, got U8; "
        r'scale_format="ue8m0" reads it as exponents of powers of two$'
    )
    with pytest.raises(TypeError, match=message):
        opened.load_quantized("w")
    scales = opened.load_quantized("w", scale_format="ue8m0").scales
    np.testing.assert_array_equal(scales, np.ldexp(1.0, EXPONENTS.astype(int) - 127))


@pytest.mark.parametrize("bad", [0, 255])
def test_exponents_that_are_no_normal_number(tmp_path: pathlib.Path, bad: int) -> None:
    exponents = EXPONENTS.copy()
    exponents[1, 1] = bad
    opened = one_weight(tmp_path, exponents.view(ml_dtypes.float8_e8m0fnu))
    with pytest.raises(ValueError, match=r"w.weight_scale_inv must hold exponents from 1 to 254$"):
        opened.load_quantized("w")


@pytest.mark.parametrize("bad", [3.0, 0.0, -2.0, np.inf, np.nan, 2.0**-130])
def test_float32_scales_called_powers_of_two_are_checked(
    tmp_path: pathlib.Path, bad: float
) -> None:
    scales = np.exp2(np.arange(-3, 3, dtype=np.float32)).reshape(2, 3)
    opened = one_weight(tmp_path, scales)
    np.testing.assert_array_equal(opened.load_quantized("w", scale_format="ue8m0").scales, scales)
    np.testing.assert_array_equal(
        to_ue8m0_scales(scales).view(np.uint8), 127 + np.log2(scales).astype(int)
    )
    scales[1, 2] = bad
    with pytest.raises(ValueError, match="must hold powers of two, as scale_format says"):
        one_weight(tmp_path, scales).load_quantized("w", scale_format="ue8m0")
    with pytest.raises(ValueError, match="scales must be normal powers of two"):
        to_ue8m0_scales(scales)


# --- What is wrong -------------------------------------------------------------------------------

FLOAT_SCALES = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("scales", "values", "kind", "message"),
    [
        (FLOAT_SCALES.astype(ml_dtypes.bfloat16), None, TypeError, "F32 or F8_E8M0, got BF16$"),
        (FLOAT_SCALES.T, None, ValueError, r"must be \[2, 3\] for a weight \[256, 384\], got \[3"),
        (FLOAT_SCALES, np.zeros((256, 384), np.float32), TypeError, r"F8_E4M3 \[n, k\], got F32"),
    ],
    ids=["bf16-scales", "transposed-scales", "float-weight"],
)
def test_wrong_tensors(
    tmp_path: pathlib.Path, scales: Any, values: Any, kind: type[Exception], message: str
) -> None:
    opened = one_weight(tmp_path, scales, values)
    with pytest.raises(kind, match=rf"^Checkpoint.load_quantized: w.weight.*{message}"):
        opened.load_quantized("w")


def test_missing_tensor_and_scale_format(tmp_path: pathlib.Path) -> None:
    opened = one_weight(tmp_path, FLOAT_SCALES)
    with pytest.raises(KeyError, match=r"load_quantized: there is no tensor v.weight"):
        opened.load_quantized("v")
    with pytest.raises(ValueError, match="scale_format must be None, 'float32' or 'ue8m0', got 'e"):
        opened.load_quantized("w", scale_format="e8m0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="experts must not be empty"):
        opened.load_experts("w{}", [])


def test_shards_that_would_cut_a_block(tmp_path: pathlib.Path, mesh: jax.sharding.Mesh) -> None:
    opened = one_weight(tmp_path, FLOAT_SCALES)
    message = "^quantized_sharding: shards of rows must be a multiple of 128, .* got 64 of 256"
    with pytest.raises(ValueError, match=message):
        opened.load_quantized("w", sharding=NamedSharding(mesh, P("e", None)))


def test_experts_of_different_shapes(tmp_path: pathlib.Path) -> None:
    tensors = {
        f"e.{i}": QuantizedArray(
            jnp.zeros((rows, 128), jnp.float8_e4m3fn), jnp.ones((rows // 128, 1))
        )
        for i, rows in enumerate((128, 256))
    }
    save_checkpoint(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"load_experts: e.1 must be \[128, 128\] like the others"):
        Checkpoint(tmp_path).load_experts("e.{}", range(2))


def test_parts_end_with_a_block(tmp_path: pathlib.Path) -> None:
    tensors = {
        name: QuantizedArray(jnp.zeros((72, 128), jnp.float8_e4m3fn), jnp.ones((1, 1)))
        for name in ("gate", "up")
    }
    save_checkpoint(tmp_path, tensors)
    with pytest.raises(
        ValueError, match=r"gate.weight must have a multiple of 128 rows, because up"
    ):
        Checkpoint(tmp_path).load_quantized(["gate", "up"])


def test_writer_refuses_what_the_format_does_not_have(tmp_path: pathlib.Path) -> None:
    tokens = jax_deepgemm.quantize_per_token(np.ones((256, 128), np.float32))
    with pytest.raises(ValueError, match="w must have 128 x 128 blocks, got 1 x 128"):
        save_checkpoint(tmp_path, {"w": tokens})
    e5m2 = jax_deepgemm.quantize_per_block(np.ones((256, 128), np.float32), dtype="float8_e5m2")
    with pytest.raises(
        TypeError, match="w must be float8_e4m3fn with float32 scales, got float8_e5"
    ):
        save_checkpoint(tmp_path, {"w": e5m2})
    uneven = jax_deepgemm.quantize_per_block(np.full((128, 128), 3.0, np.float32))
    with pytest.raises(ValueError, match="must be normal powers of two"):
        save_checkpoint(tmp_path, {"w": uneven}, scale_format="ue8m0")
    experts = jax_deepgemm.quantize_per_block(np.ones((2, 128, 128), np.float32))
    with pytest.raises(ValueError, match=r"w must have two dimensions, or three and \{\}"):
        save_checkpoint(tmp_path, {"w": experts})


@pytest.mark.parametrize(
    "content",
    [b"", b"short", (1000).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[x"],
    ids=["empty", "short", "cut", "no-json"],
)
def test_damaged_files(tmp_path: pathlib.Path, content: bytes) -> None:
    file = tmp_path / "m.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"m.safetensors is no safetensors file"):
        Checkpoint(file)


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        '{"x": 1}',
        json.dumps({"x": GOOD | {"data_offsets": [-8, 0]}}),
        json.dumps({"x": GOOD | {"shape": [-1, -2]}}),
        json.dumps({"x": GOOD | {"shape": [2.0]}}),
        json.dumps({"x": GOOD | {"shape": 2}}),
        json.dumps({"x": {"shape": [2], "data_offsets": [0, 8]}}),
        f'{{"x": {json.dumps(GOOD)}, "x": {json.dumps(GOOD)}}}',
    ],
)
def test_headers_that_are_wrong(tmp_path: pathlib.Path, header: str) -> None:
    file = tmp_path / "m.safetensors"
    text = header.encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"12345678")
    with pytest.raises(ValueError, match=r"m.safetensors is no safetensors file"):
        Checkpoint(file)


def test_a_type_that_is_not_known_hides_no_other(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "m.safetensors"
    exotic = {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}
    text = json.dumps({"x": exotic, "y": GOOD | {"data_offsets": [8, 16]}}).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with Checkpoint(file) as opened:
        assert opened.names == ("x", "y")
        np.testing.assert_array_equal(opened.read("y"), np.zeros(2, np.float32))
        with pytest.raises(TypeError, match="has a tensor of type F4"):
            opened.read("x")


def test_index_without_a_map(tmp_path: pathlib.Path) -> None:
    (tmp_path / checkpoint.INDEX).write_text("[]")
    with pytest.raises(ValueError, match="has no weight_map"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "kind", "message"),
    [
        ("{", ValueError, "is no index: "),
        ('{"weight_map": {"x0": "../model-00001-of-00001.safetensors"}}', ValueError, "beside it"),
        ('{"weight_map": {"x0": 3}}', ValueError, "must name a file beside it for x0, got 3"),
        ('{"weight_map": {"x0": "other.safetensors"}}', FileNotFoundError, "other.* is not there"),
        (
            '{"weight_map": {"y": "model-00001-of-00001.safetensors"}}',
            ValueError,
            "says that y is in model-00001-of-00001.safetensors, which does not hold it$",
        ),
    ],
    ids=["no-json", "path", "no-name", "no-file", "no-tensor"],
)
def test_wrong_index(
    tmp_path: pathlib.Path, index: str, kind: type[Exception], message: str
) -> None:
    save_checkpoint(tmp_path, floats(1, 1.0))
    (tmp_path / checkpoint.INDEX).write_text(index)
    with pytest.raises(kind, match=rf"^Checkpoint: .*{message}"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"__metadata__": np.ones(2)}, "names must be strings other than __metadata__"),
        ({3: np.ones(2)}, "names must be strings other than __metadata__, got 3"),
        ({"x": (np.ones(2), np.ones(3))}, "x must be an array or a QuantizedArray, got tuple"),
        ({"x": {"y": np.ones(3)}}, "x must be an array or a QuantizedArray, got dict"),
    ],
    ids=["metadata", "no-string", "pair", "tree"],
)
def test_writer_refuses_what_is_no_tensor(
    tmp_path: pathlib.Path, tensors: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=f"^save_checkpoint: {message}"):
        save_checkpoint(tmp_path / "new", tensors)
    assert not (tmp_path / "new").exists()


def test_experts_need_a_place_for_their_number(tmp_path: pathlib.Path) -> None:
    save_checkpoint(tmp_path, two_layers())
    with Checkpoint(tmp_path) as opened:
        with pytest.raises(ValueError, match=r'name must have "\{\}" once, for the expert'):
            opened.load_experts(["e.{}", "w"], [0, 1])
        with pytest.raises(
            ValueError, match=r"once, for the expert's number, got 'l\.\{\}\.e\.\{\}'"
        ):
            opened.load_experts("l.{}.e.{}", [0, 1])
        for load in (opened.load_quantized, lambda names: opened.load_experts(names, [0])):
            with pytest.raises(ValueError, match="name must not be empty"):
                load([])


def test_writer_refuses_one_name_twice(tmp_path: pathlib.Path) -> None:
    w = jax_deepgemm.quantize_per_block(np.ones((128, 128), np.float32))
    with pytest.raises(ValueError, match=r"two tensors would have the name w\.weight"):
        save_checkpoint(tmp_path, {"w": w, "w.weight": np.ones(3)})
    save_checkpoint(tmp_path, {"w{x}": w})  # braces of two dimensions mean nothing
    with Checkpoint(tmp_path) as opened:
        assert opened.is_quantized("w{x}")


def test_truncated_data(tmp_path: pathlib.Path) -> None:
    save_checkpoint(tmp_path, two_layers())
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"the bytes of .* do not fit into"):
        Checkpoint(tmp_path)


def test_folder_without_files(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no safetensors file in"):
        Checkpoint(tmp_path)
    save_checkpoint(tmp_path, {"x": np.ones(3)})
    index = json.loads((tmp_path / checkpoint.INDEX).read_text())
    assert index == {
        "metadata": {"total_size": 24},
        "weight_map": {"x": "model-00001-of-00001.safetensors"},
    }
    (tmp_path / checkpoint.INDEX).unlink()
    assert bits(Checkpoint(tmp_path).read("x")) == bits(np.ones(3))
