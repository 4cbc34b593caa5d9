"""What is known about a GPU: architecture name, multiprocessors, shared memory, L2.

CuPy's current device is the reference, since the arrays are CuPy's. The probes
(:func:`is_available`, :func:`why_unavailable`) look for the driver with ctypes before anything else
is asked: CUDA calls made through Python bindings without a driver may raise late or never return.
The table :data:`ARCHS` serves compiles on machines without a GPU. Importing this module touches no
GPU.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .errors import LaunchError, require

__all__ = [
    "ARCHS",
    "Device",
    "arch_name",
    "current_device",
    "current_ordinal",
    "get_device",
    "is_available",
    "smem_limit",
    "why_unavailable",
]

_KIB = 1024

ARCHS: Mapping[str, int] = MappingProxyType(
    {
        "sm_80": 163 * _KIB,
        "sm_86": 99 * _KIB,
        "sm_89": 99 * _KIB,
        "sm_90a": 227 * _KIB,
        "sm_100a": 227 * _KIB,
        "sm_120a": 99 * _KIB,
    }
)
"""Architecture -> bytes of shared memory a block may opt in to (CUDA programming guide, "Technical
Specifications per Compute Capability")."""

# Compute capability majors whose wgmma / tcgen05 / block-scaled mma need the architecture-specific
# target.
_ARCH_SPECIFIC_MAJORS = (9, 10, 12)


@dataclass(frozen=True)
class Device:
    """One GPU.

    Attributes
    ----------
    ordinal : int
        Index among the visible devices.
    name : str
    compute_capability : tuple of int
        ``(major, minor)``.
    arch : str
        Target that kernels are compiled for, such as ``"sm_90a"``.
    num_sms : int
    max_smem_bytes : int
        Shared memory one block may use after opting in.
    l2_bytes : int
    total_memory_bytes : int
    """

    ordinal: int
    name: str
    compute_capability: tuple[int, int]
    arch: str
    num_sms: int
    max_smem_bytes: int
    l2_bytes: int
    total_memory_bytes: int


def arch_name(major: int, minor: int) -> str:
    """Return the compile target: ``(9, 0) -> "sm_90a"``, ``(8, 9) -> "sm_89"``."""
    return f"sm_{major}{minor}" + ("a" if major in _ARCH_SPECIFIC_MAJORS else "")


def smem_limit(arch: str) -> int:
    """Return the shared memory in bytes that one block may opt in to on ``arch``.

    Raises
    ------
    ValueError
        If ``arch`` is not in :data:`ARCHS`.
    """
    try:
        return ARCHS[arch]
    except KeyError:
        raise ValueError(f"arch: expected one of {', '.join(ARCHS)}, got {arch!r}") from None


def current_ordinal() -> int:
    """Return the index of CuPy's current device."""
    ordinal: int = _cupy_runtime().getDevice()
    return ordinal


def current_device() -> Device:
    """Return CuPy's current device.

    Raises
    ------
    LaunchError
        If there is no usable GPU; the message says why.
    """
    return get_device(current_ordinal())


@functools.cache
def get_device(ordinal: int) -> Device:
    """Return the properties of device ``ordinal``, asked once.

    Raises
    ------
    LaunchError
        If there is no usable GPU; the message says why.
    ValueError
        If ``ordinal`` is not a visible device.
    """
    runtime = _cupy_runtime()
    count = int(runtime.getDeviceCount())
    if not 0 <= ordinal < count:
        raise ValueError(f"ordinal: expected 0 <= ordinal < {count} visible devices, got {ordinal}")
    properties = runtime.getDeviceProperties(ordinal)
    major, minor = int(properties["major"]), int(properties["minor"])
    return Device(
        ordinal=ordinal,
        name=properties["name"].decode(),
        compute_capability=(major, minor),
        arch=arch_name(major, minor),
        num_sms=int(properties["multiProcessorCount"]),
        max_smem_bytes=int(properties["sharedMemPerBlockOptin"]),
        l2_bytes=int(properties["l2CacheSize"]),
        total_memory_bytes=int(properties["totalGlobalMem"]),
    )


def is_available() -> bool:
    """Tell whether kernels can be launched here. Never raises and never hangs."""
    return why_unavailable() is None


@functools.cache
def why_unavailable() -> str | None:
    """Say why no kernel can be launched here, or return None if one can.

    Notes
    -----
    Asked once per process. Initialises the driver (``cuInit``) where there is one; creates no
    context.
    """
    for module, package in (("cupy", "CuPy"), ("cuda.bindings", "cuda-bindings")):
        if not _is_installed(module):
            return f"{package} is not installed (install cumoe[cu12] or cumoe[cu13])"
    reason = _why_no_driver()
    if reason is not None:
        return reason
    try:
        require("cupy").cuda.runtime.getDeviceCount()
    except Exception as error:  # any failure of CuPy or the runtime means the same thing here
        return f"CuPy cannot use the GPU: {error}"
    return None


def _why_no_driver() -> str | None:
    """Probe libcuda without any binding."""
    try:
        libcuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1 is not found)"
    status = int(libcuda.cuInit(0))
    if status:
        return f"the NVIDIA driver does not start: cuInit gives {_error_name(libcuda, status)}"
    count = ctypes.c_int(0)
    status = int(libcuda.cuDeviceGetCount(ctypes.byref(count)))
    if status or count.value == 0:
        return "the NVIDIA driver sees no GPU"
    return None


def _error_name(libcuda: ctypes.CDLL, status: int) -> str:
    """Name a driver status, as CUDA_ERROR_NO_DEVICE (100)."""
    text = ctypes.c_char_p()
    libcuda.cuGetErrorName(status, ctypes.byref(text))
    return f"{(text.value or b'error').decode()} ({status})"


def _is_installed(module: str) -> bool:
    """Look a module up without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


@functools.cache
def _cupy_runtime() -> Any:
    """Return cupy.cuda.runtime, or say why there is no GPU."""
    reason = why_unavailable()
    if reason is not None:
        raise LaunchError(reason)
    return require("cupy").cuda.runtime
