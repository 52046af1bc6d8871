"""cuBLASLt's GEMMs through PyTorch, timed as ours are. Run by `bench` as a script.

It imports neither jax nor jax_deepgemm: it runs in a process of its own, whose only argument is
JSON, {"shapes": [[m, n, k], ...], "iterations": .., "dirty_l2": .., "read_bytes": [..], "kinds":
["fp8"]}; the answer is the last line of stdout. "read_bytes" is `timing.READ_BYTES`.

    cublaslt_fp8_fast_accum_us   one scale per tensor, no promotion: less work than ours
    cublaslt_fp8_blockscaled_us  1x128 scales on A, 128x128 on B: the same work (CUDA 12.9 or later)
    cublaslt_bf16_us             bfloat16 operands, if "kinds" has "bf16"; the others are "fp8"
"""

import importlib
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

torch: Any = importlib.import_module("torch") if __name__ == "__main__" else None

Tensor = Any
Timed = Callable[[], Tensor]

E4M3_MAX = 448.0
GIGABYTE = 10**9
MAX_ERROR = 1e-3  # fast accumulation keeps about 14 bits


def quantize(x: Tensor, block_rows: int, block_columns: int) -> tuple[Tensor, Tensor]:
    """FP8 values and float32 scales of blocks; edge blocks may be smaller."""
    rows, columns = x.shape
    pad = (0, -columns % block_columns, 0, -rows % block_rows)
    padded = torch.nn.functional.pad(x, pad)
    blocks = padded.unflatten(1, (-1, block_columns)).unflatten(0, (-1, block_rows))
    scales = blocks.abs().amax(dim=(1, 3)) / E4M3_MAX
    values = (blocks / scales[:, None, :, None]).reshape(padded.shape)[:rows, :columns]
    return values.to(torch.float8_e4m3fn).contiguous(), scales


def fast_accum(a: Tensor, b: Tensor) -> Timed:
    """One scale per tensor."""
    (a8, sfa), (b8, sfb) = quantize(a, *a.shape), quantize(b, *b.shape)
    return lambda: torch._scaled_mm(
        a8, b8.t(), sfa[0, 0], sfb[0, 0], out_dtype=torch.bfloat16, use_fast_accum=True
    )


def blockscaled(a: Tensor, b: Tensor) -> Timed:
    """Scales per 1x128 of A (m-contiguous) and per 128x128 of B (k-contiguous)."""
    if a.shape[1] % 512:
        raise ValueError("cuBLASLt wants a multiple of 4 blocks of k")
    (a8, sfa), (b8, sfb) = quantize(a, 1, 128), quantize(b, 128, 128)
    sfa_outer_major = sfa.t().contiguous().t()
    return lambda: torch._scaled_mm(
        a8, b8.t(), sfa_outer_major, sfb.t(), out_dtype=torch.bfloat16, use_fast_accum=False
    )


def bf16(a: Tensor, b: Tensor) -> Timed:
    """The plain product."""
    a16, b16 = a.to(torch.bfloat16), b.to(torch.bfloat16)
    return lambda: a16 @ b16.t()


KINDS = {
    "fp8": (("cublaslt_fp8_fast_accum", fast_accum), ("cublaslt_fp8_blockscaled", blockscaled)),
    "bf16": (("cublaslt_bf16", bf16),),
}


def check(d: Tensor, a: Tensor, b: Tensor) -> None:
    """Raises unless `d` is about a b^T: a wrong scale layout is not always refused."""
    d, x = d.float(), a @ b.t()
    error = 1 - 2 * (d * x).sum() / ((d * d).sum() + (x * x).sum())
    # The casts alone give about 7e-4 here, against the unquantised product.
    if not error.item() <= 2 * MAX_ERROR:
        raise ValueError(f"wrong result: error {error.item():.1e}")


def kernel_time_us(call: Timed, flush: Callable[[], object], iterations: int) -> float:
    """Median over calls of the summed kernel time, from torch's profiler (CUPTI)."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for _ in range(iterations):
            flush()
            call()
        torch.cuda.synchronize()
    # The flush's kernels are torch's own, cuBLASLt's are not.
    durations = [
        event.time_range.elapsed_us()
        for event in sorted(profile.events(), key=lambda event: event.time_range.start)
        if event.device_type == torch.autograd.DeviceType.CUDA
        and "at::native" not in event.name
        and not event.name.startswith(("Memset", "Memcpy"))
    ]
    per_call, rest = divmod(len(durations), iterations)
    if not per_call or rest:
        raise RuntimeError(f"{len(durations)} kernels in the trace for {iterations} calls")
    starts = range(0, len(durations), per_call)
    return float(statistics.median(sum(durations[i : i + per_call]) for i in starts))


def main() -> None:
    """Answers the request in sys.argv[1]."""
    request = json.loads(sys.argv[1])
    free_bytes, _ = torch.cuda.mem_get_info()
    write_bytes = (8 if free_bytes >= 16 * GIGABYTE else 4) * GIGABYTE
    written = torch.empty(write_bytes, dtype=torch.uint8, device="cuda")
    read = torch.ones(GIGABYTE // 4, device="cuda")

    read_bytes = itertools.cycle(request["read_bytes"])

    def flush() -> None:
        read[: next(read_bytes) // 4].sum()
        written.fill_(1)
        if not request["dirty_l2"]:
            read.sum()

    rows = []
    for m, n, k in request["shapes"]:
        a, b = torch.randn(m, k, device="cuda"), torch.randn(n, k, device="cuda")
        row: dict[str, float | str] = {}
        kinds = request.get("kinds", ["fp8"])
        for name, build in (pair for kind in kinds for pair in KINDS[kind]):
            try:
                call = build(a, b)
                check(call(), a, b)
                time_us = kernel_time_us(call, flush, request["iterations"])
                row[f"{name}_us"] = round(time_us, 3)
            except (RuntimeError, ValueError) as error:
                row[f"{name}_failed"] = str(error)
        rows.append(row)
    method = (
        f"torch's profiler (CUPTI), median of {request['iterations']} calls; before every call the "
        f"GPU reads 0 to 0.35 GB, eight lengths by turns, then writes {write_bytes // GIGABYTE} GB"
        + ("" if request["dirty_l2"] else ", then reads 1 GB")
    )
    answer = {"torch": {"version": torch.__version__, "method": method}, "rows": rows}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
