"""Time kernels with a cold, clean L2; writes, shows and compares results files."""

import argparse
import dataclasses
import datetime
import functools
import importlib.util
import itertools
import json
import math
import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jax_deepgemm
from jax_deepgemm import GemmConfig, device
from jax_deepgemm.cli import (
    chain,
    machine,
    moe,
    quantizers,
    stream,
    sweep,
    tables,
    torch_baseline,
)
from jax_deepgemm.cli.compare import (
    KEY_FIELDS,
    comparison_table,
    matching_times,
    row_key,
    yardstick,
)
from jax_deepgemm.cli.harness import Candidate, Row, is_good, measure
from jax_deepgemm.cli.markdown import markdown
from jax_deepgemm.cli.precompile import add_shapes_argument, given_shapes
from jax_deepgemm.cli.problem import ORACLE, random_problem, random_problems
from jax_deepgemm.cli.roofline import require_matplotlib, roofline_figure
from jax_deepgemm.cli.shapes import DENSE, Shape, parse_count
from jax_deepgemm.cli.timing import GIGABYTE, READ_BYTES, Flush, host_calls_us

BASELINES = ("torch", "xla", "stream", "none")
# What `python` runs for that baseline: `-m` would import the module twice.
STREAM = ("-c", f"from {stream.__name__} import main; main()")
HOST_SHAPE = Shape.dense(64, 128, 128)
BY_TURNS = " by turns, in random order, with a problem's other configurations"

# Operands and results of the problems that are on the GPU, and in a trace, at the same time.
BATCH_BYTES = 16 * GIGABYTE
STREAM_BYTES = 4 * GIGABYTE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `bench`."""
    add_shapes_argument(parser)
    configs = parser.add_mutually_exclusive_group()
    configs.add_argument(
        "--config",
        type=parse_config,
        default={},
        metavar="FIELD=VALUE,...",
        help="fields of GemmConfig to use instead of the selected ones",
    )
    configs.add_argument(
        "--sweep",
        nargs="?",
        const=math.inf,
        type=sweep.parse_factor,
        metavar="FACTOR",
        help="time every legal config of every shape, or those that are estimated to take at most "
        "FACTOR times the best estimate, and report what selection loses (regret)",
    )
    parser.add_argument(
        "--iterations", type=parse_count, default=20, help="timed calls of each kernel (20)"
    )
    parser.add_argument(
        "--num-sms",
        type=parse_count,
        metavar="N",
        help="SMs that our products may use, as set_num_sms says it (all); others keep all",
    )
    parser.add_argument(
        "--dirty-l2",
        action="store_true",
        help="flush by writing alone, as DeepGEMM's published tables do",
    )
    parser.add_argument(
        "--baselines",
        nargs="+",
        choices=BASELINES,
        default=["torch"],
        help="time beside ours: torch = cuBLASLt FP8 through torch._scaled_mm where torch is "
        "installed, xla = dequantise to bf16 and XLA's dot, stream = our kernel with its loads "
        "alone (default: torch)",
    )
    parser.add_argument(
        "--moe",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also measure uneven and mostly empty groups, and JAX's own grouped products",
    )
    parser.add_argument(
        "--quantize",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also measure the quantisers against a copy and XLA, and quantise + GEMM against bf16",
    )
    parser.add_argument(
        "--chain",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also measure a program of many layers: the time between its kernels, with and "
        "without CUDA graphs",
    )
    parser.add_argument(
        "--output",
        type=parse_output,
        metavar="PATH",
        help="results file, or a folder in which it is named after the GPU",
    )
    parser.add_argument(
        "--results",
        type=load_results,
        metavar="FILE",
        help="show (and compare) an earlier results file instead of measuring",
    )
    parser.add_argument(
        "--markdown",
        action="store_true",
        help="print the tables of measured times as README.md has them, and nothing else",
    )
    parser.add_argument(
        "--plot",
        type=parse_plot,
        metavar="PNG",
        help="draw the measured shapes under the GPU's roofline (needs matplotlib)",
    )
    parser.add_argument(
        "--compare",
        type=load_peer,
        metavar="FILE",
        help="results or yardstick file whose time_us or deepgemm_us to print ratios to; "
        "deepgemm_us is also copied into the baselines",
    )


def parse_config(text: str) -> dict[str, int]:
    """Parses `block_m=64,cluster_n=2`; an argparse `type`."""
    fields = [field.name for field in dataclasses.fields(GemmConfig)]
    values = {}
    for word in text.split(","):
        name, _, value = word.strip().partition("=")
        if name not in fields or not value.isdecimal():
            raise argparse.ArgumentTypeError(
                f"{word!r} is not FIELD=VALUE with a field of GemmConfig ({', '.join(fields)})"
            )
        values[name] = parse_count(value)
    return values


def parse_output(text: str) -> Path:
    """Parses a path that can be written, before anything is measured; an argparse `type`."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


