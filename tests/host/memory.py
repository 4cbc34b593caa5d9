"""Arrays whose neighbourhood is watched: what a kernel may touch ends where the array ends.

Each array ends where memory begins that may not be accessed, so one element past its end is a
fault at the access. The bytes in front of it, up to a page, hold a pattern that
:meth:`Arena.check` looks at, and before them lies such memory again.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

from cumoe.arrays import DTYPES
from tests.host.loader import asan_active

PATTERN = 0xA9
ALIGNMENT = 16  # what the kernels ask of every array
FENCE = 1 << 20  # bytes on either side that may not be accessed

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.mmap.restype = ctypes.c_void_p
_PRIVATE_ANONYMOUS = 0x22


class Arena:
    """A set of watched arrays; a context manager that checks and frees them."""

    def __init__(self) -> None:
        self._maps: list[tuple[int, int]] = []
        self._guards: list[np.ndarray] = []  # under AddressSanitizer the arrays themselves

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, kind: type | None, *rest: object) -> None:
        try:
            if kind is None:
                self.check()
        finally:
            self._guards.clear()
            for start, size in self._maps:
                _libc.munmap(start, size)
            self._maps.clear()

    def empty(self, shape: Sequence[int], dtype: str) -> np.ndarray:
        """Return an array filled with 0xFF bytes: NaN, or -1."""
        array = self._allocate(tuple(shape), DTYPES[dtype])
        array.view(np.uint8)[...] = 0xFF
        return array

    def array(self, values: Any) -> Any:
        """Return a C-contiguous copy of an array; None stays None."""
        if values is None:
            return None
        array = self._allocate(values.shape, values.dtype)
        array[...] = values
        return array

    def _allocate(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        if asan_active():
            # AddressSanitizer watches the neighbourhood of what comes from malloc.
            self._guards.append(np.empty(shape, dtype))
            return self._guards[-1]
        count = int(np.prod(shape, dtype=np.int64))
        nbytes = count * dtype.itemsize
        page = mmap.PAGESIZE
        used = -(-nbytes // ALIGNMENT) * ALIGNMENT
        body = max(-(-used // page), 1) * page
        total = body + 2 * FENCE
        outer = _libc.mmap(None, total, 0, _PRIVATE_ANONYMOUS, -1, 0)
        if outer in (None, ctypes.c_void_p(-1).value):
            raise MemoryError(f"mmap of {total} bytes failed")
        start = outer + FENCE
        _libc.mprotect(start, body, 3)
        self._maps.append((outer, total))
        buffer = np.frombuffer((ctypes.c_ubyte * body).from_address(start), np.uint8)
        buffer[...] = PATTERN
        first = body - used
        self._guards += [buffer[:first], buffer[first + nbytes :]]
        return np.ndarray(shape, dtype, buffer=buffer.data, offset=first)

    def check(self) -> None:
        """Raise AssertionError if a byte outside the arrays was written."""
        for guard in () if asan_active() else self._guards:
            wrong = np.flatnonzero(guard != PATTERN)
            assert wrong.size == 0, (
                f"{wrong.size} bytes beside an array of the kernel were written, the first "
                f"{guard.size - int(wrong[0])} bytes before the guard's end"
            )
