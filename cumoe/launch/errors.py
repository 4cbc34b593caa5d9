"""Errors of the compile, load and launch layer, and the check of CUDA result tuples.

Owns the exception types and the two places where the outside world is turned into them: a missing
package (:func:`require`) and a CUDA status code (:func:`check`). Importing this module loads
nothing.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

__all__ = ["CompileError", "LaunchError", "check", "require"]


class LaunchError(RuntimeError):
    """A CUDA call failed, or the packages that would make it are not installed."""


class CompileError(RuntimeError):
    """NVRTC rejected a kernel.

    Attributes
    ----------
    path : str
        Real path of the ``.cu`` file.
    options : tuple of str
        The exact options NVRTC was given.
    log : str
        What the compiler said, with file and line.
    """

    def __init__(self, path: str, options: Sequence[str], log: str) -> None:
        self.path = str(path)
        self.options = tuple(options)
        self.log = log
        super().__init__(f"{self.path}\noptions: {' '.join(self.options)}\n{log.rstrip()}")

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is pickled as cls(*args); args holds the message only. Worker processes send
        # these.
        return (type(self), (self.path, self.options, self.log))


def check(result: tuple[Any, ...], call: str = "") -> Any:
    """Return the values of a ``cuda.bindings`` result tuple.

    Parameters
    ----------
    result : tuple
        ``(status, *values)`` as every ``cuda.bindings`` function returns it.
    call : str, optional
        Name of the call, put into the message.

    Returns
    -------
    None, the one value, or the tuple of values

    Raises
    ------
    LaunchError
        If the status is not success; the message names the CUDA error.
    """
    status, values = result[0], result[1:]
    if status:
        prefix = f"{call}: " if call else ""
        raise LaunchError(f"{prefix}{getattr(status, 'name', 'error')} ({int(status)})")
    if not values:
        return None
    return values[0] if len(values) == 1 else values


@functools.cache
def require(module: str) -> Any:
    """Import a CUDA package on first use.

    Parameters
    ----------
    module : str
        ``"cupy"`` or a submodule of ``cuda.bindings``.

    Returns
    -------
    module

    Raises
    ------
    LaunchError
        If it is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise LaunchError(
            f"{module} cannot be imported ({error}); install cumoe[cu12] or cumoe[cu13], "
            "whichever matches the driver"
        ) from error
