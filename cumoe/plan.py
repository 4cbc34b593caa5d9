"""A layer call planned on a device: its buffers, its launches, and what changes from call to call.

A :class:`DevicePlan` belongs to one number of tokens and one kind of input. Running it writes the
new addresses into the parameter structs and queues the launches: no allocation, no synchronisation,
no compile once its kernels are loaded. Knows nothing of validation, which is done above.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cumoe import kernels, kernels_quantize
from cumoe.arrays import DTYPES, FP8, address, dtype_name
from cumoe.config import Activation, Array, ExpertParts
from cumoe.grouped_gemm import gemm_spec, plan_gemm
from cumoe.kernels_routing import Experts, Source, cluster_size
from cumoe.launch import KernelSpec, get_device, smem_limit
from cumoe.layer_call import LayerCall, LayerSpec, gemm_configs
from cumoe.permutation import plan_permutation
from cumoe.tuning import (
    GroupedGemmConfig,
    Sm90Config,
)
from cumoe.weights import ExpertWeights


class Workspace:
    """Named device buffers that grow until they are frozen and are reused by every plan."""

    def __init__(self, like: Array) -> None:
        self._ordinal = int(like.device.id)
        self._buffers: dict[str, Any] = {}
        self.frozen = False

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(int(b.nbytes) for b in self._buffers.values())

    def take(self, name: str, shape: Sequence[int], dtype: str, *, zeros: bool = False) -> Array:
        """Return the buffer of `name` as an array; contents are undefined, or zeros at first."""
        import cupy

        want = DTYPES["uint8"] if dtype == FP8 else DTYPES[dtype]
        nbytes = int(np.prod(shape, dtype=np.int64)) * want.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < nbytes:
            if self.frozen:
                raise RuntimeError(f"workspace: {name} needs {nbytes} bytes, more than planned")
            with cupy.cuda.Device(self._ordinal):
                make = cupy.zeros if zeros else cupy.empty
                buffer = self._buffers[name] = make(max(nbytes, 16), np.uint8)
        return cupy.ndarray(tuple(shape), dtype=want, memptr=buffer.data)


class Rows(NamedTuple):
    """What a GEMM reads or writes: values, and their scales if they are fp8."""

    values: Array
    scale: Array | None


class DevicePlan:
    """The launches of one layer call, stage by stage.

    Attributes
    ----------
    stages : dict of str to list of Launch
        In order: routing (with the permutation), quantize, gemm1, gemm2, finalize; absent ones have
        nothing to do. With many tokens gemm1 begins with the launch that puts them in expert order:
        their quantisation, or else a copy.
    parts : ExpertParts
        Rows, weights and row indices before the sum; buffers of the workspace or the call's own
        arrays.
    """

    def __init__(self, spec: LayerSpec, call: LayerCall, workspace: Workspace) -> None:
        self._spec = spec
        self._device = get_device(int(call.x.device.id))
        self._bound: list[tuple[str, kernels.Launch, str]] = []
        self.configs: dict[str, GroupedGemmConfig | Sm90Config] = {}
        self.stages: dict[str, list[kernels.Launch]] = {}
        source = self._source(call, workspace)
        columns = source.columns
        self.tile = spec.select_tile(call.num_tokens, columns, self._device.arch)
        experts = Experts(spec.num_experts, spec.num_shared, spec.shard)
        self.permutation, launches = plan_permutation(
            source, experts, self.tile, cluster_size(self._device), workspace.take
        )
        self.stages["routing"] = launches
        self._bind_source(source, launches)
        own_weights = source.weights is None
        topk_weights = call.topk_weights if own_weights else source.weights
        rows = self._plan_experts(call, topk_weights, workspace)
        if spec.weights_on_input:
            self.parts = ExpertParts(rows, None, self.permutation.permuted_idx)
            if own_weights and "gemm1" in self.stages:
                self._bind("topk_weights", self._gemm1, "token_weights")
        else:
            self.parts = ExpertParts(rows, topk_weights, self.permutation.permuted_idx)
        self._own_weights = own_weights and not spec.weights_on_input
        assert columns == self.permutation.permuted_idx.shape[1]
        if call.out is not None:
            item = kernels.finalize(*self.parts, call.out)
            self._bind("out", item, "out")
            if self._own_weights:
                self._bind("topk_weights", item, "weights")
            self.stages["finalize"] = [item]

    def _bind(self, name: str, item: kernels.Launch, field: str) -> None:
        """Let `field` follow the call's array `name`."""
        self._bound.append((name, item, field))

    def _source(self, call: LayerCall, workspace: Workspace) -> Source:
        """Return where the call's ids and weights come from, and the buffers they need."""
        spec = self._spec

        def take(top_k: int, dtype: str) -> tuple[Array, Array]:
            shape = (call.num_tokens, top_k + spec.num_shared)
            ids = workspace.take("ids", shape, "int32")
            return ids, workspace.take("topk_weights", shape, dtype)

        if call.logits is not None:
            assert spec.routing is not None
            return Source(
                *take(spec.routing.top_k, spec.routing.weights_dtype),
                logits=call.logits,
                bias=call.bias,
                replay=call.replay,
                routing=spec.routing,
            )
        assert call.ids is not None
        packed = call.topk_weights is None
        if not packed and not spec.num_shared:
            return Source(ids_in=call.ids)
        dtype = "bfloat16" if packed else dtype_name(call.topk_weights)
        return Source(
            *take(int(call.ids.shape[1]), dtype),
            ids_in=call.ids,
            weights_in=call.topk_weights,
            packed=packed,
        )

    def _bind_source(self, source: Source, launches: Sequence[kernels.Launch]) -> None:
        if source.logits is not None:
            for name in ("logits", "bias", "replay"):
                self._bind(name, launches[0], name)
            return
        self._bind("ids", launches[0], "ids_in")
        if source.weights_in is not None:
            self._bind("topk_weights", launches[0], "weights_in")
        if source.ids is None:
            for item in launches[1:]:
                self._bind("ids", item, "ids")

    def _plan_experts(self, call: LayerCall, topk_weights: Array, workspace: Workspace) -> Array:
        spec, p = self._spec, self.permutation
        buffers = expert_buffers(spec, call.num_tokens, p.max_rows)

        def take(name: str) -> Any:
            return workspace.take(name, *buffers[name]) if name in buffers else None

        rows = take("rows")
        quantizes = spec.fp8 and call.x_scale is None
        columns = p.permuted_idx.shape[1]
        in_order = spec.orders_rows(call.num_tokens, columns, self._device.arch, quantizes)
        x, x_scale = call.x, call.x_scale
        if in_order:
            # The second GEMM's rows are written when the first has read these: the same memory.
            kind = FP8 if spec.fp8 else "bfloat16"
            x, x_scale = workspace.take("rows", rows.shape, kind), take("rows_scale")
        elif quantizes:
            x, x_scale = take("xq"), take("xq_scale")
        if spec.tensors:
            x_scale = spec.weights.x_scale if quantizes else call.x_scale
        first: list[kernels.Launch] = []
        if quantizes:
            order = p.permuted_idx if in_order else None
            if spec.tensors:
                item = kernels_quantize.quantize_fp8_tensor(call.x, x, x_scale, None, order)
            else:
                item = kernels_quantize.quantize_fp8_block(call.x, x, x_scale, order)
            self._bind("x", item, "x")
            if in_order:
                first = [item]
            else:
                self.stages["quantize"] = [item]
        elif in_order:
            scales = (None, None) if spec.tensors else (call.x_scale, x_scale)
            first = [kernels.permute_rows(call.x, p.permuted_idx, x, *scales)]
        if p.max_tiles == 0:
            return rows
        act = Rows(take("act"), take("act_scale") if not spec.tensors else spec.weights.act_scale)
        queues = workspace.take("queues", (2, 2), "int32", zeros=True)
        gemm1, gemm2 = self._plan_gemms(
            Rows(x, x_scale),
            act,
            rows,
            topk_weights,
            call.weights_dtype(spec),
            queues,
            not in_order,
        )
        self._gemm1 = gemm1
        self.stages["gemm1"], self.stages["gemm2"] = [*first, gemm1], [gemm2]
        if not quantizes:
            self._bind("x", self.stages["gemm1"][0], "a")
            self._scale_reader = gemm1 if spec.tensors else self.stages["gemm1"][0]
            self._bind("x_scale", self._scale_reader, "a_scale")
        return rows

    def _plan_gemms(
        self,
        x: Rows,
        act: Rows,
        rows: Array,
        topk_weights: Array,
        weights_dtype: str,
        queues: Array,
        gather: bool,
    ) -> tuple[kernels.Launch, kernels.Launch]:
        spec, p, device = self._spec, self.permutation, self._device
        (problem1, config1), (problem2, config2) = gemm_configs(
            spec, self.tile, device.arch, device.max_smem_bytes, weights_dtype, gather
        )
        self.configs = {"gemm1": config1, "gemm2": config2}
        w13, w2 = operands(spec.weights)
        weights = None
        if spec.weights_on_input:
            weights = kernels.TokenWeights(topk_weights, spec.shard.num_local_experts)
        return (
            plan_gemm(*x, w13, *act, p, problem1, config1, spec.activation, weights, queues[0]),
            plan_gemm(*act, w2, rows, None, p, problem2, config2, Activation(), None, queues[1]),
        )

    def run(self, call: LayerCall, stream_ptr: int) -> None:
        """Queue the layer on a stream of its device, which is current."""
        for name, item, field in self._bound:
            item.params[field] = address(getattr(call, name))
        if call.x_scale is not None and "gemm1" in self.stages:
            row, block = kernels.scale_strides(call.x_scale)
            self._scale_reader.params["a_scale_row_stride"] = row
            self._scale_reader.params["a_scale_block_stride"] = block
        for launches in self.stages.values():
            for item in launches:
                item.run(self._device, stream_ptr)

    def parts_of(self, call: LayerCall) -> ExpertParts:
        """Return the parts, with the call's own weights where no stage made new ones."""
        own = self._own_weights
        return self.parts._replace(topk_weights=call.topk_weights) if own else self.parts


