"""A layer call planned on a device: its buffers, its launches, and what changes from call to call.

A :class:`DevicePlan` belongs to one number of tokens and one kind of input. Running it writes the
new addresses into the parameter structs and queues the launches: no allocation, no synchronisation,
no compile once its kernels are loaded. Knows nothing of validation, which is done above.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cumoe import kernels, kernels_quantize
from cumoe.arrays import DTYPES, FP8, address, dtype_name
from cumoe.config import Activation, Array, ExpertParts
from cumoe.grouped_gemm import gemm_spec, plan_gemm
from cumoe.launch import KernelSpec, get_device, smem_limit
from cumoe.layer_call import LayerCall, LayerSpec, gemm_configs
from cumoe.permutation import plan_group
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

    def take(self, name: str, shape: Sequence[int], dtype: str) -> Array:
        """Return the buffer of `name` as an array; contents are undefined."""
        import cupy

        want = DTYPES["uint8"] if dtype == FP8 else DTYPES[dtype]
        nbytes = int(np.prod(shape, dtype=np.int64)) * want.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < nbytes:
            if self.frozen:
                raise RuntimeError(f"workspace: {name} needs {nbytes} bytes, more than planned")
            with cupy.cuda.Device(self._ordinal):
                buffer = self._buffers[name] = cupy.empty(max(nbytes, 16), np.uint8)
        return cupy.ndarray(tuple(shape), dtype=want, memptr=buffer.data)


class DevicePlan:
    """The launches of one layer call, stage by stage.

    Attributes
    ----------
    stages : dict of str to list of Launch
        In order: routing, permutation, quantize, gemm1, gemm2, finalize; absent ones have nothing
        to do.
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
        ids, topk_weights = self._plan_routing(call, workspace)
        columns = ids.shape[1]
        self.tile = spec.select_tile(ids.size, self._device.arch)
        self.permutation, permute = plan_group(
            ids, spec.num_experts, spec.num_shared, spec.shard, self.tile, workspace.take
        )
        self.stages["permutation"] = permute
        if ids is call.ids:
            self._bind("ids", permute[0], "ids")
            self._bind("ids", permute[2], "ids")
        rows = self._plan_experts(call, workspace)
        self.parts = ExpertParts(rows, topk_weights, self.permutation.permuted_idx)
        assert columns == self.permutation.permuted_idx.shape[1]
        if call.out is not None:
            item = kernels.finalize(*self.parts, call.out)
            self._bind("out", item, "out")
            if topk_weights is call.topk_weights:
                self._bind("topk_weights", item, "weights")
            self.stages["finalize"] = [item]

    def _bind(self, name: str, item: kernels.Launch, field: str) -> None:
        """Let `field` follow the call's array `name`."""
        self._bound.append((name, item, field))

    def _plan_routing(self, call: LayerCall, workspace: Workspace) -> tuple[Array, Array]:
        spec = self._spec
        if call.logits is not None:
            assert spec.routing is not None
            shape = (call.num_tokens, spec.routing.total_top_k)
            ids = workspace.take("ids", shape, "int32")
            weights = workspace.take("topk_weights", shape, spec.routing.weights_dtype)
            item = kernels.routing_topk(
                call.logits, call.bias, ids, weights, call.replay, spec.routing
            )
            for name in ("logits", "bias", "replay"):
                self._bind(name, item, name)
            self.stages["routing"] = [item]
            return ids, weights
        assert call.ids is not None
        packed = call.topk_weights is None
        if not packed and not spec.num_shared:
            return call.ids, call.topk_weights
        shape = (call.num_tokens, call.ids.shape[1] + spec.num_shared)
        dtype = "bfloat16" if packed else dtype_name(call.topk_weights)
        ids = workspace.take("ids", shape, "int32")
        weights = workspace.take("topk_weights", shape, dtype)
        item = kernels.topk_expand(call.ids, call.topk_weights, ids, weights, spec.num_experts)
        self._bind("ids", item, "ids_in")
        self._bind("topk_weights", item, "weights_in")
        self.stages["routing"] = [item]
        return ids, weights

    def _plan_experts(self, call: LayerCall, workspace: Workspace) -> Array:
        spec, p = self._spec, self.permutation
        buffers = expert_buffers(spec, call.num_tokens, p.max_rows)
        arrays = {name: workspace.take(name, *kind) for name, kind in buffers.items()}
        x, x_scale = call.x, call.x_scale
        if spec.fp8 and x_scale is None:
            x, x_scale = arrays["xq"], arrays["xq_scale"]
            item = kernels_quantize.quantize_fp8_block(call.x, x, x_scale)
            self._bind("x", item, "x")
            self.stages["quantize"] = [item]
        if p.max_tiles == 0:
            return arrays["rows"]
        act, act_scale = arrays["act"], arrays.get("act_scale")
        gemm1, gemm2 = self._plan_gemms(x, x_scale, act, act_scale, arrays["rows"])
        if x is call.x:
            self._bind("x", gemm1, "a")
            self._bind("x_scale", gemm1, "a_scale")
        self._gemm1 = gemm1
        self.stages["gemm1"], self.stages["gemm2"] = [gemm1], [gemm2]
        return arrays["rows"]

    def _plan_gemms(
        self, x: Array, x_scale: Array | None, act: Array, act_scale: Array | None, rows: Array
    ) -> tuple[kernels.Launch, kernels.Launch]:
        spec, p, device = self._spec, self.permutation, self._device
        (problem1, config1), (problem2, config2) = gemm_configs(
            spec, self.tile, device.arch, device.max_smem_bytes
        )
        self.configs = {"gemm1": config1, "gemm2": config2}
        w13, w2 = operands(spec.weights)
        return (
            plan_gemm(x, x_scale, w13, act, act_scale, p, problem1, config1, spec.activation),
            plan_gemm(act, act_scale, w2, rows, None, p, problem2, config2, Activation()),
        )

    def run(self, call: LayerCall, stream_ptr: int) -> None:
        """Queue the layer on a stream of its device, which is current."""
        for name, item, field in self._bound:
            item.params[field] = address(getattr(call, name))
        if call.x_scale is not None and "gemm1" in self.stages:
            row, block = call.x_scale.strides
            self._gemm1.params["a_scale_row_stride"] = row // 4
            self._gemm1.params["a_scale_block_stride"] = block // 4
        for launches in self.stages.values():
            for item in launches:
                item.run(self._device, stream_ptr)

    def parts_of(self, call: LayerCall) -> ExpertParts:
        """Return the parts, with the call's own weights where no stage made new ones."""
        own = call.logits is None and "routing" not in self.stages
        return self.parts._replace(topk_weights=call.topk_weights) if own else self.parts


