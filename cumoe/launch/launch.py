"""Launching a loaded kernel: its shape, its one parameter struct, its stream.

A kernel takes a single ``const __grid_constant__ Params`` by value, mirrored on the host by one
NumPy dtype (:func:`params_dtype` lays it out as C does). :func:`launch` is for a call made once in
a while; :class:`PreparedLaunch` keeps everything that can be kept and costs about a microsecond of
Python a launch. Nothing here synchronises, allocates on the device, or follows CuPy's current
stream by itself.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .device import Device, current_device, current_ordinal
from .errors import check, require
from .module import Kernel
from .tensor_map import TENSOR_MAP

__all__ = ["LaunchConfig", "PreparedLaunch", "launch", "params_dtype"]

_GRID_LIMITS = (2**31 - 1, 65535, 65535)
_BLOCK_LIMITS = (1024, 1024, 64)
_MAX_THREADS = 1024
_PORTABLE_CLUSTER_BLOCKS = 8
_MAX_CLUSTER_BLOCKS = 16
_TENSOR_MAP_ALIGNMENT = 64
_MAX_CONFIGS = (
    1024  # built configurations kept per kernel; past that the caller makes new ones each time
)


@dataclass(frozen=True)
class LaunchConfig:
    """The shape of a launch.

    Attributes
    ----------
    grid, block : tuple of int
        ``(x, y, z)``; missing trailing sizes are 1. The grid counts blocks, also with a cluster.
    cluster : tuple of int, optional
        Blocks in a cluster. Leave None for a kernel with ``__cluster_dims__``.
    smem_bytes : int
        Dynamic shared memory; past 48 KB the kernel is opted in on first use.
    programmatic : bool
        Programmatic stream serialization: the kernel may start before the one ahead of it in the
        stream has finished, and must execute ``griddepcontrol.wait`` before it touches that one's
        results.

    Raises
    ------
    ValueError
        If a size is zero or past what CUDA allows, or the cluster does not divide the grid.
    """

    grid: tuple[int, ...]
    block: tuple[int, ...]
    cluster: tuple[int, ...] | None = None
    smem_bytes: int = 0
    programmatic: bool = False

    def __post_init__(self) -> None:
        grid = _three("grid", self.grid, _GRID_LIMITS)
        block = _three("block", self.block, _BLOCK_LIMITS)
        if math.prod(block) > _MAX_THREADS:
            raise ValueError(f"block: expected at most {_MAX_THREADS} threads, got {block}")
        if self.cluster is not None:
            cluster = _three("cluster", self.cluster, (_MAX_CLUSTER_BLOCKS,) * 3)
            if math.prod(cluster) > _MAX_CLUSTER_BLOCKS:
                raise ValueError(
                    f"cluster: expected at most {_MAX_CLUSTER_BLOCKS} blocks, got {cluster}"
                )
            if any(g % c for g, c in zip(grid, cluster, strict=True)):
                raise ValueError(f"cluster: expected a divisor of grid {grid}, got {cluster}")
            object.__setattr__(self, "cluster", cluster)
        if self.smem_bytes < 0:
            raise ValueError(f"smem_bytes: expected at least 0, got {self.smem_bytes}")
        object.__setattr__(self, "grid", grid)
        object.__setattr__(self, "block", block)
        object.__setattr__(self, "smem_bytes", int(self.smem_bytes))


def params_dtype(fields: Iterable[tuple[Any, ...]]) -> np.dtype[Any]:
    """Return the dtype of a parameter struct, laid out as the C++ compiler lays it out.

    Parameters
    ----------
    fields : iterable of (name, dtype) or (name, dtype, shape)
        In declaration order. A field of dtype :data:`cumoe.launch.TENSOR_MAP` is aligned to 64
        bytes, as ``struct alignas(64)`` is; a nested struct is itself a result of this function.

    Returns
    -------
    numpy.dtype
        Structured, with explicit offsets and C's trailing padding.
    """
    names, formats, offsets = [], [], []
    end, alignment = 0, 1
    for name, *rest in fields:
        dtype = np.dtype((rest[0], rest[1])) if len(rest) > 1 else np.dtype(rest[0])
        step = _alignment(dtype)
        offset = -(-end // step) * step
        names.append(name)
        formats.append(dtype)
        offsets.append(offset)
        end, alignment = offset + dtype.itemsize, max(alignment, step)
    itemsize = -(-end // alignment) * alignment
    layout = {"names": names, "formats": formats, "offsets": offsets, "itemsize": itemsize}
    return np.dtype(layout)  # type: ignore[call-overload]


def launch(kernel: Kernel, config: LaunchConfig, params: np.ndarray, stream_ptr: int) -> None:
    """Queue one launch on a stream of CuPy's current device.

    Parameters
    ----------
    kernel : Kernel
    config : LaunchConfig
    params : numpy.ndarray, structured, one element
        Mirror of the kernel's ``Params``; copied by the driver before this returns.
    stream_ptr : int
        ``cupy.cuda.get_current_stream().ptr``.

    Raises
    ------
    TypeError
        If ``params`` is not a structured array.
    ValueError
        If ``params`` differs in size from the kernel's parameter, or the launch asks for more
        shared memory than a block has.
    LaunchError
        If CUDA refuses the launch.

    Notes
    -----
    No host synchronisation. The native configuration is built once for each kernel, config and
    stream.
    """
    PreparedLaunch(kernel, config, params).run(stream_ptr)


class PreparedLaunch:
    """A launch that is repeated: built once for one device, then run on any of its streams.

    Parameters
    ----------
    kernel : Kernel
    config : LaunchConfig
    params : numpy.ndarray, structured, one element
        Kept, not copied: a field written between two runs is seen by the second.
    device : Device, optional
        Default: CuPy's current device. It must be current when :meth:`run` is called.

    Raises
    ------
    TypeError, ValueError
        As :func:`launch`, on construction.
    """

    __slots__ = (
        "_address",
        "_function",
        "_launch",
        "_native",
        "config",
        "kernel",
        "params",
    )

    def __init__(
        self, kernel: Kernel, config: LaunchConfig, params: np.ndarray, device: Device | None = None
    ) -> None:
        self.kernel = kernel
        self.config = config
        self.params = params
        self._address = ctypes.c_void_p(_params_address(kernel, params))
        self._function = kernel.function
        self._launch = require("cuda.bindings.driver").cuLaunchKernelEx
        self._native: dict[int, Any] = {}
        _opt_in(kernel, config, current_device() if device is None else device)

    def run(self, stream_ptr: int) -> None:
        """Queue the launch.

        Parameters
        ----------
        stream_ptr : int

        Raises
        ------
        LaunchError
            If CUDA refuses the launch.
        """
        native = self._native.get(stream_ptr)
        if native is None:
            if len(self._native) >= _MAX_CONFIGS:
                self._native.clear()
            native = self._native[stream_ptr] = _native_of(self.kernel, self.config, stream_ptr)
        address = ctypes.addressof(self._address)
        status = self._launch(native, self._function, address, 0)[0]
        if status:
            _retry(status, self.kernel, native, address)


def _native_of(kernel: Kernel, config: LaunchConfig, stream_ptr: int) -> Any:
    """Return the native configuration, which launches that are made anew each time share."""
    key = (config, stream_ptr)
    native = kernel.launch_configs.get(key)
    if native is None:
        if len(kernel.launch_configs) >= _MAX_CONFIGS:
            kernel.launch_configs.clear()
        native = kernel.launch_configs[key] = _build(config, stream_ptr)
    return native


def _opt_in(kernel: Kernel, config: LaunchConfig, device: Device) -> None:
    """Raise the kernel's limits to what a config asks for."""
    kernel.load(device)
    kernel.set_max_smem(config.smem_bytes, device)
    if config.cluster is not None and math.prod(config.cluster) > _PORTABLE_CLUSTER_BLOCKS:
        kernel.allow_nonportable_cluster(device)


