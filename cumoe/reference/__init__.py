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
from cumoe.reference.permutation import group
from cumoe.reference.quantize import (
    dequantize,
    quantize_fp8_block,
    quantize_fp8_block_weights,
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
    "round_bf16",
    "route",
    "sigmoid",
    "to_e4m3",
    "unpack",
    "warp_sum",
]