def operands(weights: ExpertWeights) -> tuple[kernels.GemmOperand, kernels.GemmOperand]:
    """Return w13 and w2 as the grouped GEMM addresses them."""
    hidden, intermediate = weights.hidden_size, weights.intermediate_size
    blocked = weights.layout == "block_major_k"
    order, rows = (
        (weights.gate_up_order, 2 * intermediate) if weights.gated else (None, intermediate)
    )
    return (
        kernels.GemmOperand(weights.w13, weights.w13_scale, rows, hidden, blocked, order),
        kernels.GemmOperand(weights.w2, weights.w2_scale, hidden, intermediate, blocked),
    )


def gemm_specs(spec: LayerSpec, tile: int, arch: str) -> list[KernelSpec]:
    """Return the kernels of the two GEMMs for a tile height on an architecture."""
    (first, config1), (second, config2) = gemm_configs(spec, tile, arch, smem_limit(arch))
    return [gemm_spec(first, config1, spec.activation), gemm_spec(second, config2)]


def expert_buffers(
    spec: LayerSpec, num_tokens: int, max_rows: int
) -> dict[str, tuple[tuple[int, int], str]]:
    """Return shape and dtype of the buffers between the stages."""
    hidden, intermediate = spec.weights.hidden_size, spec.weights.intermediate_size
    buffers = {"rows": ((max_rows, hidden), "bfloat16")}
    if not spec.fp8:
        return buffers | {"act": ((max_rows, intermediate), "bfloat16")}
    return buffers | {
        "act": ((max_rows, intermediate), FP8),
        "act_scale": ((max_rows, kernels.blocks(intermediate)), "float32"),
        "xq": ((num_tokens, hidden), FP8),
        "xq_scale": ((num_tokens, kernels.blocks(hidden)), "float32"),
    }
