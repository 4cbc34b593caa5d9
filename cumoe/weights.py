"""Expert weights: w13, w2, their scales, the gate/up order and the memory layout.

Owns :class:`ExpertWeights`, which is checked once when it is built so that no op has to ask again,
and the ways to get one: from checkpoint matrices, quantised expert by expert; from FlashInfer's
layouts; as a shard of another. Payloads are never copied unless the method says so. Scales are in
natural half order whatever the row order, and each half of w13 has a grid of 128-row blocks, or a
scale, of its own.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import numpy as np

from cumoe.arrays import (
    DTYPES,
    FP8,
    address,
    dtype_name,
    empty,
    is_device,
    same_place,
)
from cumoe.checkpoint import (
    PAYLOAD_DTYPES,
    ROW_ALIGNMENT_BYTES,
    SCALE_BLOCK,
    W13Order,
    WeightRecipe,
    check_order,
    check_sizes,
    check_static,
    fill_from_experts,
    find_recipe,
    widen,
)
from cumoe.config import Array, ExpertShard, check_choice, check_int
from cumoe.layouts import (
    WEIGHT_LAYOUTS,
    WeightLayout,
    block_elems,
    convert_gate_up_scale,
    flashinfer_w13_indices,
    from_flashinfer_w2,
    gate_up_indices,
    half_slices,
    inverse,
    on_device_of,
    rearrange,
    slice_k,
    words,
)
from cumoe.weight_arrays import native_payloads, native_scales, scale_expert, slice_scales


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """The weights of the experts held here, in a form the kernels run.

    With ``bk`` the elements of 128 bytes and ``blocks(n) = ceil(n / 128)``:

    Parameters
    ----------
    w13 : array, bfloat16 or float8_e4m3fn, shape (num_experts, 2 * intermediate_size, hidden_size)
        Gate and up; half the rows without a gate. C-contiguous. In ``"block_major_k"``
        ``(num_experts, hidden_size / bk, 2 * intermediate_size, bk)``. An fp8 payload may be uint8.
    w2 : array, dtype of w13, shape (num_experts, hidden_size, intermediate_size)
        Down. C-contiguous. In ``"block_major_k"``
        ``(num_experts, intermediate_size / bk, hidden_size, bk)``.
    w13_scale : array, float32
        Shape ``(num_experts, 2 * blocks(intermediate_size), blocks(hidden_size))``; required with
        an fp8 payload, ``real = payload * scale``. The first half of its rows belongs to the half
        that `gate_up_order` names first, interleaved or not. ``"fp8_tensor"``: ``(num_experts, 2)``
        likewise, or ``(num_experts,)`` for gate and up alike.
    w2_scale : array, float32, shape (num_experts, blocks(hidden_size), blocks(intermediate_size))
        Required with an fp8 payload. ``"fp8_tensor"``: ``(num_experts,)``.
    gate_up_order : {"gate_up", "up_gate", "gate_up_interleaved", "up_gate_interleaved", "up"}
        Order of w13's rows; required, since no shape tells it. ``"up"``: there is no gate.
    layout : {"major_k", "block_major_k"}
    recipe : {"bf16", "fp8_block", "fp8_tensor"}, optional
        By default what the scales say.
    dtype : str, optional
        Tag of the payload, ``"bfloat16"`` or ``"float8_e4m3fn"``; by default what the recipe says.
    x_scale : float or array, float32, shape (1,), optional
        ``"fp8_tensor"``, and required there: what tokens are divided by, see :func:`calibrate`.
    act_scale : float or array, float32, shape (num_experts,) or (1,), optional
        Likewise what the activation's result is divided by.

    Raises
    ------
    ValueError, TypeError
        If arrays are missing, disagree in shape, dtype or device, or no kernel can read them.

    Notes
    -----
    Arrays of any library are taken over without a copy; the fields hold NumPy or CuPy arrays.
    A row of either matrix is a multiple of 16 bytes, since kernels load 16 bytes at a time.

    Examples
    --------
    >>> import ml_dtypes, numpy as np
    >>> w13 = np.zeros((4, 2 * 48, 64), ml_dtypes.bfloat16)
    >>> w2 = np.zeros((4, 64, 48), ml_dtypes.bfloat16)
    >>> weights = ExpertWeights(w13, w2, gate_up_order="gate_up")
    >>> weights.num_local_experts, weights.hidden_size, weights.intermediate_size, weights.recipe
    (4, 64, 48, 'bf16')
    """

    w13: Array
    w2: Array
    w13_scale: Array | None = None
    w2_scale: Array | None = None
    _: KW_ONLY
    gate_up_order: W13Order | None = None
    layout: WeightLayout = "major_k"
    recipe: WeightRecipe | None = None
    dtype: str | None = None
    x_scale: Array | float | None = None
    act_scale: Array | float | None = None

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        check_order(self.gate_up_order)
        check_choice("layout", self.layout, WEIGHT_LAYOUTS)
        scales = {"w13_scale": self.w13_scale, "w2_scale": self.w2_scale}
        static = {"x_scale": self.x_scale, "act_scale": self.act_scale}
        recipe = find_recipe(self.recipe, self.w13, scales, static)
        set_(self, "recipe", recipe)
        dtype = PAYLOAD_DTYPES[recipe]
        if self.dtype not in (None, dtype):
            raise ValueError(
                f"dtype: expected {dtype!r} with recipe {recipe!r}, got {self.dtype!r}"
            )
        set_(self, "dtype", dtype)
        for name, x in native_payloads(self, dtype).items():
            set_(self, name, x)
        for name, x in native_scales(self).items():
            set_(self, name, x)
        same_place(self._arrays())
        for name in ("w13", "w2"):
            x = getattr(self, name)
            if is_device(x) and x.size and address(x) % ROW_ALIGNMENT_BYTES:
                raise ValueError(
                    f"{name}: expected memory aligned to {ROW_ALIGNMENT_BYTES} bytes, got address "
                    f"{address(x):#x}; pass a copy"
                )

    def _arrays(self) -> dict[str, Array]:
        names = ("w13", "w2", "w13_scale", "w2_scale", "x_scale", "act_scale")
        return {name: x for name in names if (x := getattr(self, name)) is not None}

    def _of_experts(self) -> dict[str, Array]:
        """Return the arrays whose first axis is that of the experts."""
        return {name: x for name, x in self._arrays().items() if name != "x_scale"}

    @property
    def num_local_experts(self) -> int:
        """Experts held here, shared experts (the last ones) included."""
        return int(self.w13.shape[0])

    @property
    def hidden_size(self) -> int:
        """Width of the layer's input and output."""
        return int(self.w2.shape[self.w2.ndim - 2])

    @property
    def intermediate_size(self) -> int:
        """Rows of gate, and of up."""
        return int(self.w13.shape[self.w13.ndim - 2]) // self._sides

    @property
    def gated(self) -> bool:
        """Whether w13 holds gate rows beside the up rows."""
        return self.gate_up_order != "up"

    @property
    def _sides(self) -> int:
        return 2 if self.gated else 1

    @property
    def is_device(self) -> bool:
        """Whether the arrays are CuPy arrays."""
        return is_device(self.w13)

    @property
    def nbytes(self) -> int:
        """Bytes of payloads and scales."""
        return sum(int(x.nbytes) for x in self._arrays().values())

    def convert(
        self, *, layout: WeightLayout | None = None, gate_up_order: W13Order | None = None
    ) -> ExpertWeights:
        """Return the same weights in another layout or gate/up order.

        Arrays that need no change are shared with the result; the others are new, filled expert by
        expert. Device work is queued on the current stream.

        Raises
        ------
        ValueError
            If a choice is unknown, only one order has a gate, or a size is no multiple of the
            128-byte block of ``"block_major_k"``.
        """
        layout = self.layout if layout is None else layout
        check_choice("layout", layout, WEIGHT_LAYOUTS)
        check_sizes(self.hidden_size, self.intermediate_size, str(self.dtype), layout)
        source = check_order(self.gate_up_order)
        target = source if gate_up_order is None else check_order(gate_up_order)
        changes: dict[str, Any] = {"gate_up_order": target, "layout": layout}
        rows = None
        if target != source:
            if source == "up" or target == "up":
                raise ValueError(
                    f"gate_up_order: expected {source!r} or another order "
                    f"{'with' if self.gated else 'without'} a gate, got {target!r}"
                )
            rows = gate_up_indices(2 * self.intermediate_size, source, target)
            if self.w13_scale is not None and source[:2] != target[:2]:
                tensors = self.recipe == "fp8_tensor"
                scale = self.w13_scale[..., None] if tensors else self.w13_scale
                scale = convert_gate_up_scale(scale, source, target)
                changes["w13_scale"] = scale[..., 0] if tensors else scale
        if target != source or layout != self.layout:
            changes["w13"] = rearrange(self.w13, rows=rows, layout=layout, name="w13")
        if layout != self.layout:
            changes["w2"] = rearrange(self.w2, layout=layout, name="w2")
        return replace(self, **changes)

    def slice_experts(self, start: int, stop: int) -> ExpertWeights:
        """Return experts `start` to ``stop - 1`` as views.

        Raises
        ------
        ValueError
            Unless ``0 <= start <= stop <= num_local_experts``.
        """
        start = check_int("start", start, 0, self.num_local_experts)
        stop = check_int("stop", stop, start, self.num_local_experts)
        parts: dict[str, Any] = {n: x[start:stop] for n, x in self._of_experts().items()}
        return replace(self, **parts)

    def slice_intermediate(self, start: int, stop: int) -> ExpertWeights:
        """Return a copy of gate and up rows, and down columns, `start` to ``stop - 1``.

        Results of slices add up to the layer's, so this shares it out by tensor parallelism. With
        ``"fp8_block"`` both ends are multiples of 128 or the end of the size; in
        ``"block_major_k"`` multiples of the block.

        Raises
        ------
        ValueError
            If the ends do not fit, or the slice's rows are not a multiple of 16 bytes.
        """
        size, order = self.intermediate_size, check_order(self.gate_up_order)
        start = check_int("start", start, 0, size - 1)
        stop = check_int("stop", stop, start + 1, size)
        granule = SCALE_BLOCK if self.recipe == "fp8_block" else 1
        if self.layout == "block_major_k":
            granule = max(granule, block_elems(self.w2))
        for name, end in (("start", start), ("stop", stop)):
            if end % granule and end != size:
                raise ValueError(
                    f"{name}: expected a multiple of {granule} with recipe {self.recipe!r} and "
                    f"layout {self.layout!r}, got {end}"
                )
        check_sizes(self.hidden_size, stop - start, str(self.dtype), self.layout)
        sides = self._sides
        rows, old = np.empty(sides * (stop - start), np.int64), np.arange(sides * size)
        for to, of in zip(half_slices(order, stop - start), half_slices(order, size), strict=True):
            rows[to] = old[of][start:stop]
        changes: dict[str, Any] = {
            "w13": rearrange(self.w13, rows=rows, name="w13"),
            "w2": slice_k(self.w2, start, stop),
            **slice_scales(self, start, stop),
        }
        return replace(self, **changes)

    def shard(self, shard: ExpertShard, num_shared_experts: int = 0) -> ExpertWeights:
        """Return the experts of one rank: its routed experts, then all shared ones.

        Parameters
        ----------
        shard : ExpertShard
        num_shared_experts : int
            How many of the last experts here are shared ones. Without any the result is a view,
            else a copy.

        Raises
        ------
        ValueError, TypeError
            If the shard reaches past the routed experts, or is none.
        """
        if not isinstance(shard, ExpertShard):
            raise TypeError(f"shard: expected an ExpertShard, got {type(shard).__name__}")
        count = self.num_local_experts
        num_shared_experts = check_int("num_shared_experts", num_shared_experts, 0, count)
        routed = count - num_shared_experts
        start, stop = shard.expert_offset, shard.expert_offset + shard.num_local_experts
        if stop > routed:
            raise ValueError(
                f"shard: expected experts within the {routed} routed ones, got {start} to {stop}"
            )
        if num_shared_experts == 0:
            return self.slice_experts(start, stop)
        parts: dict[str, Any] = {}
        for name, x in self._of_experts().items():
            part = empty(x, (stop - start + num_shared_experts, *x.shape[1:]), dtype_name(x))
            with on_device_of(x):
                words(part)[: stop - start] = words(x)[start:stop]
                words(part)[stop - start :] = words(x)[routed:]
            parts[name] = part
        return replace(self, **parts)

    def to_device(self) -> ExpertWeights:
        """Return the weights on CuPy's current device; `self` if they are there already."""
        import cupy

        if self.is_device and self.w13.device.id == cupy.cuda.Device().id:
            return self
        parts: dict[str, Any] = {}
        for name, x in self._arrays().items():
            dtype = DTYPES["uint8"] if x.dtype == DTYPES[FP8] else x.dtype
            parts[name] = cupy.asarray(words(x)).view(dtype)
        return replace(self, **parts)

    def to_host(self) -> ExpertWeights:
        """Return the weights as NumPy arrays, waiting for the device; `self` if they are there."""
        if not self.is_device:
            return self
        parts: dict[str, Any] = {}
        for name, x in self._arrays().items():
            dtype = DTYPES[FP8] if x.dtype == np.uint8 else x.dtype
            parts[name] = words(x).get().view(dtype)
        return replace(self, **parts)

    def dequantize_expert(self, expert: int) -> tuple[Array | None, Array, Array]:
        """Return one expert's matrices as float32 in natural order.

        Returns
        -------
        gate, up : array, float32, shape (intermediate_size, hidden_size)
            `gate` is None where there is none.
        down : array, float32, shape (hidden_size, intermediate_size)
            Exact for bf16; ``payload * scale`` rounded once to float32 for fp8.

        Raises
        ------
        ValueError
            If there is no such expert.
        """
        expert = check_int("expert", expert, 0, self.num_local_experts - 1)
        size, order = self.intermediate_size, check_order(self.gate_up_order)
        with on_device_of(self.w13):
            w13, down = widen(self.w13[expert]), widen(self.w2[expert])
            gate, up = (w13[rows].copy() for rows in half_slices(order, size))
            if self.w13_scale is not None:
                scale_expert(self, expert, order, gate, up, down)
        return gate if self.gated else None, up, down

    @classmethod
    def from_experts(
        cls,
        gate: Any,
        up: Any,
        down: Any,
        *,
        recipe: WeightRecipe = "fp8_block",
        gate_up_order: W13Order = "gate_up",
        layout: WeightLayout = "major_k",
        num_experts: int | None = None,
        x_scale: Any = None,
        act_scale: Any = None,
    ) -> ExpertWeights:
        """Build weights from each expert's matrices, quantising them one at a time.

        Parameters
        ----------
        gate, up : array or iterable of arrays, bfloat16, float16 or float32
            Stacked ``(num_experts, intermediate_size, hidden_size)``, or one
            ``(intermediate_size, hidden_size)`` matrix per expert, shared experts last. `gate` is
            None with order ``"up"``.
        down : array or iterable of arrays
            ``(num_experts, hidden_size, intermediate_size)``, or one
            ``(hidden_size, intermediate_size)`` matrix per expert.
        recipe : {"fp8_block", "bf16", "fp8_tensor"}
        gate_up_order, layout : str
            How the result is stored; all choices hold the same numbers.
        num_experts : int, optional
            Required if `gate`, `up` and `down` are iterators without a length.
        x_scale, act_scale : float or array
            ``"fp8_tensor"`` only, as in :class:`ExpertWeights`.

        Returns
        -------
        ExpertWeights
            In the library and on the device of the matrices.

        Raises
        ------
        ValueError, TypeError
            If counts, shapes, dtypes or devices disagree, or no kernel can read the result.

        Notes
        -----
        The result is allocated once and filled in the order gate, up, down of each expert, so an
        iterator that loads matrices lazily keeps one of them in memory. ``"fp8_block"`` rounds as
        :func:`cumoe.quantize_fp8_block_weights`, ``"fp8_tensor"`` each matrix as
        :func:`cumoe.quantize_fp8_tensor`; ``"bf16"`` to nearest even.
        """
        static = {"x_scale": x_scale, "act_scale": act_scale}
        check_static(recipe, static)
        arrays = fill_from_experts(
            gate,
            up,
            down,
            recipe=recipe,
            gate_up_order=gate_up_order,
            layout=layout,
            num_experts=num_experts,
        )
        return cls(**arrays, **static, gate_up_order=gate_up_order, layout=layout, recipe=recipe)

    @classmethod
    def from_flashinfer(
        cls,
        w13: Any,
        w2: Any,
        w13_scale: Any = None,
        w2_scale: Any = None,
        *,
        shuffled: bool,
        layout: WeightLayout = "major_k",
        interleaved: bool | None = None,
        x_scale: Any = None,
        act_scale: Any = None,
    ) -> ExpertWeights:
        """Take over weights prepared for FlashInfer's kernels, undoing their row permutation.

        Parameters
        ----------
        w13, w2, w13_scale, w2_scale : array
            FlashInfer's ``gemm1_weights``, ``gemm2_weights`` and their scales: up first, bf16, or
            fp8 with 128 x 128 scales; with `x_scale` and `act_scale` fp8 with those of tensors.
        shuffled : bool
            FlashInfer's ``use_shuffled_weight`` (its default: True for bf16, False for fp8).
        layout : {"major_k", "block_major_k"}
            FlashInfer's ``weight_layout`` (MajorK by default for fp8, BlockMajorK for bf16).
        interleaved : bool, optional
            Whether up and gate rows alternate; by default as the recipe's kernels want, that is
            not with 128 x 128 scales.
        x_scale, act_scale : float or array, optional
            As in :class:`ExpertWeights`. FlashInfer's ``output1_scales_gate_scalar`` is
            ``x_scale`` times the gate's scale, ``output1_scales_scalar`` that of up over
            ``act_scale``, ``output2_scales_scalar`` ``act_scale * w2_scale``.

        Returns
        -------
        ExpertWeights
            In the same layout and gate/up order ``"up_gate"``. What needs no change is not copied.

        Raises
        ------
        ValueError, TypeError
            As :class:`ExpertWeights`; or if an fp8 intermediate size is no multiple of 128, or the
            rows fit no shuffle block.
        """
        scales: dict[str, Any] = {"x_scale": x_scale, "act_scale": act_scale}
        raw = cls(w13, w2, w13_scale, w2_scale, gate_up_order="up_gate", layout=layout, **scales)
        recipe, size = str(raw.recipe), raw.intermediate_size
        if recipe == "fp8_block" and size % SCALE_BLOCK:
            raise ValueError(
                f"intermediate_size: expected a multiple of {SCALE_BLOCK}, as FlashInfer's scale "
                f"grid needs, got {size}"
            )
        rows = flashinfer_w13_indices(
            2 * size, recipe, "up_gate", shuffled=shuffled, interleaved=interleaved
        )
        changes: dict[str, Any] = {}
        if not np.array_equal(rows, np.arange(2 * size)):
            changes["w13"] = rearrange(raw.w13, rows=inverse(rows), name="w13")
        if shuffled:
            changes["w2"] = from_flashinfer_w2(raw.w2, recipe)
        return replace(raw, **changes)