def _build(config: LaunchConfig, stream_ptr: int) -> Any:
    """Build the CUlaunchConfig of a config on a stream."""
    driver = require("cuda.bindings.driver")
    native = driver.CUlaunchConfig()
    native.gridDimX, native.gridDimY, native.gridDimZ = config.grid
    native.blockDimX, native.blockDimY, native.blockDimZ = config.block
    native.sharedMemBytes = config.smem_bytes
    native.hStream = driver.CUstream(stream_ptr)
    attributes = []
    if config.cluster is not None:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        dims = attribute.value.clusterDim
        dims.x, dims.y, dims.z = config.cluster
        attributes.append(attribute)
    if config.programmatic:
        attribute = driver.CUlaunchAttribute()
        attribute.id = (
            driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        )
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes.append(attribute)
    native.attrs = attributes
    native.numAttrs = len(attributes)
    return native


def _params_address(kernel: Kernel, params: np.ndarray) -> int:
    """Check a parameter struct against its kernel and return where it lies."""
    if not isinstance(params, np.ndarray) or params.dtype.names is None:
        raise TypeError(f"params: expected a structured NumPy array, got {type(params).__name__}")
    if params.size != 1 or kernel.params_bytes not in (None, params.itemsize):
        raise ValueError(
            f"params: expected one struct of {kernel.params_bytes} bytes for {kernel.spec.name}, "
            f"got {params.size} of {params.itemsize}"
        )
    return int(params.ctypes.data)


def _retry(status: Any, kernel: Kernel, native: Any, address: int) -> None:
    """Launch again after making the device's context current, if that was missing; else raise."""
    driver = require("cuda.bindings.driver")
    if status == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
        # A thread that has made no runtime call yet has no context; the runtime would make it
        # current.
        require("cupy").cuda.runtime.setDevice(current_ordinal())
        status = driver.cuLaunchKernelEx(native, kernel.function, address, 0)[0]
    check((status,), f"launch of {kernel.spec.name}")


def _alignment(dtype: np.dtype[Any]) -> int:
    """Alignment of a field in C; NumPy does not know that of tensor maps and their holders."""
    if dtype == TENSOR_MAP:
        return _TENSOR_MAP_ALIGNMENT
    if dtype.fields is None:
        return _alignment(dtype.base) if dtype.base is not dtype else dtype.alignment
    return max(_alignment(member[0]) for member in dtype.fields.values())


def _three(name: str, sizes: tuple[int, ...], limits: tuple[int, ...]) -> tuple[int, int, int]:
    """Extend sizes to three and check each against its limit."""
    values = tuple(int(size) for size in sizes)
    if not 1 <= len(values) <= 3:
        raise ValueError(f"{name}: expected one to three sizes, got {sizes}")
    x, y, z = values + (1,) * (3 - len(values))
    if any(not 1 <= v <= limit for v, limit in zip((x, y, z), limits, strict=True)):
        raise ValueError(f"{name}: expected sizes from 1 to {limits}, got {(x, y, z)}")
    return x, y, z
