"""Activations of the user's own: a CUDA expression and its NumPy twin, held against each other."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from cumoe import kernels, kernels_activation
from cumoe.config import Activation, Array
from cumoe.formulas import ACTIVATIONS, PARAMETERS, ActivationFormula
from cumoe.launch import CompileError, LaunchError, compile_cubin, get_device
from cumoe.reference import activation as reference

ARCH = "sm_80"  # whose compile shows mistakes where there is no device
MAX_ERROR = 1e-4  # of the larger of a value and the sample's root mean square
SAMPLE_PARAMETERS = {"alpha": 1.25, "beta": 0.75, "limit": 3.0}

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_checked: set[tuple[ActivationFormula, int]] = set()


def custom_activation(
    name: str,
    *,
    cuda: str,
    numpy: Callable[..., Any],
    gated: bool = True,
    alpha: Array | float | None = None,
    beta: Array | float | None = None,
    limit: Array | float | None = None,
) -> Activation:
    """Make an activation from a CUDA expression, compiled into the kernels, and its NumPy twin.

    Parameters
    ----------
    name : str
        A name for messages; none of the built-in ones.
    cuda : str
        C++ expression of type float in the floats ``gate`` and ``up``, or ``x`` without a gate, and
        the parameters ``alpha``, ``beta`` and ``limit``. It may call CUDA's math functions and
        those of ``cu/activation.cuh``: ``sigmoid``, ``silu``, ``gelu``, ``gelu_tanh``.
    numpy : callable
        The same of float32 arrays of one shape and float32 parameters. The names of its arguments
        say which of the above it takes; it runs on the host and is what the kernels are held to.
    gated : bool
        Whether there is a gate. Without one, weights have ``gate_up_order="up"``.
    alpha, beta, limit : float or array, optional
        As in :class:`Activation`, for the parameters that the expression uses; 1, 0 and infinity by
        default. ``dataclasses.replace`` gives an activation other values.

    Returns
    -------
    Activation
        For ``activation=`` of every op and layer.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong, the twin and the expression take different parameters, the twin
        fails on a sample, or the expression does not compile; the message holds the compiler's.

    Notes
    -----
    Compiled at once where NVRTC is installed, with or without a GPU. When first used on a device,
    kernel and twin are compared on a sample with zeros, infinities and NaN; a difference raises
    ValueError.

    Examples
    --------
    >>> import numpy as np
    >>> reglu = custom_activation(
    ...     "reglu", cuda="fmaxf(gate, 0.0f) * up", numpy=lambda gate, up: np.fmax(gate, 0) * up
    ... )
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name: expected an identifier, got {name!r}")
    if name in ACTIVATIONS:
        raise ValueError(f"name: expected none of the built-in {list(ACTIVATIONS)}, got {name!r}")
    if not isinstance(gated, bool):
        raise TypeError(f"gated: expected a bool, got {type(gated).__name__}")
    if not isinstance(cuda, str):
        raise TypeError(f"cuda: expected a C++ expression, got {type(cuda).__name__}")
    expression = " ".join(_COMMENT.sub(" ", cuda).split())
    if not expression:
        raise ValueError("cuda: expected a C++ expression, got nothing")
    if not callable(numpy):
        raise TypeError(f"numpy: expected a callable, got {type(numpy).__name__}")
    used = _check_names(expression, numpy, gated)
    defaults = tuple((p, default) for p, default in PARAMETERS.items() if p in used)
    formula = ActivationFormula(f"({expression})", gated, defaults, numpy)
    activation = Activation(name, alpha, beta, limit, formula)
    with np.errstate(all="ignore"):
        reference.apply(*_sample(formula), _with_sample_parameters(activation))
    try:
        compile_cubin(_spec(activation), ARCH)
    except CompileError as error:
        raise ValueError(f"cuda: {expression!r} does not compile:\n{error.log}") from error
    except LaunchError:
        pass  # no NVRTC here, so no kernel either
    return activation


