"""One of several processes that multiply together: python -m tests.device_process ID COUNT PORT.

Operands are made from a seed in every process, split over all processes' devices, and multiplied by
the dense and the ragged operation: under automatic sharding, over rows, columns, k and groups, and
under `jax.shard_map`. Each process checks the shards that it holds, against its own device's whole
result where no sum is split, and against the oracle. Prints OK. JAX_PLATFORMS says on what.
"""

import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_deepgemm
from tests import grouped_cases, numerics

P = PartitionSpec

# Given, because selection looks at the shape that a device has, and sums in another order for some.
CONFIG = jax_deepgemm.GemmConfig(64, 64, 4, 1)


def dense(a: Any, sfa: Any, b: Any, sfb: Any) -> jax.Array:
    return jax_deepgemm.gemm_fp8_fp8_bf16_nt((a, sfa), (b, sfb))


def ragged(*operands: Any) -> jax.Array:
    return grouped_cases.call("ragged", *operands, config=CONFIG)


def main(process: int, count: int, port: int) -> None:
    on_gpu = os.environ["JAX_PLATFORMS"] == "cuda"
    jax.distributed.initialize(
        f"127.0.0.1:{port}", count, process, local_device_ids=[process] if on_gpu else None
    )
    devices = jax.devices()
    assert jax.process_count() == count
    assert len(devices) > len(jax.local_devices())
    mesh = jax.make_mesh((len(devices),), ("x",), axis_types=(AxisType.Auto,))

    def split(operands: Any, specs: Any) -> list[jax.Array]:
        def put(operand: Any, spec: PartitionSpec) -> jax.Array:
            sharding = NamedSharding(mesh, spec)
            return jax.make_array_from_callback(operand.shape, sharding, lambda i: operand[i])

        return [put(operand, spec) for operand, spec in zip(operands, specs, strict=True)]

    def check(d: jax.Array, whole: Any, exact: bool) -> None:
        for shard in d.addressable_shards:
            part, expected = np.asarray(shard.data), whole[shard.index]
            if exact:
                np.testing.assert_array_equal(part, expected)
            assert numerics.error(part, expected) < numerics.BF16_TOLERANCE

    operands = numerics.dense_operands(64 * len(devices), 256 * len(devices), 1024, seed=0)
    oracle = numerics.dense_oracle(operands)
    last = P(None, "x")
    for specs in (
        (P("x"), P("x"), P(), P()),
        (P(), P(), P("x"), P("x")),
        (last, last, last, last),
    ):
        check(jax.jit(dense)(*split(operands, specs)), oracle, exact=False)

    problem = grouped_cases.Problem("ragged", 4 * len(devices), 333, 256, 512)
    experts = problem.operands(seed=1)
    (sizes,) = problem.random_arrays(np.random.default_rng(1))
    local = jax.device_put((*experts, sizes), jax.local_devices()[0])
    whole = np.asarray(jax.jit(ragged)(*local))
    by_group = (P(), P(), P("x"), P("x"), P())
    shards = split((*experts, sizes), by_group)
    check(jax.jit(ragged)(*shards), whole, exact=True)

    def body(a: Any, sfa: Any, b: Any, sfb: Any, sizes: Any) -> jax.Array:
        offset = jax.lax.axis_index("x") * b.shape[0]
        d = ragged(a, sfa, b, sfb, sizes, offset)
        return jax.lax.psum(d.astype(jnp.float32), "x").astype(d.dtype)

    mapped = jax.shard_map(body, mesh=mesh, in_specs=by_group, out_specs=P())
    check(jax.jit(mapped)(*shards), whole, exact=True)
    print("OK", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
