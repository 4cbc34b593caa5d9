"""What each activation computes, as the CUDA expression that its kernels are compiled with.

Imports nothing of cumoe; :class:`cumoe.config.Activation` is built on top. The functions that the
expressions call are in ``cu/activation.cuh``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ActivationFormula:
    """What an activation computes, as CUDA and, where it is a user's, as NumPy.

    Parameters
    ----------
    cuda : str
        Expression in ``gate`` and ``up``, or in ``x`` without a gate, and in the parameters.
    gated : bool
        Two values in, rows of gate and of up in w13; otherwise one value, rows of up alone.
    defaults : tuple of (str, float)
        The parameters it takes, among ``alpha``, ``beta`` and ``limit``, with their defaults.
    numpy : callable, optional
        The twin of a user's activation; see :func:`cumoe.custom_activation`.
    plain : str, optional
        A shorter expression with the same values when no parameter is given.
    """

    cuda: str
    gated: bool = True
    defaults: tuple[tuple[str, float], ...] = ()
    numpy: Callable[..., Any] | None = None
    plain: str | None = None


PARAMETERS: dict[str, float] = {"alpha": 1.0, "beta": 0.0, "limit": math.inf}
"""Parameters of activations with the value of one that is not given."""

ACTIVATIONS: dict[str, ActivationFormula] = {
    "swiglu": ActivationFormula(
        "swiglu(gate, up, alpha, beta, limit)",
        defaults=tuple(PARAMETERS.items()),
        plain="silu(gate) * up",
    ),
    "geglu": ActivationFormula("gelu(gate) * up"),
    "geglu_tanh": ActivationFormula("gelu_tanh(gate) * up"),
    "situ": ActivationFormula(
        "situ(gate, up, alpha, beta, limit)", defaults=(*(PARAMETERS | {"beta": 1.0}).items(),)
    ),
    "relu2": ActivationFormula("relu2(x)", gated=False),
    "silu": ActivationFormula("silu(x)", gated=False),
    "identity": ActivationFormula("x", gated=False),
}
"""The built-in activations; their twins are in ``reference/activation.py``."""
