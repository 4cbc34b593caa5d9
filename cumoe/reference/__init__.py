"""NumPy twins of cumoe's ops: the backend for NumPy arrays and the oracle of the kernels.

Every function takes arrays that were validated above it and explicit keyword arguments, imports
neither CuPy nor the launch layer, and touches no GPU. Routing, permutation and quantisation are
exact: a kernel must return the same bits.
"""

from cumoe.reference.exact import (
    det_exp,
    order_image,
    round_bf16,
    sigmoid,
    to_e4m3,
    warp_sum,
)
from cumoe.reference.microscaling import quantize_fp8_ue8m0, quantize_nvfp4, to_e2m1
from cumoe.reference.permutation import group
from cumoe.reference.quantize import (
    dequantize,
    quantize_fp8_block,
    quantize_fp8_block_weights,
    quantize_fp8_tensor,
    quantize_fp8_token,
)
from cumoe.reference.routing import pack, route, unpack

__all__ = [
    "dequantize",
    "det_exp",
    "group",
    "order_image",
    "pack",
    "quantize_fp8_block",
    "quantize_fp8_block_weights",
    "quantize_fp8_tensor",
    "quantize_fp8_token",
    "quantize_fp8_ue8m0",
    "quantize_nvfp4",
    "round_bf16",
    "route",
    "sigmoid",
    "to_e2m1",
    "to_e4m3",
    "unpack",
    "warp_sum",
]
