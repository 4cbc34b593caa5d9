"""Mixture-of-Experts layers on CuPy arrays, every CUDA kernel compiled at run time by NVRTC.

NumPy arrays run the reference twins, device arrays of any DLPack library run the kernels. Importing
the package touches no GPU.
"""

from cumoe import launch, layouts, tuning
from cumoe.activation import activate
from cumoe.calibrate import StaticScales, calibrate
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
from cumoe.dequantize import dequantize
from cumoe.finalize import finalize, finalize_parts
from cumoe.grouped_gemm import grouped_gemm
from cumoe.microscaling import QuantizedNVFP4, QuantizedUE8M0
from cumoe.moe import MoELayer, moe, routed_moe
from cumoe.permutation import group
from cumoe.quantize import (
    quantize_fp8_block,
    quantize_fp8_block_weights,
    quantize_fp8_tensor,
    quantize_fp8_token,
    quantize_fp8_ue8m0,
    quantize_nvfp4,
)
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
    "QuantizedNVFP4",
    "QuantizedUE8M0",
    "Routing",
    "RoutingMethod",
    "StaticScales",
    "TopK",
    "activate",
    "calibrate",
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
    "quantize_fp8_tensor",
    "quantize_fp8_token",
    "quantize_fp8_ue8m0",
    "quantize_nvfp4",
    "route",
    "routed_moe",
    "tuning",
    "unpack",
]
