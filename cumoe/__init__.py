"""Mixture-of-Experts layers on CuPy arrays, every CUDA kernel compiled at run time by NVRTC.

NumPy arrays run the reference twins, device arrays of any DLPack library run the kernels. Importing
the package touches no GPU.
"""

from cumoe import launch, layouts, tuning
from cumoe.activation import activate
from cumoe.config import (
    Activation,
    ExpertParts,
    ExpertShard,
    PackedTopK,
    Permutation,
    Quantized,
    Routing,
    RoutingMethod,
    TopK,
)
from cumoe.custom_activation import custom_activation
from cumoe.finalize import finalize, finalize_parts
from cumoe.grouped_gemm import grouped_gemm
from cumoe.moe import MoELayer, moe, routed_moe
from cumoe.permutation import group
from cumoe.quantize import dequantize, quantize_fp8_block, quantize_fp8_block_weights
from cumoe.routing import pack, route, unpack
from cumoe.weights import ExpertWeights

__version__ = "0.1.0.dev0"

__all__ = [
    "Activation",
    "ExpertParts",
    "ExpertShard",
    "ExpertWeights",
    "MoELayer",
    "PackedTopK",
    "Permutation",
    "Quantized",
    "Routing",
    "RoutingMethod",
    "TopK",
    "activate",
    "custom_activation",
    "dequantize",
    "finalize",
    "finalize_parts",
    "group",
    "grouped_gemm",
    "launch",
    "layouts",
    "moe",
    "pack",
    "quantize_fp8_block",
    "quantize_fp8_block_weights",
    "route",
    "routed_moe",
    "tuning",
    "unpack",
]
