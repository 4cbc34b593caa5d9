"""Inputs for the expert layers of named models; the models themselves are in :mod:`cumoe.models`.

Logits follow a stated distribution over experts, tokens have unit variance. Host only: nothing here
times, and nothing imports CuPy.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cumoe.models import MODELS, ModelShape, Recipe, get_shape

__all__ = [
    "MODELS",
    "ModelShape",
    "Recipe",
    "get_shape",
    "make_bias",
    "make_hidden_states",
    "make_logits",
]


def make_logits(
    shape: ModelShape, num_tokens: int, *, skew: float | None = None, seed: int
) -> NDArray[np.float32]:
    """Draw router logits whose order picks experts with known probabilities.

    ``logits[t, e] = log(p[e]) + Gumbel noise``, so the top-k of a row is a draw of k experts
    without replacement, each with probability proportional to ``p``. With ``skew=None`` all
    experts are equal; otherwise ``p`` falls with rank as ``rank ** -skew`` (Zipf), ranks dealt to
    experts at random. Sigmoid methods see the same order; groups and a bias move it a little.

    Parameters
    ----------
    shape : ModelShape
    num_tokens : int
        0 or more.
    skew : float, optional
        Zipf exponent, positive; 1.2 gives one of 256 experts a quarter of all first choices.
    seed : int

    Returns
    -------
    numpy.ndarray, float32, shape (num_tokens, num_experts)
        The same for the same arguments.

    Raises
    ------
    ValueError
        If `num_tokens` is negative or `skew` is not positive and finite.

    Examples
    --------
    >>> make_logits(MODELS["mixtral_8x7b"], 3, skew=1.2, seed=0).shape
    (3, 8)
    """
    if num_tokens < 0:
        raise ValueError(f"num_tokens: expected >= 0, got {num_tokens}")
    rng = np.random.default_rng([seed, num_tokens, shape.num_experts])
    noise = rng.gumbel(size=(num_tokens, shape.num_experts))
    if skew is None:
        return noise.astype(np.float32)
    if not 0 < skew < np.inf:
        raise ValueError(f"skew: expected a positive number or None, got {skew}")
    rank = rng.permutation(shape.num_experts) + 1.0
    return (noise - skew * np.log(rank)).astype(np.float32)


def make_bias(shape: ModelShape, *, seed: int) -> NDArray[np.float32] | None:
    """Draw the router's selection bias, small enough to keep the load near uniform.

    Returns
    -------
    numpy.ndarray, float32, shape (num_experts,), or None if the model has none
    """
    if not shape.has_bias:
        return None
    rng = np.random.default_rng([seed, shape.num_experts])
    return (0.01 * rng.standard_normal(shape.num_experts)).astype(np.float32)


def make_hidden_states(shape: ModelShape, num_tokens: int, *, seed: int) -> NDArray[Any]:
    """Draw tokens of unit variance.

    Returns
    -------
    numpy.ndarray, bfloat16, shape (num_tokens, hidden_size)
    """
    rng = np.random.default_rng([seed, num_tokens, shape.hidden_size])
    values = rng.standard_normal((num_tokens, shape.hidden_size), dtype=np.float32)
    return values.astype(ml_dtypes.bfloat16)