def parse_plot(text: str) -> Path:
    """Parses the path of a picture that can be drawn; an argparse `type`."""
    require_matplotlib()
    return parse_output(text)


def load_peer(text: str) -> dict[str, Any]:
    """Reads a results or yardstick file to compare with; an argparse `type`."""
    return _load(text, {"gpu", "date", "rows"}, set(KEY_FIELDS))


def load_results(text: str) -> dict[str, Any]:
    """Reads a results file, as `bench` writes it; an argparse `type`."""
    fields = {"gpu", "driver", "cuda", "jax", "date", "command", "host_call_us", "rows"}
    document = _load(text, fields, {*KEY_FIELDS, "config", "baselines"})
    for row in document["rows"]:
        if "failed" not in row:
            _require(f"{text}: a row", row, {"time_us", "tflops", "gbs", "error"})
        if row["config"]:
            try:
                GemmConfig(**row["config"])
            except (TypeError, ValueError) as error:
                raise argparse.ArgumentTypeError(f"{text}: config: {error}") from error
    if "moe" in document:
        _require(f"{text}: moe", document["moe"], set(moe.PARTS))
    if "chain" in document:
        _require(f"{text}: chain", document["chain"], set(chain.FIELDS))
    for part, entries in moe.parts_of(document).items():
        for entry in entries:
            _require(f"{text}: an entry of {part}", entry, {*moe.ENTRY_FIELDS, "ragged"})
    for entry in quantizers.entries_of(document):
        _require(f"{text}: an entry of quantize", entry, {"op", "m", "k"})
    return document