def operands(weights: ExpertWeights) -> tuple[kernels.GemmOperand, kernels.GemmOperand]:
    """Return w13 and w2 as the grouped GEMM addresses them."""
    hidden, intermediate = weights.hidden_size, weights.intermediate_size
    blocked = weights.layout == "block_major_k"
    w2_scale = weights.w2_scale
    if weights.recipe == "fp8_tensor":
        assert w2_scale is not None
        w2_scale = w2_scale[:, None]
    order, rows = (
        (weights.gate_up_order, 2 * intermediate) if weights.gated else (None, intermediate)
    )
    return (
        kernels.GemmOperand(weights.w13, weights.w13_scale, rows, hidden, blocked, order),
        kernels.GemmOperand(weights.w2, w2_scale, hidden, intermediate, blocked),
    )


def gemm_specs(
    spec: LayerSpec, tile: int, arch: str, weights_dtype: str = "float32", gather: bool = True
) -> list[KernelSpec]:
    """Return the kernels of the two GEMMs for a tile height on an architecture."""
    (first, config1), (second, config2) = gemm_configs(
        spec, tile, arch, smem_limit(arch), weights_dtype, gather
    )
    return [gemm_spec(first, config1, spec.activation), gemm_spec(second, config2)]


def expert_buffers(
    spec: LayerSpec, num_tokens: int, max_rows: int
) -> dict[str, tuple[tuple[int, int], str]]:
    """Return shape and dtype of the buffers between the stages."""
    hidden, intermediate = spec.weights.hidden_size, spec.weights.intermediate_size
    buffers = {"rows": ((max_rows, hidden), "bfloat16")}
    if not spec.fp8:
        return buffers | {"act": ((max_rows, intermediate), "bfloat16")}
    if spec.tensors:
        return buffers | {
            "act": ((max_rows, intermediate), FP8),
            "xq": ((num_tokens, hidden), FP8),
        }
    return buffers | {
        "act": ((max_rows, intermediate), FP8),
        "act_scale": ((max_rows, kernels.blocks(intermediate)), "float32"),
        "rows_scale": ((max_rows, kernels.blocks(hidden)), "float32"),
        "xq": ((num_tokens, hidden), FP8),
        "xq_scale": ((num_tokens, kernels.blocks(hidden)), "float32"),
    }
