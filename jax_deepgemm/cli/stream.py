"""How long the loads of our kernels take alone: about the least of their times. Run by `bench`.

It runs in a process of its own, because DG_STREAM_ONLY is read once per process. Its only argument
is JSON, {"kernels": [[[op, groups, m_per_group, n, k], {config}], ...], "iterations": ..,
"dirty_l2": .., "num_sms": .. or null}; the answer is the last line of stdout, a list of times in
microseconds.
"""

import json
import statistics
import sys

from jax_deepgemm import GemmConfig, set_num_sms
from jax_deepgemm.cli import machine
from jax_deepgemm.cli.harness import KERNEL_PREFIX
from jax_deepgemm.cli.problem import operation, random_problems
from jax_deepgemm.cli.shapes import Shape
from jax_deepgemm.cli.timing import Call, Flush, kernel_times_us

# The process that runs this one has taken most of the GPU's memory.
ENVIRONMENT = {"DG_STREAM_ONLY": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def main() -> None:
    """Answers the request in sys.argv[1]."""
    request = json.loads(sys.argv[1])
    gpu = machine.hopper_gpu()
    if gpu is None:
        raise SystemExit(machine.why_no_gpu())
    if request["num_sms"]:
        set_num_sms(request["num_sms"])
    shapes, configs = zip(*request["kernels"], strict=True)
    problems = random_problems([Shape(*shape) for shape in shapes], seed=0)
    calls = []
    for problem, config in zip(problems, configs, strict=True):
        function = operation(problem.shape, GemmConfig(**config))
        calls.append(Call(function, *problem.operands, kernel_prefix=KERNEL_PREFIX))
        calls[-1]().block_until_ready()
    flush = Flush(gpu, dirty_l2=request["dirty_l2"])
    times = kernel_times_us(calls, flush, request["iterations"])
    print(json.dumps([round(statistics.median(kernel_us), 3) for kernel_us, _ in times]))
