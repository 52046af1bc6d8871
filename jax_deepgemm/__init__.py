"""FP8 matrix multiplication with fine-grained scales for JAX on NVIDIA Hopper."""

from jax_deepgemm._version import __version__
from jax_deepgemm.config import (
    GemmConfig,
    legal_configs,
    select_config,
    smem_bytes,
)
from jax_deepgemm.device import backend, get_num_sms, set_num_sms
from jax_deepgemm.gemm import gemm_fp8_fp8_bf16_nt
from jax_deepgemm.grouped import (
    m_grouped_gemm_fp8_fp8_bf16_nt_contiguous,
    m_grouped_gemm_fp8_fp8_bf16_nt_masked,
    m_grouped_gemm_fp8_fp8_bf16_nt_ragged,
)
from jax_deepgemm.layout import (
    get_col_major_tma_aligned_tensor,
    get_m_alignment_for_contiguous_layout,
    get_tma_aligned_size,
)
from jax_deepgemm.linear import Linear
from jax_deepgemm.quantize import (
    Quantized,
    quantize_per_block,
    quantize_per_token,
    quantize_per_token_both,
    quantize_per_token_transposed,
    silu_mul_quantize,
)
from jax_deepgemm.quantized_array import QuantizedArray, dequantize, quantized_sharding

__all__ = [
    "GemmConfig",
    "Linear",
    "Quantized",
    "QuantizedArray",
    "__version__",
    "backend",
    "dequantize",
    "gemm_fp8_fp8_bf16_nt",
    "get_col_major_tma_aligned_tensor",
    "get_m_alignment_for_contiguous_layout",
    "get_num_sms",
    "get_tma_aligned_size",
    "legal_configs",
    "m_grouped_gemm_fp8_fp8_bf16_nt_contiguous",
    "m_grouped_gemm_fp8_fp8_bf16_nt_masked",
    "m_grouped_gemm_fp8_fp8_bf16_nt_ragged",
    "quantize_per_block",
    "quantize_per_token",
    "quantize_per_token_both",
    "quantize_per_token_transposed",
    "quantized_sharding",
    "select_config",
    "set_num_sms",
    "silu_mul_quantize",
    "smem_bytes",
]
