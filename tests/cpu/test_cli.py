"""The command line on a machine without a GPU: the main job, `info`, `compile`."""

import argparse
import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm
from jax_deepgemm import GemmConfig
from jax_deepgemm.arguments import H100_MEMORY_GBS, H100_SMS
from jax_deepgemm.cli import demo, main, moe, precompile, tables
from jax_deepgemm.cli.problem import (
    MAX_CHECKED_ROWS,
    MAX_ERROR,
    grouped_error,
    operation,
    product_error,
    random_problem,
)
from jax_deepgemm.cli.shapes import MAX_SIZE, NAMED_SHAPES, Shape, parse_count, parse_shapes

SMALL = Shape.dense(64, 256, 384)
NO_NVRTC = "NVRTC not found: this test hides it"


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m jax_deepgemm` where JAX sees the CPU alone."""
    return subprocess.run(
        [sys.executable, "-m", "jax_deepgemm", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    )


def hide_nvrtc(arguments: str, tmp_path: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process that cannot find NVRTC, with an empty cache."""
    code = (
        "import sys\n"
        "from jax_deepgemm.ffi import _native\n"
        "def locate():\n"
        f"    raise RuntimeError({NO_NVRTC!r})\n"
        "_native.set_nvrtc_locator(locate)\n"
        "from jax_deepgemm.cli import main, shapes\n"
        "shapes.NAMED_SHAPES['seed'] = shapes.parse_shapes('64x256x384,ragged:2x64x256x512')\n"
        f"sys.exit(main({arguments.split()!r}))"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "DG_CACHE_DIR": str(tmp_path)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )


@pytest.fixture
def small_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NAMED_SHAPES, "seed", (SMALL, SMALL._replace(m_per_group=4096)))


class TestShapes:
    @pytest.mark.parametrize(
        "text", ["64x256x384 1x8x16", "64x256x384,1x8x16", "64x256x384, 1x8x16"]
    )
    def test_commas_and_spaces_separate(self, text: str) -> None:
        assert parse_shapes(text) == (SMALL, Shape.dense(1, 8, 16))

    def test_named_sets(self) -> None:
        sizes = {name: len(parse_shapes(name)) for name in NAMED_SHAPES}
        deepgemm = {"seed": 28, "dense": 18, "grouped": 10, "decode": 30, "ragged": 14}
        models = {"deepseek-v3": 40, "qwen3-moe": 20, "kimi-k2": 30, "glm": 25, "training": 22}
        assert sizes == deepgemm | models
        assert parse_shapes("dense,grouped") == NAMED_SHAPES["seed"]
        contiguous = {shape for shape in NAMED_SHAPES["grouped"] if shape.op == "contiguous"}
        assert {shape._replace(op="ragged") for shape in contiguous} < set(NAMED_SHAPES["ragged"])
        assert parse_shapes("seed,64x2112x7168") == NAMED_SHAPES["seed"], "each shape once"

    def test_experts_of_a_model(self) -> None:
        # One token busies 8 experts, 256 tokens give each of 384 five rows.
        assert Shape("ragged", 8, 1, 4096, 7168) in NAMED_SHAPES["kimi-k2"]
        assert Shape("ragged", 384, 5, 7168, 2048) in NAMED_SHAPES["kimi-k2"]
        # 8 x 8192 tokens of 8 experts each: 4096 rows for each of 128, of which a device has 16.
        assert Shape("ragged", 16, 4096, 3072, 4096) in NAMED_SHAPES["training"]

    def test_those_of_a_results_file(self, tmp_path: pathlib.Path) -> None:
        path = tmp_path / "results.json"
        grouped = Shape("masked", 4, 256, 7168, 2048)
        rows = [shape._asdict() | {"time_us": 1.0} for shape in (grouped, SMALL, grouped)]
        path.write_text(json.dumps({"rows": rows}))
        assert parse_shapes(f"1x8x16,@{path}") == (Shape.dense(1, 8, 16), grouped, SMALL)

    @pytest.mark.parametrize(
        "content, message",
        [
            (None, "No such file"),
            ("[", "Expecting value"),
            ("[]", "is not a results file, whose rows have op, groups, m_per_group, n, k"),
            ('{"rows": [{"n": 8}]}', "is not a results file"),
            (json.dumps({"rows": [SMALL._asdict() | {"n": 7}]}), "n a multiple of 8"),
            (json.dumps({"rows": []}), "at least one shape"),
        ],
    )
    def test_no_results_file(
        self, tmp_path: pathlib.Path, content: str | None, message: str
    ) -> None:
        path = tmp_path / "results.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            parse_shapes(f"@{path}")

    @pytest.mark.parametrize("shape", sorted({*itertools.chain(*NAMED_SHAPES.values())}), ids=str)
    def test_notation(self, shape: Shape) -> None:
        assert parse_shapes(str(shape)) == (shape,)

    def test_grouped_notation(self) -> None:
        text = "contiguous:4x8192x4096x7168 masked:2x512x7168x2048 ragged:256x10x4096x7168"
        assert parse_shapes(text) == (
            Shape("contiguous", groups=4, m_per_group=8192, n=4096, k=7168),
            Shape("masked", groups=2, m_per_group=512, n=7168, k=2048),
            Shape("ragged", groups=256, m_per_group=10, n=4096, k=7168),
        )

    @pytest.mark.parametrize(
        "text",
        [
            *("64x256", "64x256x384x1", "axbxc", "-1x256x384", "prefill", ""),
            *("masked:64x256x384", "masked:2x64x256x384x1", "dense:1x64x256x384"),
            *("grouped:2x64x256x384", "masked:-2x64x256x384", "masked:"),
        ],
    )
    def test_malformed(self, text: str) -> None:
        with pytest.raises(argparse.ArgumentTypeError, match=r"MxNxK|at least one shape"):
            parse_shapes(text)

    @pytest.mark.parametrize(
        "text",
        [
            *("0x256x384", "64x255x384", "64x256x24", "64x0x384"),
            *("99999999999x512x256", "64x99999999992x256", f"64x512x{10**30}"),
            f"{MAX_SIZE + 1}x512x256",
            *("ragged:0x64x256x384", "ragged:2x0x256x384", "masked:2x64x255x384"),
            f"ragged:2x{MAX_SIZE // 2 + 1}x512x256",
        ],
    )
    def test_illegal(self, text: str) -> None:
        with pytest.raises(
            argparse.ArgumentTypeError,
            match="n a multiple of 8, k a multiple of 16, "
            f"and neither these nor the rows of all groups above {MAX_SIZE}",
        ):
            parse_shapes(text)

    def test_contiguous_groups_are_aligned(self) -> None:
        with pytest.raises(argparse.ArgumentTypeError, match="layout are aligned to 128 rows"):
            parse_shapes("contiguous:4x100x4096x7168")

    def test_largest_size_is_that_of_selection(self) -> None:
        assert parse_shapes(f"{MAX_SIZE}x512x256") == (Shape.dense(MAX_SIZE, 512, 256),)
        jax_deepgemm.select_config(MAX_SIZE, 512, 256)
        with pytest.raises(ValueError, match="select_config: m must be"):
            jax_deepgemm.select_config(MAX_SIZE + 1, 512, 256)

    @pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", "99999999999"])
    def test_counts_are_positive(self, text: str) -> None:
        with pytest.raises(argparse.ArgumentTypeError, match="not a number from 1 to 2147483647"):
            parse_count(text)

    def test_flops_and_bytes(self) -> None:
        shape = Shape.dense(64, 2112, 7168)
        assert shape.flops == 2 * 64 * 2112 * 7168
        # A, B, 64 x 56 and 17 x 56 float32 scales, bf16 D.
        assert shape.nbytes == 458_752 + 15_138_816 + 14_336 + 3_808 + 270_336

    @pytest.mark.parametrize("op", ["masked", "ragged"])
    def test_flops_and_bytes_of_groups(self, op: str) -> None:
        one, groups = Shape.dense(64, 2112, 7168), Shape(op, 5, 64, 2112, 7168)
        assert groups.m == 320
        assert groups.flops == 5 * one.flops
        assert groups.nbytes == 5 * one.nbytes, "every group reads its own weights"

    @pytest.mark.parametrize("shape", NAMED_SHAPES["seed"], ids=str)
    def test_reduced_shapes_are_legal(self, shape: Shape) -> None:
        reduced = demo.reduced(shape)
        assert parse_shapes(str(reduced)) == (reduced,)
        assert reduced.n * shape.k == reduced.k * shape.n
        assert (reduced.op, reduced.groups) == (shape.op, shape.groups)


class TestOracle:
    def test_product_passes_and_a_wrong_one_does_not(self) -> None:
        problem = random_problem(SMALL, seed=1)
        d = operation(SMALL)(*problem.operands)
        assert 0 < product_error(d, problem) < MAX_ERROR
        assert product_error(d.at[-1].multiply(1.5), problem) > MAX_ERROR
        other = random_problem(SMALL, seed=2)
        assert product_error(d, other) > 0.5

    @pytest.mark.parametrize("op", ["contiguous", "masked", "ragged"])
    def test_grouped_product_passes_and_a_wrong_one_does_not(self, op: str) -> None:
        shape = Shape(op, groups=3, m_per_group=128, n=136, k=272)
        problem = random_problem(shape, seed=1)
        d = operation(shape)(*problem.operands)
        assert 0 < product_error(d, problem) < MAX_ERROR
        for row in (0, 127, 128, 383):
            wrong = d.reshape(384, 136).at[row].multiply(1.5).reshape(d.shape)
            assert product_error(wrong, problem) > MAX_ERROR
        groups = d.reshape(3, 128, 136)
        assert product_error(groups[::-1].reshape(d.shape), problem) > 0.5

    def test_groups_of_any_sizes(self) -> None:
        sizes = np.array([0, 5, 1, 0, 70, 0], np.int32)
        problem = moe.random_problem(sizes, 136, 272, seed=1)
        function, operands, _ = moe.ragged(problem)
        d = function(*operands)
        judge = functools.partial(grouped_error, lhs=problem.lhs, rhs=problem.rhs, sizes=sizes)
        assert 0 < judge(d) < MAX_ERROR
        for row in (0, 4, 5, 6, 75):
            assert judge(d.at[row].multiply(1.5)) > MAX_ERROR
        assert judge(jnp.roll(d, 1, axis=0)) > 0.5

    def test_nan_is_no_small_error(self) -> None:
        problem = random_problem(SMALL, seed=1)
        d = jnp.full((SMALL.m, SMALL.n), jnp.nan, jnp.bfloat16)
        assert not product_error(d, problem) <= MAX_ERROR

    @pytest.mark.parametrize("row", [0, MAX_CHECKED_ROWS + 999])
    def test_first_and_last_row_of_many_are_compared(self, row: int) -> None:
        problem = random_problem(Shape.dense(MAX_CHECKED_ROWS + 1000, 8, 16), seed=1)
        d = jax_deepgemm.gemm_fp8_fp8_bf16_nt(problem.lhs, problem.rhs)
        assert product_error(d, problem) < MAX_ERROR
        assert product_error(d.at[row].add(100), problem) > MAX_ERROR

    @pytest.mark.parametrize("row", [0, 2999, 3000, 5999])
    def test_first_and_last_row_of_every_group_are_compared(self, row: int) -> None:
        shape = Shape("ragged", groups=2, m_per_group=3000, n=8, k=16)
        problem = random_problem(shape, seed=1)
        d = operation(shape)(*problem.operands)
        assert product_error(d, problem) < MAX_ERROR
        assert product_error(d.at[row].add(100), problem) > MAX_ERROR


class TestMainJob:
    def test_without_a_gpu(self, tmp_path: pathlib.Path) -> None:
        done = run_command(DG_CACHE_DIR=str(tmp_path))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "need an sm_90 GPU" in done.stdout
        assert "28 of 28 below 5e-06" in done.stdout
        for op in ("dense", "contiguous", "masked"):
            assert f"│ {op} " in done.stdout
        assert "cpu: float32 reference" in done.stdout and "wall us" in done.stdout
        for heading in (
            "kernels for sm_90a",
            "registers",
            "spill bytes",
            "shared bytes",
            "seconds",
        ):
            assert heading in done.stdout
        kernels = precompile.selected_kernels(NAMED_SHAPES["seed"], H100_SMS, H100_MEMORY_GBS)
        assert len(list(tmp_path.rglob("*.cubin"))) == len(kernels) > 10

    @pytest.mark.usefixtures("small_seed")
    def test_wrong_result_fails(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        right = jax_deepgemm.gemm_fp8_fp8_bf16_nt
        monkeypatch.setattr(tables, "console", tables.Console(width=140))
        assert main([]) == 0, capsys.readouterr().out
        assert "2 of 2 below" in capsys.readouterr().out

        def wrong(*operands: tuple[jax.Array, jax.Array], **options: None) -> jax.Array:
            d = right(*operands, **options)
            return d.at[0].multiply(1.5) if d.shape[0] > 64 else d

        monkeypatch.setattr(jax_deepgemm, "gemm_fp8_fp8_bf16_nt", wrong)
        assert main([]) == 1
        assert "1 of 2 below" in capsys.readouterr().out

    def test_missing_nvrtc_fails_after_the_cpu_part(self, tmp_path: pathlib.Path) -> None:
        done = hide_nvrtc("", tmp_path)
        assert done.returncode == 1, done.stderr
        assert "2 of 2 below" in done.stdout
        assert done.stdout.count(NO_NVRTC) == 1, "one cause, one message"
        assert "Traceback" not in done.stderr


class TestInfo:
    def test_versions_environment_and_cache(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "some.cubin").write_bytes(bytes(321))
        done = run_command("info", DG_CACHE_DIR=str(tmp_path), DG_JIT_DEBUG="0")
        assert done.returncode == 0, done.stderr
        for expected in (jax_deepgemm.__version__, jax.__version__, "NVRTC", "DG_JIT_DEBUG"):
            assert expected in done.stdout
        assert "1 files, 321 bytes" in done.stdout
        assert "321  cache/some.cubin" in done.stdout

    def test_without_nvrtc(self, tmp_path: pathlib.Path) -> None:
        done = hide_nvrtc("info", tmp_path)
        assert done.returncode == 0, done.stderr
        assert NO_NVRTC in done.stdout

    def test_reader_that_stops_early(self, tmp_path: pathlib.Path) -> None:
        for i in range(5000):  # more lines than a pipe holds
            (tmp_path / f"{i:060}.cubin").touch()
        process = subprocess.Popen(
            [sys.executable, "-m", "jax_deepgemm", "info"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "DG_CACHE_DIR": str(tmp_path)},
        )
        assert process.stdout and process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1


class TestCompile:
    def test_fills_the_cache(self, tmp_path: pathlib.Path) -> None:
        # 64x256x384 and 60x256x384 may share a kernel; another k or operation cannot, nor 200
        # rows, which are no multiple of a tile's.
        shapes = ("64x256x384,60x256x384", "64x256x512,200x256x384", "ragged:2x32x256x384")
        arguments = ("compile", "--shapes", *shapes, "--jobs", "2")
        first = run_command(*arguments, DG_CACHE_DIR=str(tmp_path))
        assert first.returncode == 0, first.stdout + first.stderr
        files = list(tmp_path.rglob("*.cubin"))
        assert len(files) >= 4 and first.stdout.count("compiled") == len(files)
        second = run_command(*arguments, DG_CACHE_DIR=str(tmp_path))
        assert second.stdout.count("disk") == len(files)
        assert "compiled" not in second.stdout.replace("compiling", "")

    def test_sm_count_reaches_selection_and_compiler(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def select(
            m: int, n: int, k: int, *, num_sms: int, memory_gbs: int, **groups: Any
        ) -> GemmConfig:
            assert (m, groups) == (320, {"op": "masked", "num_groups": 5, "expected_m": 64})
            return GemmConfig(64, memory_gbs, num_stages=num_sms)

        def compile_kernel(
            n: int, k: int, config: GemmConfig, *, m: int, op: str, num_sms: int
        ) -> None:
            raise RuntimeError(
                f"{op} {m=} {n=} {k=} selected for {config.num_stages} and {config.block_n}, "
                f"compiled for {num_sms}"
            )

        monkeypatch.setattr(jax_deepgemm, "select_config", select)
        monkeypatch.setattr(precompile, "compile_kernel", compile_kernel)
        monkeypatch.setattr(tables, "console", tables.Console(width=140))
        gpu = ["--num-sms", "5", "--memory-gbs", "192"]
        assert main(["compile", "--shapes", "masked:5x64x256x384", *gpu]) == 1
        told = "masked m=320 n=256 k=384 selected for 5 and 192, compiled for 5"
        assert told in capsys.readouterr().out

    @pytest.mark.parametrize(
        "shapes",
        ["64x7168", "64x7168x2049", "everything", "99999999999x512x256", "contiguous:2x8x256x384"],
    )
    def test_malformed_shapes(self, shapes: str) -> None:
        done = run_command("compile", "--shapes", shapes)
        assert done.returncode == 2
        assert done.stderr.count("error:") == 1 and repr(shapes) in done.stderr

    def test_too_many_sms(self) -> None:
        done = run_command("compile", "--num-sms", "99999999999")
        assert done.returncode == 2
        assert "'99999999999' is not a number from 1 to 2147483647" in done.stderr
        assert "Traceback" not in done.stderr

    def test_missing_nvrtc(self, tmp_path: pathlib.Path) -> None:
        done = hide_nvrtc("compile", tmp_path)
        assert done.returncode == 1
        assert done.stdout.count(NO_NVRTC) == 1
        assert "Traceback" not in done.stderr
