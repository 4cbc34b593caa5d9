"""From a cubin to a kernel that can be launched.

Cubins are loaded as CUDA libraries, which belong to no context: one handle serves every device of
the same architecture. Kernels stay loaded for the life of the process. Attributes of a kernel only
ever go up (a lowered limit would race with launches in flight). :func:`raw_module` is the way to
the same cubin through CuPy, for notebooks and load-time work.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

from .compile import CompiledKernel, KernelSpec, Resources, compile_cubin
from .device import Device, current_device
from .errors import LaunchError, check, require

__all__ = ["Kernel", "get_kernel", "raw_module"]

_DEFAULT_SMEM_BYTES = 48 * 1024  # static + dynamic, without opting in
_kernels: dict[tuple[KernelSpec, str], Kernel] = {}
_lock = threading.Lock()


class Kernel:
    """A loaded kernel.

    Attributes
    ----------
    spec : KernelSpec
    arch : str
    handle : cuda.bindings.driver.CUkernel
    function : cuda.bindings.driver.CUfunction
        The same handle in the type that launches take.
    resources : Resources
    params_bytes : int or None
        Size of the kernel's one parameter, a struct by value; None if the driver cannot tell.
    launch_configs : dict
        Launch configurations already built for this kernel, kept here by ``launch.py``.
    """

    __slots__ = (
        "_cluster_devices",
        "_loaded_devices",
        "_smem_bytes",
        "arch",
        "function",
        "handle",
        "launch_configs",
        "params_bytes",
        "resources",
        "spec",
    )

    def __init__(
        self,
        spec: KernelSpec,
        arch: str,
        handle: Any,
        resources: Resources,
        params_bytes: int | None,
    ) -> None:
        self.spec = spec
        self.arch = arch
        self.handle = handle
        self.function = require("cuda.bindings.driver").CUfunction(int(handle))
        self.resources = resources
        self.params_bytes = params_bytes
        self.launch_configs: dict[Any, Any] = {}
        self._smem_bytes: dict[int, int] = {}
        self._cluster_devices: set[int] = set()
        self._loaded_devices: set[int] = set()

    def __repr__(self) -> str:
        return f"Kernel({self.spec.name!r}, arch={self.arch!r})"

    def load(self, device: Device) -> None:
        """Put the kernel's code on ``device``, which is current, rather than at its first launch.

        CUDA loads lazily, and may wait for running kernels to do so: a kernel that waits for one
        that is not launched yet would never end. Before CUDA 12.4 the first launch does it.
        """
        if device.ordinal in self._loaded_devices:
            return
        driver = require("cuda.bindings.driver")
        with contextlib.suppress(RuntimeError):
            function = check(driver.cuKernelGetFunction(self.handle), "cuKernelGetFunction")
            check(driver.cuFuncLoad(function), "cuFuncLoad")
        self._loaded_devices.add(device.ordinal)

    def set_max_smem(self, nbytes: int, device: Device) -> None:
        """Allow launches with up to ``nbytes`` of dynamic shared memory on ``device``.

        All kernels that take any get the largest part of an SM's memory that can be shared: blocks
        of kernels with different parts are never on one SM together, so a dependent launch would
        find no place before its predecessor has ended.

        Parameters
        ----------
        nbytes : int
            A high-water mark: a smaller value than before changes nothing.
        device : Device

        Raises
        ------
        ValueError
            If a block of ``device`` does not have that much.
        LaunchError
            If the driver refuses.
        """
        static_bytes = self.resources.static_smem_bytes
        if nbytes + static_bytes > device.max_smem_bytes:
            raise ValueError(
                f"nbytes: expected at most {device.max_smem_bytes - static_bytes} bytes of dynamic "
                f"shared memory for {self.spec.name} on {device.name} ({device.max_smem_bytes} "
                f"less {static_bytes} static), got {nbytes}"
            )
        if nbytes and device.ordinal not in self._smem_bytes:
            self._set_attribute("PREFERRED_SHARED_MEMORY_CARVEOUT", 100, device)
            self._smem_bytes[device.ordinal] = _DEFAULT_SMEM_BYTES - static_bytes
        if nbytes and nbytes > self._smem_bytes[device.ordinal]:
            self._set_attribute("MAX_DYNAMIC_SHARED_SIZE_BYTES", nbytes, device)
            self._smem_bytes[device.ordinal] = nbytes

    def allow_nonportable_cluster(self, device: Device) -> None:
        """Allow clusters of more than 8 blocks on ``device``.

        Raises
        ------
        LaunchError
            If the driver refuses.
        """
        if device.ordinal not in self._cluster_devices:
            self._set_attribute("NON_PORTABLE_CLUSTER_SIZE_ALLOWED", 1, device)
            self._cluster_devices.add(device.ordinal)

    def _set_attribute(self, name: str, value: int, device: Device) -> None:
        """Set one attribute of this kernel on one device."""
        driver = require("cuda.bindings.driver")
        attribute = getattr(driver.CUfunction_attribute, f"CU_FUNC_ATTRIBUTE_{name}")
        ordinal = driver.CUdevice(device.ordinal)
        check(
            driver.cuKernelSetAttribute(attribute, value, self.handle, ordinal),
            f"cuKernelSetAttribute({name}={value}) of {self.spec.name}",
        )


def get_kernel(spec: KernelSpec, device: Device | None = None) -> Kernel:
    """Return a kernel ready to launch, compiling and loading it on first use.

    Parameters
    ----------
    spec : KernelSpec
    device : Device, optional
        Default: CuPy's current device.

    Returns
    -------
    Kernel

    Raises
    ------
    CompileError
        If the source does not compile.
    LaunchError
        If there is no usable GPU or the cubin does not load.

    Notes
    -----
    After the first call this is one dictionary lookup.
    """
    arch = (current_device() if device is None else device).arch
    kernel = _kernels.get((spec, arch))
    if kernel is None:
        with _lock:
            kernel = _kernels.get((spec, arch))
            if kernel is None:
                kernel = _kernels[spec, arch] = _load(spec, arch)
    return kernel


def _load(spec: KernelSpec, arch: str) -> Kernel:
    """Compile a kernel and load it into the process."""
    compiled = compile_cubin(spec, arch)
    driver = require("cuda.bindings.driver")
    check(driver.cuInit(0), "cuInit")
    library = check(
        driver.cuLibraryLoadData(compiled.cubin, [], [], 0, [], [], 0),
        f"cuLibraryLoadData({spec.name}, {arch})",
    )
    handle = check(driver.cuLibraryGetKernel(library, spec.name.encode()), "cuLibraryGetKernel")
    return Kernel(spec, arch, handle, compiled.resources, _params_bytes(spec, handle))


def _params_bytes(spec: KernelSpec, handle: Any) -> int | None:
    """Ask the driver for the size of the one parameter; those before CUDA 12.4 do not say."""
    driver = require("cuda.bindings.driver")
    try:
        first, second = (driver.cuKernelGetParamInfo(handle, index) for index in (0, 1))
    except RuntimeError:
        return None
    if first[0] or not second[0]:
        raise LaunchError(f"{spec.path}: expected a kernel with one parameter, a struct by value")
    return int(first[2])


def raw_module(
    name: str,
    defines: tuple[tuple[str, str | int], ...] = (),
    *,
    source_dir: Path | None = None,
    device: Device | None = None,
) -> Any:
    """Return a kernel's cubin as a CuPy module, to be launched with CuPy arrays.

    Parameters
    ----------
    name : str
        Stem of the ``.cu`` file; also the name to pass to ``get_function``.
    defines : tuple of (str, str or int)
    source_dir : Path, optional
        Folder of the ``.cu`` file; default ``cumoe/cu``.
    device : Device, optional
        Default: CuPy's current device.

    Returns
    -------
    cupy.RawModule

    Raises
    ------
    CompileError
        If the source does not compile.
    LaunchError
        If there is no usable GPU.

    Notes
    -----
    CuPy launches without clusters and without programmatic stream serialization. The parameter
    struct is passed as it is, a structured NumPy array of one element:
    ``function(grid, block, (params,))``.
    """
    spec = KernelSpec(name, tuple(defines), source_dir=source_dir)
    arch = (current_device() if device is None else device).arch
    compiled = compile_cubin(spec, arch)
    return require("cupy").RawModule(path=str(compiled.path or _temporary_file(spec, compiled)))


def _temporary_file(spec: KernelSpec, compiled: CompiledKernel) -> Path:
    """Write a cubin that the cache could not keep, for the life of the process."""
    descriptor, name = tempfile.mkstemp(f"-{spec.name}.cubin", dir=_temporary_directory())
    with open(descriptor, "wb") as stream:
        stream.write(compiled.cubin)
    return Path(name)


@functools.cache
def _temporary_directory() -> str:
    """Make a private directory that is removed at exit."""
    directory = tempfile.mkdtemp(prefix="cumoe-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory
