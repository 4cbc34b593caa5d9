"""The other implementations of the expert GEMMs, on the arrays that cumoe reads.

Owns the way of an array to torch and back, torch's grouped GEMM, cuBLAS (dense), and the Triton
kernel with the choice of its configuration. A peer is a guest: one that is not installed or fails
is left out by the caller. torch and Triton are imported on use. On NumPy arrays the same code runs
on torch's CPU and in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.harness import measure
from bench.inputs import random_bf16
from bench.peer_triton import block_slots, candidates, make_launch
from bench.shapes import Recipe
from cumoe import Quantized, quantize_fp8_block
from cumoe.arrays import is_device
from cumoe.config import Array

PEERS = ("torch", "triton", "dense")
PEER_LIMIT = 0.01
"""Largest relative RMS error over an expert's rows of a peer whose time is worth keeping."""

FP8_SUM_LIMIT = 0.05
"""The same for sums over a long k that stay in the fp8 tensor cores, which keep few bits of them.
"""

Run = Callable[[int], object]


@dataclass(frozen=True, eq=False)
class Operands:
    """One expert GEMM, ``y[s] = a[s // slots_per_row] @ w[expert of s].T`` for every slot s.

    Attributes
    ----------
    name : str
        ``"gemm1"`` or ``"gemm2"``.
    ids : numpy.ndarray, int32, shape (num_tokens, top_k)
        Expert of each slot.
    a : array, bfloat16, shape (num_slots / slots_per_row, k), or Quantized
    w : array, bfloat16, shape (num_experts, n, k), or Quantized with blocks of 128 x 128
    slots_per_row : int
    """

    name: str
    ids: np.ndarray
    a: Array | Quantized
    w: Array | Quantized
    slots_per_row: int

    @property
    def recipe(self) -> Recipe:
        """What the operands hold."""
        return "fp8_block" if isinstance(self.a, Quantized) else "bf16"

    @property
    def payloads(self) -> tuple[Array, Array]:
        """a and w without scales."""
        a, w = self.a, self.w
        return (
            a.values if isinstance(a, Quantized) else a,
            w.values if isinstance(w, Quantized) else w,
        )

    @property
    def num_experts(self) -> int:
        """Experts of w."""
        return int(self.payloads[1].shape[0])


@dataclass(frozen=True, eq=False)
class Peer:
    """A peer's product, ready to run.

    Attributes
    ----------
    name : str
    run : callable
        Queues the product on CuPy's current stream and returns the rows, a torch tensor.
    place : numpy.ndarray, int64, shape (num_slots,)
        Row of each slot in what `run` returns.
    config : str or None
        What was chosen, where there is a choice.
    """

    name: str
    run: Callable[[int], Any]
    place: np.ndarray
    config: str | None = None


@contextlib.contextmanager
def guest(name: str) -> Iterator[None]:
    """Let a peer fail: what is wrong is printed, and the run goes on without it."""
    try:
        yield
    except Exception as error:
        print(f"without {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def as_torch(x: Array | None) -> Any:
    """Return an array as a torch tensor that shares its memory; bytes are e4m3."""
    import torch

    if x is None:
        return None
    view = {1: np.uint8, 2: np.int16, 4: x.dtype}[x.dtype.itemsize]
    words = x.view(view)
    tensor = torch.from_dlpack(words) if is_device(x) else torch.from_numpy(words)
    kinds = {1: torch.float8_e4m3fn, 2: torch.bfloat16}
    return tensor.view(kinds[x.dtype.itemsize]) if x.dtype.itemsize in kinds else tensor


def as_float32(xp: Any, tensor: Any) -> Array:
    """Return a tensor's values as a float32 array of `xp`, waiting for the device."""
    if xp is np:
        return tensor.float().contiguous().numpy()
    import torch

    torch.cuda.synchronize()  # it may come from any stream
    wide = tensor.float().contiguous()
    torch.cuda.synchronize()
    return xp.from_dlpack(wide)


@contextlib.contextmanager
def torch_stream() -> Iterator[None]:
    """Let torch queue on CuPy's current stream, where there is a GPU."""
    import torch

    if not torch.cuda.is_available():
        yield
        return
    import cupy

    pointer = cupy.cuda.get_current_stream().ptr
    if pointer == 0:  # the default stream of both
        yield
        return
    with torch.cuda.stream(torch.cuda.ExternalStream(pointer)):
        yield


def free_torch() -> None:
    """Give back what torch keeps for reuse; each timing has a stream, and a pool, of its own."""
    with contextlib.suppress(ImportError):
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _on_stream(product: Callable[[], Any]) -> Callable[[int], Any]:
    def run(i: int) -> Any:
        with torch_stream():
            return product()

    return run


def take_rows(x: Array, index: np.ndarray) -> Array:
    """Return rows of an array; through the bits, since not every library takes bfloat16 rows."""
    like = np.uint16 if x.dtype.itemsize == 2 else np.uint8 if x.dtype.itemsize == 1 else x.dtype
    where: Any = index
    if is_device(x):
        import cupy

        where = cupy.asarray(index)
    return x.view(like).take(where, axis=0).view(x.dtype)


def _sorted_rows(operands: Operands) -> tuple[Array, np.ndarray, np.ndarray]:
    """Return a's rows in the order of experts, the row of each slot in it, and rows per expert."""
    flat = operands.ids.ravel()
    order = np.argsort(flat, kind="stable")
    place = np.empty(flat.size, np.int64)
    place[order] = np.arange(flat.size)
    rows = take_rows(operands.payloads[0], order // operands.slots_per_row)
    return rows, place, np.bincount(flat, minlength=operands.num_experts)


def torch_grouped_mm(operands: Operands) -> Peer:
    """Return torch's grouped GEMM: rows gathered beforehand, sorted by expert, without padding.

    Raises
    ------
    ValueError
        If the operands are not bfloat16.
    """
    import torch

    if operands.recipe != "bf16":
        raise ValueError(f"recipe: expected 'bf16', got {operands.recipe!r}")
    rows, place, counts = _sorted_rows(operands)
    a, w = as_torch(rows), as_torch(operands.payloads[1]).transpose(-2, -1)
    offsets = torch.from_numpy(np.cumsum(counts).astype(np.int32)).to(a.device)
    product = _on_stream(lambda: torch._grouped_mm(a, w, offs=offsets))
    return Peer("torch_grouped_mm", product, place)


def cublas_dense(operands: Operands) -> Callable[[int], Any]:
    """Return cuBLAS' product of as many rows with one expert's matrix: the same FLOPs, bfloat16.

    No peer, since it is not the same product: a roof.
    """
    import torch

    rows, _, counts = _sorted_rows(operands)
    a = as_torch(rows)
    w = as_torch(operands.payloads[1])[int(np.argmax(counts))]
    out = torch.empty(a.shape[0], w.shape[0], dtype=torch.bfloat16, device=a.device)
    return _on_stream(lambda: torch.matmul(a, w.t(), out=out))


def triton_moe(operands: Operands, *, on_device: bool, repeats: int = 3) -> Peer:
    """Return the Triton kernel with the fastest of its configurations for these operands.

    Parameters
    ----------
    operands : Operands
    on_device : bool
        Whether there is anything to choose by; else the first configuration is taken.
    repeats : int
        Samples of each configuration, after a call that compiles it.

    Raises
    ------
    RuntimeError
        If no configuration runs.
    """
    if not on_device:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    import torch

    a, w = map(as_torch, operands.payloads)
    if not on_device and operands.recipe == "bf16":
        a, w = a.float(), w.float()  # Triton's interpreter cannot multiply bfloat16
    scales = [
        as_torch(x.scale) if isinstance(x, Quantized) else None for x in (operands.a, operands.w)
    ]
    num_slots, (n, k) = operands.ids.size, w.shape[1:]
    out = torch.full((num_slots, n), float("nan"), dtype=torch.bfloat16, device=a.device)
    counts = np.bincount(operands.ids.ravel(), minlength=operands.num_experts)
    tables: dict[int, list[Any]] = {}
    launches: dict[str, Callable[[int], Any]] = {}
    failed = []
    for config in candidates(operands.recipe, n, k, counts):
        if config.block_m not in tables:
            found = block_slots(operands.ids, operands.num_experts, config.block_m)
            tables[config.block_m] = [torch.from_numpy(t).to(a.device) for t in found]
        run = _on_stream(
            make_launch(
                config,
                (a, w, *scales),
                out,
                tables[config.block_m],
                num_slots=num_slots,
                slots_per_row=operands.slots_per_row,
            )  # fmt: skip
        )
        try:
            run(0)
        except Exception as error:  # such as more registers or shared memory than there are
            failed.append(f"{config}: {error}")
            continue
        launches[str(config)] = run
        if not on_device:
            break
    if not launches:
        raise RuntimeError(f"no Triton configuration runs: {failed}")
    best = next(iter(launches))
    if len(launches) > 1:
        timings = measure(launches, repeats=repeats, warmup_s=0.0, clock="device")
        best = min(timings, key=lambda name: timings[name].us)

    def product(i: int) -> Any:
        launches[best](i)
        return out

    return Peer("triton_moe", product, np.arange(num_slots), best)


def check_rows(name: str, got: Array, want: Array, limit: float = PEER_LIMIT) -> float:
    """Return the relative RMS error of rows.

    Raises
    ------
    ArithmeticError
        If it is not below `limit`.
    """
    error = float(((got - want) ** 2).mean() ** 0.5 / max(float((want**2).mean() ** 0.5), 1e-30))
    if not error < limit:
        raise ArithmeticError(f"{name} is wrong by {error:.2e}")
    return error


def peer_rows(xp: Any, peer: Peer, result: Any, slots: np.ndarray) -> Array:
    """Return slots' rows of what a peer's run returned, as float32."""
    import torch

    index = torch.from_numpy(peer.place[slots]).to(result.device)
    return as_float32(xp, result[index])


def cublas_rows(xp: Any, rows: Array, matrix: Array) -> Array:
    """Return ``rows @ matrix.T`` of bfloat16 operands by cuBLAS, rounded to bfloat16, as float32.

    Reductions stay in float32: with torch's default, a product whose k is split over blocks may
    round partial sums to bfloat16, and an error relative to cuBLAS' would be flattered.
    """
    import torch

    backend = torch.backends.cuda.matmul
    allowed = backend.allow_bf16_reduced_precision_reduction
    backend.allow_bf16_reduced_precision_reduction = False
    try:
        return as_float32(xp, torch.matmul(as_torch(rows), as_torch(matrix).t()))
    finally:
        backend.allow_bf16_reduced_precision_reduction = allowed


def dense_products(xp: Any, size: int) -> dict[str, Callable[[int], Any]]:
    """Return cuBLAS' square products of random operands: the roofs of the tensor cores.

    Returns
    -------
    dict of str to callable
        ``"bf16"``; ``"fp8_fast"`` and ``"fp8_slow"``: e4m3 with one scale per tensor, with and
        without fast accumulation. Each gives ``a @ b.T`` in bfloat16.
    """
    import torch

    a, b = (random_bf16(xp, (size, size), 7, number) for number in (0, 1))
    qa, qb = (as_torch(quantize_fp8_block(x).values) for x in (a, b))
    ta, tb = as_torch(a), as_torch(b)
    scale = torch.full((), 2.0**-8, device=ta.device)

    def fp8(fast: bool) -> Callable[[int], Any]:
        return _on_stream(
            lambda: torch._scaled_mm(
                qa,
                qb.t(),
                scale_a=scale,
                scale_b=scale,
                out_dtype=torch.bfloat16,
                use_fast_accum=fast,
            )  # fmt: skip
        )

    products = {"bf16": _on_stream(lambda: torch.matmul(ta, tb.t()))}
    products |= {"fp8_fast": fp8(True), "fp8_slow": fp8(False)}
    wants = {"bf16": (ta, tb, 1.0), "fp8_fast": (qa, qb, 2.0**-16), "fp8_slow": (qa, qb, 2.0**-16)}
    for name, product in products.items():
        left, right, factor = wants[name]
        got = as_float32(xp, product(0)[:64])
        want = as_float32(xp, left[:64]) @ as_float32(xp, right).T * np.float32(factor)
        check_rows(f"cuBLAS {name}", got, want, PEER_LIMIT if name == "bf16" else FP8_SUM_LIMIT)
    return products
