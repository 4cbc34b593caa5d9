"""Arrays in and out: NumPy, CuPy, and any library that speaks DLPack or the CUDA array interface.

Every op sees only NumPy or CuPy arrays; :func:`as_native` turns what the caller passed into one of
them, without a copy, and checks it. bfloat16 keeps its ml_dtypes dtype on both. An fp8 payload is
an ml_dtypes array on NumPy and uint8 on CuPy, which has no fp8 dtype. The producer's pending work
is ordered before ours by the stream protocol of DLPack or the CUDA array interface, except while a
graph is captured.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from cumoe.config import Array

DTYPES: dict[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "uint8": np.dtype(np.uint8),
    "int16": np.dtype(np.int16),
    "int32": np.dtype(np.int32),
}
FP8 = "float8_e4m3fn"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HOST = -1  # where a device has its ordinal
_device_arrays: list[type] = []  # CuPy's, once it is imported
_DLPACK_CPU, _DLPACK_CUDA, _DLPACK_CUDA_MANAGED = 1, 2, 13


def is_device(x: object) -> bool:
    """Tell whether `x` is a CuPy array."""
    if not _device_arrays:
        # Another thread may be importing CuPy; nobody has an array of it before it has come.
        found = getattr(sys.modules.get("cupy"), "ndarray", None)
        if found is None:
            return False
        _device_arrays.append(found)
    return isinstance(x, _device_arrays[0])


def place_of(x: Array) -> str:
    """Return where a native array lives: ``"host"`` or ``"cuda:<ordinal>"``."""
    return _place_name(_place(x))


def _place(x: Array) -> int:
    # NOTE: not x.device, an object made for each question.
    return int(x.data.device_id) if is_device(x) else _HOST


def _place_name(place: int) -> str:
    return "host" if place == _HOST else f"cuda:{place}"


def same_place(arrays: dict[str, Array | None]) -> str:
    """Return the one place all arrays live in, or raise naming the two that differ."""
    first: tuple[str, int] | None = None
    for name, x in arrays.items():
        if x is None:
            continue
        place = _place(x)
        if first is None:
            first = (name, place)
        elif place != first[1]:
            raise ValueError(
                f"{name}: expected an array on {_place_name(first[1])} like {first[0]}, got one on "
                f"{_place_name(place)}"
            )
    if first is None:
        raise ValueError("expected at least one array, got none")
    return _place_name(first[1])


def dtype_name(x: Any) -> str:
    """Return the dtype of an array of any library by its ml_dtypes name."""
    dtype = getattr(x, "dtype", None)
    name = _NAMES.get(dtype) if isinstance(dtype, np.dtype) else None
    name = name or getattr(dtype, "name", None) or str(dtype)
    return name.removeprefix("torch.")


def as_native(
    x: Any,
    name: str,
    dtypes: Sequence[str],
    *,
    ndim: int | None = None,
    shape: Sequence[int | None] | None = None,
    contiguous: bool = True,
    writable: bool = False,
) -> Array:
    """Return `x` as a NumPy or CuPy array over the same memory, checked.

    Parameters
    ----------
    x : array
        NumPy, CuPy, or any object with ``__dlpack__`` or ``__cuda_array_interface__``.
    name : str
        Argument name for messages.
    dtypes : sequence of str
        Accepted dtypes. ``"float8_e4m3fn"`` accepts a uint8 payload too.
    ndim, shape : optional
        Required rank and sizes; ``None`` in `shape` accepts any size.
    contiguous : bool
        Require C order.
    writable : bool
        Require that the array may be written.

    Raises
    ------
    TypeError
        If `x` is no array or its dtype is not accepted.
    ValueError
        If rank, shape or strides differ, or a read-only array would be written.
    """
    if isinstance(x, np.ndarray) or is_device(x):
        native, got = x, dtype_name(x)
    else:
        native, got = _import_foreign(x, name, writable)
    payload = FP8 in dtypes and got in (FP8, "uint8")
    if not payload and got not in dtypes:
        raise TypeError(f"{name}: expected dtype {' or '.join(dtypes)}, got {got}")
    if payload:
        want = DTYPES["uint8"] if is_device(native) else DTYPES[FP8]
        native = native if native.dtype == want else native.view(want)
    if ndim is not None and native.ndim != ndim:
        raise ValueError(
            f"{name}: expected {ndim} dimensions, got {native.ndim} (shape {native.shape})"
        )
    if shape is not None:
        check_shape(name, native, shape)
    if contiguous and not native.flags.c_contiguous:
        raise ValueError(
            f"{name}: expected a C-contiguous array, got shape {native.shape} with strides "
            f"{native.strides} (bytes)"
        )
    if not contiguous and any(s < 0 for s in native.strides):
        raise ValueError(f"{name}: expected non-negative strides, got {native.strides} (bytes)")
    if writable and isinstance(native, np.ndarray) and not native.flags.writeable:
        raise ValueError(f"{name}: expected a writable array, got a read-only one")
    return native


def check_shape(name: str, x: Array, shape: Sequence[int | None]) -> None:
    """Raise unless ``x.shape`` equals `shape`, where ``None`` accepts any size."""
    got = tuple(x.shape)
    if len(got) == len(shape):
        for size, wanted in zip(got, shape, strict=True):
            if wanted is not None and wanted != size:
                break
        else:
            return
    sizes = ["*" if s is None else str(s) for s in shape]
    text = f"({sizes[0]},)" if len(sizes) == 1 else "(" + ", ".join(sizes) + ")"
    raise ValueError(f"{name}: expected shape {text}, got {got}")


def _import_foreign(x: Any, name: str, writable: bool) -> tuple[Array, str]:
    """View an array of another library as NumPy or CuPy; returns it and its dtype."""
    has_dlpack = hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__")
    if not has_dlpack and not hasattr(x, "__cuda_array_interface__"):
        raise TypeError(
            f"{name}: expected a NumPy or CuPy array or one with __dlpack__ or "
            f"__cuda_array_interface__, got {type(x).__name__}"
        )
    if writable and type(x).__module__.split(".")[0] in ("jax", "jaxlib"):
        raise ValueError(f"{name}: expected a writable array, got an immutable JAX array")
    if getattr(x, "requires_grad", False):
        raise ValueError(f"{name}: expected a tensor without gradient, got requires_grad=True")
    if has_dlpack and int(x.__dlpack_device__()[0]) == _DLPACK_CPU:
        return _import_host(x, name)
    if has_dlpack and int(x.__dlpack_device__()[0]) not in (_DLPACK_CUDA, _DLPACK_CUDA_MANAGED):
        raise TypeError(f"{name}: expected host or CUDA memory, got {x.__dlpack_device__()}")
    return _import_device(x, name)


def _import_host(x: Any, name: str) -> tuple[np.ndarray, str]:
    try:
        array = np.from_dlpack(x)
    except (BufferError, RuntimeError, TypeError):
        try:
            array = np.asarray(x)
        except (TypeError, RuntimeError):
            array = np.asarray(None)
    if array.dtype == object:
        raise TypeError(
            f"{name}: expected a host array that NumPy can view, got dtype {dtype_name(x)} of "
            f"{type(x).__module__.split('.')[0]}; pass its integer view with .view(ml_dtypes dtype)"
        )
    return array, dtype_name(array)


def _import_device(x: Any, name: str) -> tuple[Array, str]:
    import cupy
    from cuda.core.utils import StridedMemoryView

    got = dtype_name(x)
    if got not in DTYPES:
        raise TypeError(f"{name}: expected a dtype of {sorted(DTYPES)}, got {got}")
    torch = sys.modules.get("torch")
    if got == FP8 and torch is not None and isinstance(x, torch.Tensor):
        x = x.view(torch.uint8)  # cuda.core has no fp8 tensor types
    stream = cupy.cuda.get_current_stream()
    # NOTE: the stream protocol records and waits on events, which would break a capture.
    stream_ptr = -1 if stream.is_capturing() else (stream.ptr or 1)
    view = StridedMemoryView.from_any_interface(x, stream_ptr=stream_ptr)
    dtype = DTYPES["uint8"] if got == FP8 else DTYPES[got]
    shape = tuple(view.shape)
    strides = view.strides
    if strides is None:
        byte_strides = _contiguous_strides(shape, dtype.itemsize)
    else:
        byte_strides = tuple(int(s) * dtype.itemsize for s in strides)
    if any(s < 0 for s in byte_strides):
        raise ValueError(f"{name}: expected non-negative strides, got {byte_strides} (bytes)")
    span = sum((n - 1) * s for n, s in zip(shape, byte_strides, strict=True)) + dtype.itemsize
    size = 0 if 0 in shape else span
    memory = cupy.cuda.UnownedMemory(int(view.ptr), size, (x, view), int(view.device_id))
    pointer = cupy.cuda.MemoryPointer(memory, 0)
    return cupy.ndarray(shape, dtype=dtype, memptr=pointer, strides=byte_strides), got


def _contiguous_strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    strides, step = [], itemsize
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


def address(x: Array | None) -> int:
    """Return the address of a native array's first element, 0 for None."""
    if x is None:
        return 0
    return int(x.data.ptr) if is_device(x) else int(x.ctypes.data)