def _load(text: str, fields: set[str], row_fields: set[str]) -> dict[str, Any]:
    """Reads a JSON file that has at least these fields, and rows with these."""
    try:
        document: dict[str, Any] = json.loads(Path(text).read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    _require(text, document, fields)
    for row in document["rows"]:
        _require(f"{text}: a row", row, row_fields)
    return document


def _require(what: str, value: Any, fields: set[str]) -> None:
    missing = fields - value.keys() if isinstance(value, dict) else fields
    if missing:
        raise argparse.ArgumentTypeError(
            f"{what} is not as `bench` writes it: without {', '.join(sorted(missing))}"
        )


def run(args: argparse.Namespace) -> int:
    """Runs `bench`."""
    if args.results:
        document = args.results
    else:
        gpu = machine.hopper_gpu()
        if not gpu:
            print(machine.why_no_gpu(), file=sys.stderr)
            return 1
        if args.num_sms:
            jax_deepgemm.set_num_sms(args.num_sms)
        document = _benchmark(gpu, args)
    if args.plot:
        roofline_figure(document).savefig(args.plot, format="png")
    if args.markdown:
        print(markdown(document))
    elif not _report(document, args.compare):
        print("The two results have no shape in common.", file=sys.stderr)
        return 1
    entries = itertools.chain(*moe.parts_of(document).values())
    good = all(map(is_good, document["rows"])) and all(map(moe.is_good, entries))
    good = good and all(map(quantizers.is_good, quantizers.entries_of(document)))
    return 0 if good else 1


def _report(document: dict[str, Any], peer: dict[str, Any] | None) -> bool:
    """Prints all tables; False if the peer has no shape in common."""
    show = tables.console.print
    show(tables.results_table(document["rows"], f"cuda: {document['gpu']}", "kernel us"))
    show(tables.baselines_table(document["rows"]))
    if any("sweep" in row for row in document["rows"]):
        show(sweep.sweep_table(document["rows"]))
    for part, entries in moe.parts_of(document).items():
        show(moe.moe_table(part, entries))
    for table in quantizers.tables_of(document):
        show(table)
    if "chain" in document:
        show(chain.text(document["chain"]))
    show(f"host cost of a jitted call, us: {document['host_call_us']}")
    if peer:
        if not matching_times(document["rows"], peer["rows"]):
            return False
        show(comparison_table(document, peer))
    return True


def _benchmark(gpu: jax.Device, args: argparse.Namespace) -> dict[str, Any]:
    """Measures everything, writing the results file as it grows."""
    shapes = given_shapes(args)
    flush = Flush(gpu, dirty_l2=args.dirty_l2)
    state = {"before": machine.query_gpus()}
    cublas = None
    if "torch" in args.baselines and any(shape.op == DENSE for shape in shapes):
        cublas = _torch_baselines(shapes, args)
    seed = secrets.randbits(32)
    document: dict[str, Any] = {
        "gpu": gpu.device_kind,
        "driver": state["before"][0]["driver_version"] if state["before"] else "",
        "cuda": machine.cuda_version(gpu),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": machine.commit(),
        "command": shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
        "method": f"GPU kernel time from JAX's profiler (CUPTI), median of {args.iterations} "
        f"calls{BY_TURNS if args.sweep else ''}, spread_us its 10th and 90th percentile; before "
        f"every call {flush.method}; operands are quantised normals; {ORACLE}",
        "selection": device.selection(),
        "gpu_state": state,
        "host_call_us": _host_call_us(),
        "rows": [],
    }
    if cublas:
        document["torch"] = cublas["torch"]
    if args.compare:
        document["compared_with"] = {
            field: args.compare[field]
            for field in ("gpu", "date", "method", "peers")
            if field in args.compare
        }
    for batch in batches(shapes, sweep.BATCH_SHAPES if args.sweep else len(shapes)):
        rows = _measure(batch, flush, args, seed)
        if "stream" in args.baselines:
            _add_streams(rows, args)
        for row in rows:
            baselines = row.setdefault("baselines", {})
            if cublas:
                baselines |= cublas["rows"].get(row_shape(row), {})
            if args.compare:
                baselines |= yardstick(row, args.compare["rows"])
            document["rows"].append(row)
        state["after"] = machine.query_gpus()
        if args.output:
            _write(document, args.output)
    if args.chain:
        document["chain"] = chain.measure(args.iterations, seed)
        if args.output:
            _write(document, args.output)
    if args.moe:
        document["moe"] = {part: [] for part in moe.PARTS}
        for part, entries in moe.PARTS.items():
            for entry in entries(flush, args.iterations, seed):
                document["moe"][part].append(entry)
                if args.output:
                    _write(document, args.output)
    if args.quantize:
        layers = _torch_bf16(args) if "torch" in args.baselines else []
        for measured in quantizers.measure_all(flush, args.iterations, seed, layers):
            document["quantize"] = measured
            if args.output:
                _write(document, args.output)
    return document


def batches(shapes: Sequence[Shape], most: int, most_bytes: int = BATCH_BYTES) -> list[list[Shape]]:
    """Cuts shapes, in order, into lists that fit into memory, if a shape alone does.

    Args:
        shapes: what is to be measured.
        most: shapes in one list.
        most_bytes: operands and results of one list.
    """
    result: list[list[Shape]] = []
    room = 0
    for shape in shapes:
        if shape.nbytes > room or len(result[-1]) == most:
            result.append([])
            room = most_bytes
        result[-1].append(shape)
        room -= shape.nbytes
    return result


def row_shape(row: Row) -> Shape:
    """The shape that a row measures."""
    return Shape(*row_key(row))


def _measure(
    shapes: Sequence[Shape], flush: Flush, args: argparse.Namespace, seed: int
) -> list[Row]:
    """Measures shapes in one trace, with --sweep all configs of each."""
    gpu = device.selection()
    candidates = []
    for problem in random_problems(shapes, seed):
        config = jax_deepgemm.select_config(**problem.shape.selection, **gpu)
        candidates.append(Candidate(problem, dataclasses.replace(config, **args.config)))
    xla = "xla" in args.baselines
    if args.sweep:
        return sweep.measure_swept(
            candidates, gpu, args.sweep, flush, args.iterations, xla_baseline=xla
        )
    return measure(candidates, flush, args.iterations, xla_baseline=xla)


def _host_call_us() -> dict[str, float]:
    problem = random_problem(HOST_SHAPE, 0)
    m, n, k = HOST_SHAPE.m, HOST_SHAPE.n, HOST_SHAPE.k
    bf16 = (jnp.ones((m, k), jnp.bfloat16), jnp.ones((k, n), jnp.bfloat16))
    gemm = jax.jit(jax_deepgemm.gemm_fp8_fp8_bf16_nt)
    return host_calls_us(
        {
            "jax_deepgemm": functools.partial(gemm, problem.lhs, problem.rhs),
            "xla_dot": functools.partial(jax.jit(jnp.matmul), *bf16),
        }
    )


def _torch_baselines(shapes: Sequence[Shape], args: argparse.Namespace) -> dict[str, Any]:
    """Runs `torch_baseline.py` in a process of its own: CUPTI has one user per process.

    Returns:
        "torch", how it was timed, and "rows", the baselines of every dense shape.
    """
    dense = [shape for shape in shapes if shape.op == DENSE]

    def failed(reason: str) -> dict[str, Any]:
        return {"torch": {}, "rows": {shape: {"cublaslt_failed": reason} for shape in dense}}

    answer = _ask_torch([(shape.m, shape.n, shape.k) for shape in dense], args)
    if isinstance(answer, str):
        return failed(answer)
    return answer | {"rows": dict(zip(dense, answer["rows"], strict=True))}


def _torch_bf16(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times the bf16 product of each layer that `quantizers` measures, by cuBLASLt."""
    answer = _ask_torch(quantizers.LAYERS, args, kinds=["bf16"])
    if isinstance(answer, str):
        return [{"cublaslt_bf16_failed": answer}] * len(quantizers.LAYERS)
    rows: list[dict[str, Any]] = answer["rows"]
    return rows


def _ask_torch(
    shapes: Sequence[tuple[int, int, int]], args: argparse.Namespace, **request: Any
) -> dict[str, Any] | str:
    """The answer of `torch_baseline.py`, or why there is none."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    request |= {"shapes": shapes, "read_bytes": READ_BYTES}
    answer: dict[str, Any] | str
    answer = _ask([str(torch_baseline.__file__)], args, request)
    return answer


def _add_streams(rows: Sequence[Row], args: argparse.Namespace) -> None:
    """Adds to rows of dense shapes how long the loads of the same kernel take alone."""
    dense = [row for row in rows if row["op"] == DENSE and "failed" not in row]
    # The memory that this process has not taken for itself holds a few at a time.
    for shapes in batches([row_shape(row) for row in dense], len(dense), STREAM_BYTES):
        part, dense = dense[: len(shapes)], dense[len(shapes) :]
        kernels = [(shape, row["config"]) for shape, row in zip(shapes, part, strict=True)]
        request = {"kernels": kernels, "num_sms": args.num_sms}
        answer = _ask(STREAM, args, request, stream.ENVIRONMENT)
        for i, row in enumerate(part):
            failed = isinstance(answer, str)
            row.setdefault("baselines", {})
            row["baselines"] |= {"stream_failed": answer} if failed else {"stream_us": answer[i]}


def _ask(
    program: Sequence[str],
    args: argparse.Namespace,
    request: dict[str, Any],
    environment: Mapping[str, str] | None = None,
) -> Any:
    """The answer of a program that times something in a process of its own, or a str: its error."""
    request |= {"iterations": args.iterations, "dirty_l2": args.dirty_l2}
    command = [sys.executable, *program, json.dumps(request)]
    variables = os.environ | dict(environment or {})
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if result.returncode:
        return result.stderr.strip()[-2000:] or f"exit status {result.returncode}"
    return json.loads(result.stdout.splitlines()[-1])


def _write(document: dict[str, Any], output: Path) -> None:
    if output.is_dir():
        output /= f"{machine.gpu_stem(document['gpu'])}.json"
    output.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