def check_twin(activation: Activation, like: Array) -> None:
    """Compare a user's activation with its twin on the device of `like`, once for each device.

    Raises
    ------
    ValueError
        If they differ, or the expression does not compile there.
    """
    formula, ordinal = activation.definition, int(like.device.id)
    if formula.numpy is None or (formula, ordinal) in _checked:
        return
    import cupy

    gate, up = _sample(formula)
    host = up if gate is None else np.concatenate([gate, up], axis=1)
    sample = _with_sample_parameters(activation)
    with cupy.cuda.Device(ordinal):
        x, y = cupy.asarray(host), cupy.empty(up.shape, np.float32)
        item = kernels_activation.activation(
            x,
            None,
            y,
            None,
            gate_up_order="gate_up" if formula.gated else None,
            activation=sample,
            permutation=None,
            num_sms=get_device(ordinal).num_sms,
        )
        try:
            kernels.run([item], x)
        except CompileError as error:
            raise ValueError(
                f"activation: {formula.cuda} does not compile:\n{error.log}"
            ) from error
        got = y.get()
    compare(sample, gate, up, got)
    _checked.add((formula, ordinal))


def compare(activation: Activation, gate: Array | None, up: Array, got: Array) -> None:
    """Raise ValueError unless a kernel's values are those of the twin, NaN and infinity included.

    Parameters
    ----------
    gate, up : numpy.ndarray, float32, one shape
        What the kernel was given; `gate` is None without a gate.
    got : numpy.ndarray, float32, the same shape
    """
    want = reference.apply(gate, up, activation)
    finite = np.isfinite(want)
    usual = np.zeros_like(finite)
    usual[: len(usual) // 2] = True  # the normal half of the sample
    rms = np.sqrt(np.mean(np.square(want[finite & usual], dtype=np.float64)))
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(got.astype(np.float64) - want)
        near = error <= MAX_ERROR * np.maximum(np.abs(want, dtype=np.float64), rms)
    same = np.where(finite, near, (got == want) | np.isnan(got) & np.isnan(want))
    if same.all():
        return
    at = tuple(np.argwhere(~same)[0])
    inputs = f"x = {up[at]}" if gate is None else f"gate = {gate[at]}, up = {up[at]}"
    for name, _ in activation.definition.defaults:
        inputs += f", {name} = {activation.value(name)}"
    raise ValueError(
        f"activation: the kernel and the twin of {activation.name!r} differ at {(~same).sum()} of "
        f"{same.size} values: {inputs} gives {got[at]} by {activation.definition.cuda} and "
        f"{want[at]} by NumPy"
    )


def _check_names(expression: str, twin: Callable[..., Any], gated: bool) -> set[str]:
    """Return the parameters in use once expression and twin take the same names."""
    inputs = {"gate", "up"} if gated else {"x"}
    try:
        taken = set(inspect.signature(twin).parameters)
    except ValueError as error:  # of some functions written in C
        raise ValueError(f"numpy: expected a function with named arguments: {error}") from error
    allowed = inputs | set(PARAMETERS)
    if taken - allowed:
        raise ValueError(
            f"numpy: expected arguments among {sorted(allowed)}, got {sorted(taken - allowed)}"
        )
    words = set(re.findall(r"[A-Za-z_]\w*", expression))
    strange = words & ({"gate", "up", "x"} - inputs)
    if strange:
        raise ValueError(
            f"cuda: expected {' and '.join(sorted(inputs))} with gated={gated}, got "
            f"{' and '.join(sorted(strange))}"
        )
    used = words & set(PARAMETERS)
    if used != taken & set(PARAMETERS):
        raise ValueError(
            f"numpy: expected the parameters of the expression, {sorted(used)}, got "
            f"{sorted(taken & set(PARAMETERS))}"
        )
    return used


def _with_sample_parameters(activation: Activation) -> Activation:
    """Return the same formula with single values of its parameters."""
    names = dict(activation.definition.defaults)
    values = {name: value for name, value in SAMPLE_PARAMETERS.items() if name in names}
    return Activation(activation.name, **values, formula=activation.definition)


def _sample(formula: ActivationFormula) -> tuple[Array | None, Array]:
    """Return gate and up of shape (64, 128): half normal, half pairs of special values."""
    rng = np.random.default_rng(0)
    gate, up = rng.standard_normal((2, 64, 128)).astype(np.float32) * np.float32(3)
    special = np.array([0, 1, 20, 100, 1e-30, 1e15, 1e30, np.inf], np.float32)
    special = np.concatenate([special, -special, [np.nan, 0.5, -0.5, 3]]).astype(np.float32)
    count = special.size
    pairs = np.arange(32 * 128)
    gate[32:] = special[pairs % count].reshape(32, 128)
    up[32:] = special[pairs // count % count].reshape(32, 128)
    return (gate if formula.gated else None), up


def _spec(activation: Activation) -> kernels.KernelSpec:
    return kernels_activation.activation_spec(
        "float32",
        "float32",
        activation,
        gate_up_order="gate_up" if activation.gated else None,
        rows=1,
    )