def overlaps(a: Array, b: Array) -> bool:
    """Tell whether the memory spans of two native arrays in one place share a byte."""
    (low_a, high_a), (low_b, high_b) = _span(a), _span(b)
    return low_a < high_b and low_b < high_a


def _span(x: Array) -> tuple[int, int]:
    """Return the addresses of an array's first byte and of that behind its last."""
    low = address(x)
    if x.size == 0:
        return low, 0  # before any other
    if x.flags.c_contiguous:
        return low, low + int(x.nbytes)
    return low, low + sum((n - 1) * s for n, s in zip(x.shape, x.strides, strict=True)) + x.itemsize


def check_no_overlap(name: str, out: Array, inputs: dict[str, Array | None]) -> None:
    """Raise if `out` shares memory with one of the inputs."""
    place, (low, high) = _place(out), _span(out)
    for other, x in inputs.items():
        if x is None or _place(x) != place:
            continue
        other_low, other_high = _span(x)
        if low < other_high and other_low < high:
            raise ValueError(f"{name}: expected memory of its own, got an overlap with {other}")


def empty(like: Array, shape: Sequence[int], dtype: str) -> Array:
    """Allocate an array of `dtype` beside `like`; fp8 becomes uint8 on a device."""
    if not is_device(like):
        return np.empty(tuple(shape), DTYPES[dtype])
    import cupy

    want = DTYPES["uint8"] if dtype == FP8 else DTYPES[dtype]
    with cupy.cuda.Device(like.device.id):
        return cupy.empty(tuple(shape), want)


def zeros(like: Array, shape: Sequence[int], dtype: str) -> Array:
    """Allocate zeros of `dtype` beside `like`; no host synchronisation."""
    if not is_device(like):
        return np.zeros(tuple(shape), DTYPES[dtype])
    import cupy

    with cupy.cuda.Device(like.device.id):
        return cupy.zeros(tuple(shape), DTYPES[dtype])


def wait_for(like: Array) -> None:
    """Wait for what is queued on CuPy's current stream of an array's device."""
    import cupy

    with cupy.cuda.Device(like.device.id):
        cupy.cuda.get_current_stream().synchronize()
