"""`bench --quantize` without a GPU: the CPU stands in for it, as in test_bench.py."""

import json
import pathlib
from typing import Any

import jax
import pytest

import jax_deepgemm
from jax_deepgemm.cli import bench, harness, machine, main, quantizers, tables, timing
from jax_deepgemm.cli.markdown import markdown
from jax_deepgemm.cli.quantizers import Case
from jax_deepgemm.quantized_array import QuantizedArray


class NoFlush:
    """A CPU has no L2 to flush."""

    method = "nothing is flushed"

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __call__(self) -> None: ...


CASES = (
    *(Case(op, 1, 64, 256) for op in quantizers.OPS),
    Case("quantize_per_token", 2, 32, 256, "masked", 16),
    Case("silu_mul_quantize", 1, 64, 256, "ragged", 32),
)


@pytest.fixture
def small_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "DEVICE_PLANE", "/host:CPU")
    monkeypatch.setattr(timing, "STREAM_LINE", "")
    monkeypatch.setattr(harness, "KERNEL_PREFIX", "")
    monkeypatch.setattr(bench, "Flush", NoFlush)
    monkeypatch.setattr(machine, "hopper_gpu", lambda: jax.devices("cpu")[0])
    monkeypatch.setattr(jax_deepgemm.device, "get_num_sms", lambda: 132)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)  # no PyTorch
    monkeypatch.setattr(tables, "console", tables.Console(width=240))
    monkeypatch.setattr(quantizers, "CASES", CASES)
    monkeypatch.setattr(quantizers, "LAYERS", ((16, 128, 256),))
    monkeypatch.setattr(quantizers, "COPY_BYTES", 2**16)


def run(output: pathlib.Path) -> int:
    return main(
        [
            *("bench", "--shapes", "16x128x128", "--iterations", "2", "--quantize"),
            *("--output", str(output)),
        ]
    )


@pytest.mark.usefixtures("small_bench")
def test_results(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results.json"
    assert run(output) == 0
    document = json.loads(output.read_text())
    part = document["quantize"]
    assert part["copy_gbs"] > 0
    entries = part["quantizers"]
    fields = quantizers.ENTRY_FIELDS
    assert [[entry[field] for field in fields] for entry in entries] == [
        [case.op, case.form, case.groups, case.m, case.k, case.dtype] for case in CASES
    ]
    for entry, case in zip(entries, CASES, strict=True):
        assert entry["rows"] == case.rows
        assert entry["gbs"] == pytest.approx(case.nbytes / entry["time_us"] / 1e3, abs=0.06)
        assert entry["copy_fraction"] == pytest.approx(entry["gbs"] / part["copy_gbs"], abs=0.01)
        assert entry["baselines"]["xla_us"] > 0
        assert 0.01 < entry["error"] < quantizers.MAX_CAST_ERROR
        # The same jnp, but for SwiGLU's exponential.
        assert entry["differs_from_xla"] <= (0.001 if case.op == "silu_mul_quantize" else 0)
    (layer,) = part["end_to_end"]
    assert (layer["m"], layer["n"], layer["k"]) == (16, 128, 256)
    assert layer["baselines"].pop("cublaslt_bf16_failed") == "torch is not installed"
    assert set(layer["baselines"]) == set(quantizers.BASELINES) - {"cublaslt_bf16_us"}
    assert all(time > 0 for time in (layer["time_us"], *layer["baselines"].values()))

    printed = capsys.readouterr().out
    assert "quantize_per_token_both" in printed
    text = markdown(document)
    assert "| silu_mul_quantize | ragged | 1 | 64 | 256 | bfloat16 | " in text
    assert f"a large copy reached {part['copy_gbs']:.0f} GB/s" in text
    assert "| quantize_gemm | 16 | 128 | 256 | " in text

    assert main(["bench", "--results", str(output)]) == 0
    del document["quantize"]["quantizers"][0]["op"]
    output.write_text(json.dumps(document))
    with pytest.raises(SystemExit):
        main(["bench", "--results", str(output)])


@pytest.mark.usefixtures("small_bench")
def test_a_wrong_quantizer_fails(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = jax_deepgemm.quantize_per_token

    def wrong(x: Any, **options: Any) -> QuantizedArray:
        values, scales = original(x, **options)
        return QuantizedArray(values, 1.1 * scales)

    monkeypatch.setattr(jax_deepgemm, "quantize_per_token", wrong)
    output = tmp_path / "results.json"
    assert run(output) == 1
    part = json.loads(output.read_text())["quantize"]
    failed = {entry["op"] for entry in part["quantizers"] if "failed" in entry}
    assert failed == {"quantize_per_token"}
    assert "wrong result" in part["end_to_end"][0]["failed"]
    assert "| failed |" in markdown(json.loads(output.read_text()))


def test_bytes_of_a_case() -> None:
    assert Case("quantize_per_token", 1, 4096, 7168).nbytes == 4096 * (7168 * 3 + 56 * 4)
    assert Case("quantize_per_block", 1, 4096, 7168).nbytes == 4096 * 7168 * 3 + 32 * 56 * 4
    assert Case("silu_mul_quantize", 1, 64, 256).nbytes == 64 * (256 * 5 + 2 * 4)
    assert Case("quantize_per_token_both", 1, 128, 128).nbytes == 128 * 128 * 4 + 2 * 128 * 4
    assert Case("quantize_per_token", 8, 2048, 7168, "masked", 1024).rows == 8192
