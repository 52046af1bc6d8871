"""A mixture-of-experts feed-forward block in FP8: ragged groups to prefill, masked ones to decode.

Checked against all experts in float32. On a CPU or Hopper GPU: python examples/moe_forward.py
"""

import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jax_deepgemm as dg
from jax_deepgemm.reference import dequantize_per_block, dequantize_per_token

EXPERTS, TOP_K, WIDTH, HIDDEN = 32, 4, 1024, 512
MAX_ERROR, MAX_FP8_COST = 2e-5, 5e-3  # measured on a CPU: 0 and 2e-3
BF16 = (8, 7)  # bits of exponent and mantissa: XLA may drop a cast to bfloat16 and back
EXACT = jax.lax.Precision.HIGHEST  # float32, not the TF32 that GPUs default to


class Layer(NamedTuple):
    router: jax.Array  # float32 [experts, width]
    gate_up: Any  # [experts, 2 * hidden, width]: float32, or from quantize_per_block
    down: Any  # [experts, width, hidden]: the same


def route(x: jax.Array, router: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights and numbers of each token's experts, both [tokens, top_k]."""
    scores, experts = jax.lax.top_k(jnp.dot(x, router.T, precision=EXACT), TOP_K)
    return jax.nn.softmax(scores), experts


def swiglu(gate_up: jax.Array) -> jax.Array:
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return jax.nn.silu(gate) * up


@jax.jit
def prefill(x: jax.Array, layer: Layer) -> jax.Array:
    """Sorts the (token, expert) pairs by expert: groups of any size, end to end."""
    weights, experts = route(x, layer.router)
    order = jnp.argsort(experts.ravel())
    sizes = jnp.bincount(experts.ravel(), length=EXPERTS).astype(jnp.int32)
    ragged = dg.m_grouped_gemm_fp8_fp8_bf16_nt_ragged
    hidden = swiglu(ragged(dg.quantize_per_token(x[order // TOP_K]), layer.gate_up, sizes))
    y = ragged(dg.quantize_per_token(hidden), layer.down, sizes)
    y = y[jnp.argsort(order)].reshape(*experts.shape, WIDTH)  # a token's experts side by side
    return jnp.einsum("tk,tkd->td", weights, y, precision=EXACT)


@jax.jit
def decode(x: jax.Array, layer: Layer) -> jax.Array:
    """Gives every expert one slot per token, of which it fills the first few."""
    (weights, experts), tokens = route(x, layer.router), len(x)
    chosen = jax.nn.one_hot(experts.ravel(), EXPERTS, dtype=jnp.int32)  # [pairs, experts]
    nth = jnp.sum(chosen * (jnp.cumsum(chosen, axis=0) - 1), axis=1).reshape(experts.shape)
    a = jnp.zeros((EXPERTS, tokens, WIDTH)).at[experts, nth].set(x[:, None])
    # Counts stay on the device; what selection may expect of them is static.
    groups = {"masked_m": jnp.sum(chosen, axis=0), "expected_m": -(-tokens * TOP_K // EXPERTS)}
    masked = dg.m_grouped_gemm_fp8_fp8_bf16_nt_masked
    hidden = swiglu(masked(dg.quantize_per_token(a), layer.gate_up, **groups))
    y = masked(dg.quantize_per_token(hidden), layer.down, **groups)[experts, nth]  # filled slots
    return jnp.einsum("tk,tkd->td", weights, y, precision=EXACT)


@jax.jit
def reference(x: jax.Array, layer: Layer) -> jax.Array:
    """All experts on all tokens in float32; activations become FP8 where the weights are."""

    def linear(x: jax.Array, w: Any) -> jax.Array:
        if not isinstance(w, dg.Quantized):
            return jnp.dot(x, w.T, precision=EXACT)
        x, w = dequantize_per_token(*dg.quantize_per_token(x)), dequantize_per_block(*w)
        return jax.lax.reduce_precision(jnp.dot(x, w.T, precision=EXACT), *BF16)

    weights, experts = route(x, layer.router)
    y = jax.lax.map(lambda w: linear(swiglu(linear(x, w[0])), w[1]), layer[1:])
    y = y[experts, jnp.arange(len(x))[:, None]]
    return jnp.einsum("tk,tkd->td", weights, y, precision=EXACT)


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((EXPERTS, WIDTH), (EXPERTS, 2 * HIDDEN, WIDTH), (EXPERTS, WIDTH, HIDDEN))
    layer = Layer(*(w / w.shape[-1] ** 0.5 for w in map(jax.random.normal, keys[1:], shapes)))
    fp8_layer = Layer(layer.router, *map(dg.quantize_per_block, layer[1:]))
    right = True
    for name, block, tokens in (("prefill, ragged", prefill, 512), ("decode, masked", decode, 24)):
        x = jax.random.normal(keys[0], (tokens, WIDTH))
        y, same, exact = block(x, fp8_layer), reference(x, fp8_layer), reference(x, layer)
        error, cost = (float(jnp.sum((y - z) ** 2) / jnp.sum(y**2 + z**2)) for z in (same, exact))
        print(f"{name}, {tokens} tokens: error {error:.1e}; against float32 {cost:.1e}")
        right &= error < MAX_ERROR and cost < MAX_FP8_COST
    print(f"{EXPERTS} experts, {TOP_K} for each token, on {dg.backend()}")
    sys.exit(not right)


if __name__ == "__main__":
    main()
