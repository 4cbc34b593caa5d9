"""Kernels from source to launch: compile with NVRTC, keep on disk, load, launch.

Knows nothing of what the kernels compute. ``compile.py`` and ``cache.py`` work without a GPU or a
driver; ``module.py``, ``launch.py`` and ``tensor_map.py`` need one. Importing this package loads
NumPy only.
"""

from .cache import CubinCache
from .compile import (
    KERNEL_DIR,
    CompiledKernel,
    KernelSpec,
    Resources,
    compile_cubin,
    default_cache,
    nvrtc_build,
    warmup,
)
from .device import (
    ARCHS,
    Device,
    arch_name,
    current_device,
    get_device,
    is_available,
    smem_limit,
    why_unavailable,
)
from .errors import CompileError, LaunchError
from .launch import LaunchConfig, PreparedLaunch, launch, params_dtype
from .module import Kernel, get_kernel, raw_module
from .tensor_map import TENSOR_MAP, encode_tiled

__all__ = [
    "ARCHS",
    "KERNEL_DIR",
    "TENSOR_MAP",
    "CompileError",
    "CompiledKernel",
    "CubinCache",
    "Device",
    "Kernel",
    "KernelSpec",
    "LaunchConfig",
    "LaunchError",
    "PreparedLaunch",
    "Resources",
    "arch_name",
    "compile_cubin",
    "current_device",
    "default_cache",
    "encode_tiled",
    "get_device",
    "get_kernel",
    "is_available",
    "launch",
    "nvrtc_build",
    "params_dtype",
    "raw_module",
    "smem_limit",
    "warmup",
    "why_unavailable",
]
