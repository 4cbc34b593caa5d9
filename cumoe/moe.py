"""The expert layer: :func:`moe` from logits, :func:`routed_moe` from given routing,
:class:`MoELayer` planned.

All three check their arguments here, once, and then run either the NumPy twin or a
:class:`~cumoe.plan.DevicePlan`. A planned call allocates nothing, never synchronises, and can be
captured in a CUDA graph.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cumoe.arrays import as_native, empty, same_place, wait_for
from cumoe.config import (
    MAX_TOP_K,
    Activation,
    Array,
    ExpertParts,
    ExpertShard,
    PackedTopK,
    Routing,
    TopK,
    check_int,
    max_tiles,
)
from cumoe.kernels import Runnable
from cumoe.kernels_routing import Experts, max_chunks
from cumoe.launch import get_device
from cumoe.layer_call import LayerCall, LayerSpec, check_call, check_layer
from cumoe.layouts import on_device_of
from cumoe.plan import DevicePlan, Workspace, expert_buffers
from cumoe.reference import finalize as reference_finalize
from cumoe.reference import moe as reference
from cumoe.reference import routing as reference_routing
from cumoe.validate import (
    check_type,
)
from cumoe.weights import ExpertWeights

if TYPE_CHECKING:
    from cumoe import comm
    from cumoe.comm.layer import LayerRanks

MAX_PLANS = 256  # plans a layer keeps; the least recently used goes first


def moe(
    x: Any,
    logits: Any,
    weights: ExpertWeights,
    *,
    routing: Routing,
    bias: Any = None,
    shard: ExpertShard | None = None,
    activation: Activation | None = None,
    finalize: bool = True,
    out: Any = None,
    replay_out: Any = None,
) -> Array | ExpertParts:
    """Run a mixture-of-experts layer from router logits.

    ``out[t] = sum over k of weight[t, k] * w2[e] @ act(gate[e] @ x[t], up[e] @ x[t])`` with
    ``e = ids[t, k]`` chosen by :func:`route`; shared experts take part with weight 1. With
    ``routing.weights_on_input`` the weight multiplies ``gate[e] @ x[t]`` and ``up[e] @ x[t]``.

    Parameters
    ----------
    x : array, shape (num_tokens, hidden_size), C-contiguous, or Quantized
        bfloat16 for bfloat16 weights; bfloat16, float16, float32 or Quantized for fp8 weights,
        its block (1, 128), or (None, None) for recipe ``"fp8_tensor"``.
    logits : array, float32 or bfloat16, shape (num_tokens, num_experts)
    weights : ExpertWeights
        The experts of `shard`, then the shared experts.
    routing : Routing
    bias : array, float32 or bfloat16, shape (num_experts,), optional
    shard : ExpertShard, optional
        The experts held here, by default all. The result is then this rank's part of the sum.
    activation : Activation, optional
        By default plain SwiGLU.
    finalize : bool
        False returns the rows before the weighted sum.
    out : array, bfloat16, float16 or float32, shape (num_tokens, hidden_size), optional
        By default a new bfloat16 array.
    replay_out : array, int16, shape (at least num_tokens, top_k), optional
        Receives the chosen ids.

    Returns
    -------
    array or ExpertParts
        `out` if it was given; otherwise a NumPy or CuPy array.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, dtype, shape, strides or place, or sizes disagree.

    Notes
    -----
    Accumulates in float32. Rounding points: fp8_block recipe: x to fp8 (1 x 128), the activation's
    result to fp8 (1 x 128), rows and result to bfloat16; fp8_tensor recipe: likewise by the static
    scales of the weights; bf16 recipe: the activation's result, rows and result to bfloat16.
    Bitwise repeatable. Queued on CuPy's current stream, no host synchronisation.
    """
    check_type("routing", routing, Routing, "a Routing")
    layer = check_layer(weights, routing, shard, activation, None, 0)
    call = check_call(layer, x, logits, None, bias, finalize, out, replay_out)
    return _run(layer, call, finalize, out)


def routed_moe(
    x: Any,
    topk: TopK | PackedTopK,
    weights: ExpertWeights,
    *,
    num_experts: int | None = None,
    num_shared_experts: int = 0,
    weights_on_input: bool = False,
    shard: ExpertShard | None = None,
    activation: Activation | None = None,
    finalize: bool = True,
    out: Any = None,
) -> Array | ExpertParts:
    """Run a mixture-of-experts layer with routing decided elsewhere.

    Parameters
    ----------
    x : array, shape (num_tokens, hidden_size), C-contiguous, or Quantized
        As in :func:`moe`.
    topk : TopK or PackedTopK
        Global ids and weights; the weights are used as they are. An id that is no routed expert
        held here contributes nothing.
    weights : ExpertWeights
        The experts of `shard`, then the shared experts.
    num_experts : int, optional
        Routed experts over all ranks; by default those of `weights`. Required with a shard.
    num_shared_experts : int
        How many of the last experts of `weights` are shared: every token uses them with weight 1,
        beside the given columns.
    weights_on_input : bool
        As in :class:`Routing`; `topk` then has one column.
    shard, activation, finalize, out
        As in :func:`moe`.

    Returns
    -------
    array or ExpertParts
        As :func:`moe`.

    Raises
    ------
    TypeError, ValueError
        As :func:`moe`.

    Notes
    -----
    As :func:`moe`; with the ids and weights that :func:`route` returns the result has the same
    bits.
    """
    layer = check_layer(
        weights, None, shard, activation, num_experts, num_shared_experts, weights_on_input
    )
    call = check_call(layer, x, None, topk, None, finalize, out, None)
    return _run(layer, call, finalize, out)


class MoELayer:
    """A layer planned for up to `max_num_tokens` tokens: no allocation and no synchronisation in a
    call.

    Parameters
    ----------
    weights : ExpertWeights
    routing : Routing, optional
        Needed to call the layer with logits.
    max_num_tokens : int
        Most tokens of a call, at least 1.
    bias : array, float32 or bfloat16, shape (num_experts,), optional
        The router's selection bias.
    shard, activation
        As in :func:`moe`.
    num_experts, num_shared_experts, weights_on_input
        As in :func:`routed_moe`; only without `routing`.
    portable : bool
        Run the GEMMs that every GPU from compute capability 8.0 on can run, also on Hopper, which
        has its own.
    group : comm.Group or comm.Workspace, optional
        Ranks that run the layer together, on the same tokens: each holds its `shard` of the
        experts, or a slice of the intermediate columns of them all (no `shard`), or both, and a
        call returns the sum over ranks. From a group the layer makes a workspace, which
        :meth:`close` closes; one of enough bfloat16 rows may serve any number of layers.
        Collective.

    Raises
    ------
    TypeError, ValueError
        If the parts do not fit together; on every rank, if the layers of a group differ or their
        shards hold some experts more often than others.
    comm.WorkspaceError, comm.GroupError
        If ranks cannot share memory, or one does not come.

    Notes
    -----
    Calls share one workspace, so they must be ordered on one stream. The first call with a new
    number of tokens plans it and loads kernels; make it before a graph capture, or call
    :meth:`warmup`. A captured graph stays valid as long as the layer lives.
    """

    def __init__(
        self,
        weights: ExpertWeights,
        routing: Routing | None = None,
        *,
        max_num_tokens: int,
        bias: Any = None,
        shard: ExpertShard | None = None,
        activation: Activation | None = None,
        num_experts: int | None = None,
        num_shared_experts: int = 0,
        weights_on_input: bool = False,
        portable: bool = False,
        group: comm.Group | comm.Workspace | None = None,
    ) -> None:
        check_type("portable", portable, bool, "a bool")
        spec = check_layer(
            weights, routing, shard, activation, num_experts, num_shared_experts, weights_on_input
        )
        self._spec = replace(spec, portable=portable)
        self.max_num_tokens = check_int("max_num_tokens", max_num_tokens, 1)
        if bias is not None:
            if routing is None:
                raise ValueError("bias: expected None without routing")
            bias = as_native(bias, "bias", ("float32", "bfloat16"), shape=(routing.num_experts,))
            same_place({"weights": weights.w13, "bias": bias})
        self._bias = bias
        self._plans: OrderedDict[tuple[Any, ...], DevicePlan] = OrderedDict()
        self._workspace: Workspace | None = None
        if weights.is_device:
            self._workspace = Workspace(weights.w13)
            self._reserve()
        self._ranks: LayerRanks | None = None
        if group is not None:
            from cumoe.comm.layer import LayerRanks

            self._ranks = LayerRanks(group, self._spec, self.max_num_tokens)

    def close(self) -> None:
        """Close the workspace that the layer made of a group, if it did; collective."""
        if self._ranks is not None:
            self._ranks.close()

    @property
    def weights(self) -> ExpertWeights:
        """The layer's weights."""
        return self._spec.weights

    @property
    def workspace_bytes(self) -> int:
        """Device memory the layer holds beside its weights."""
        return 0 if self._workspace is None else self._workspace.nbytes

    def __call__(
        self,
        x: Any,
        logits: Any = None,
        *,
        topk: TopK | PackedTopK | None = None,
        finalize: bool = True,
        out: Any = None,
        replay_out: Any = None,
        shared_output: Any = None,
        epilogue: comm.Epilogue | None = None,
        outputs: Sequence[str] | None = None,
    ) -> Any:
        """Run the layer; see :func:`moe` (with `logits`) and :func:`routed_moe` (with `topk`).

        Parameters
        ----------
        x, logits, topk, finalize, out, replay_out
            Exactly one of `logits` and `topk`. Without `out` the result is the only allocation.
        shared_output, epilogue, outputs
            Only with a group; see :func:`comm.finalize_allreduce`. With an epilogue or outputs
            `out` is an AllReduced, else a bfloat16 array.

        Returns
        -------
        array, ExpertParts or comm.AllReduced
            Parts are views of the workspace, and this rank's, valid until the next call. With a
            group the sum over ranks, or, with an epilogue or outputs, an AllReduced; the same bits
            on every rank.

        Raises
        ------
        TypeError, ValueError
            As :func:`moe`; or if there are more than `max_num_tokens` tokens.
        """
        if (logits is None) == (topk is None):
            got = "neither" if logits is None else "both"
            raise ValueError(f"logits: expected exactly one of logits and topk, got {got}")
        if logits is not None and self._spec.routing is None:
            raise ValueError("logits: this layer was built without routing; pass topk")
        check_type("finalize", finalize, bool, "a bool")
        summed = self._ranks is not None and finalize
        extras = {"shared_output": shared_output, "epilogue": epilogue, "outputs": outputs}
        if not summed:
            for name, value in extras.items():
                if value is not None:
                    raise ValueError(f"{name}: expected None without a group that sums the parts")
        own = (False, None) if summed else (finalize, out)
        call = check_call(self._spec, x, logits, topk, self._bias, own[0], own[1], replay_out)
        if call.num_tokens > self.max_num_tokens:
            raise ValueError(
                f"x: expected at most max_num_tokens = {self.max_num_tokens} rows, "
                f"got {call.num_tokens}"
            )
        if self._ranks is not None and summed:
            return self._sum_over(self._ranks, call, out, extras)
        if self._workspace is None or call.num_tokens == 0:
            return _run(self._spec, call, finalize, out)
        plan = self._plan(call)
        _queue(plan, call)
        return plan.parts_of(call) if call.out is None else call.out if out is None else out

    def _sum_over(
        self, ranks: LayerRanks, call: LayerCall, out: Any, extras: dict[str, Any]
    ) -> Array | comm.AllReduced:
        """Run this rank's experts, and sum the parts over all ranks."""
        if self._workspace is None or call.num_tokens == 0:
            parts = _run(self._spec, call, False, None)
            return ranks.prepare(parts, out, **extras).run()
        plan = self._plan(call)
        last = ranks.prepare(plan.parts_of(call), out, **extras)
        _queue(plan, call)
        return last.run()

    def plan(self, num_tokens: int) -> DevicePlan:
        """Return the plan of a call from float32 logits (for reports and benchmarks).

        Raises
        ------
        ValueError
            If the layer is on the host, has no routing, or plans for fewer tokens.
        """
        if self._workspace is None or self._spec.routing is None:
            raise ValueError("plan: needs a layer on a device with routing")
        num_tokens = check_int("num_tokens", num_tokens, 1, self.max_num_tokens)
        return self._plan(self._example_call(num_tokens))

    def warmup(self, num_tokens: int, *, epilogue: comm.Epilogue | None = None) -> None:
        """Plan calls from float32 logits with `num_tokens` tokens and load their kernels.

        Parameters
        ----------
        num_tokens : int
        epilogue : comm.Epilogue, optional
            Of the calls, with a group.

        Raises
        ------
        TypeError, ValueError
            As :meth:`plan`, or as a call with this epilogue.
        """
        plan = self.plan(num_tokens)
        launches: list[Runnable] = [i for stage in plan.stages.values() for i in stage]
        with on_device_of(self.weights.w13):
            if self._ranks is not None:
                launches += self._ranks.prepare(plan.parts, None, epilogue=epilogue).op.launches()
            elif epilogue is not None:
                raise ValueError("epilogue: expected None without a group that sums the parts")
            for item in launches:
                item.prepare(get_device(int(self.weights.w13.device.id)))

    def _plan(self, call: LayerCall) -> DevicePlan:
        assert self._workspace is not None
        key = call.key()
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = DevicePlan(self._spec, call, self._workspace)
            if len(self._plans) > MAX_PLANS:
                self._plans.popitem(last=False)
        else:
            self._plans.move_to_end(key)
        return plan

    def _example_call(self, num_tokens: int) -> LayerCall:
        spec, like = self._spec, self.weights.w13
        assert spec.routing is not None
        shape = (num_tokens, spec.weights.hidden_size)
        return LayerCall(
            x=empty(like, shape, "bfloat16"),
            logits=empty(like, (num_tokens, spec.num_experts), "float32"),
            bias=self._bias,
            # With a group the parts are the output of the layer's own stages.
            out=None if self._ranks else empty(like, shape, "bfloat16"),
        )

    def _reserve(self) -> None:
        """Allocate every buffer at the largest size that any call can need."""
        spec, workspace, tokens = self._spec, self._workspace, self.max_num_tokens
        assert workspace is not None
        top_k = spec.routing.top_k if spec.routing is not None else MAX_TOP_K
        columns = top_k + spec.num_shared
        num_local = spec.shard.num_local_experts + spec.num_shared
        heights = spec.tiles(get_device(int(spec.weights.w13.device.id)).arch)
        most_tiles = max(max_tiles(tokens, columns, num_local, t) for t in heights)
        most_rows = max(max_tiles(tokens, columns, num_local, t) * t for t in heights)
        workspace.take("ids", (tokens, columns), "int32")
        workspace.take("topk_weights", (tokens, columns), "float32")
        workspace.take("permuted_idx", (tokens, columns), "int32")
        workspace.take("token_idx", (most_rows,), "int32")
        for name in ("tile_expert", "tile_row_end"):
            workspace.take(name, (most_tiles,), "int32")
        workspace.take("tokens_per_expert", (num_local,), "int32")
        workspace.take("expert_offsets", (num_local + 1,), "int32")
        workspace.take("num_tiles", (1,), "int32")
        chunks = max_chunks(tokens, columns)
        words = Experts(spec.num_experts, spec.num_shared, spec.shard).num_words
        workspace.take("chunk_counts", (chunks, words), "int32")
        for name, kind in expert_buffers(spec, tokens, most_rows).items():
            workspace.take(name, *kind)
        workspace.take("queues", (2, 2), "int32", zeros=True)
        workspace.frozen = True
        wait_for(spec.weights.w13)  # a later call may be on another stream


def _run(spec: LayerSpec, call: LayerCall, finalize: bool, out: Any) -> Array | ExpertParts:
    """Run a checked call in buffers of its own."""
    if not spec.weights.is_device:
        parts = _on_host(spec, call)
        if not finalize:
            return parts
        reference_finalize.finalize(*parts, call.out)
    elif call.num_tokens == 0:
        if not finalize:
            return _no_parts(spec, call)
    else:
        # NOTE: launches hold addresses only; the buffers must live until they are queued.
        workspace = Workspace(call.x)
        plan = DevicePlan(spec, call, workspace)
        _queue(plan, call)
        if not finalize:
            return plan.parts_of(call)
    return call.out if out is None else out


def _no_parts(spec: LayerSpec, call: LayerCall) -> ExpertParts:
    """Return the parts of a call without tokens."""
    if call.ids is not None:
        columns = int(call.ids.shape[1])
    else:
        assert spec.routing is not None
        columns = spec.routing.top_k
    shape = (0, columns + spec.num_shared)
    rows = empty(call.x, (0, spec.weights.hidden_size), "bfloat16")
    weights = None if spec.weights_on_input else empty(call.x, shape, call.weights_dtype(spec))
    return ExpertParts(rows, weights, empty(call.x, shape, "int32"))


def _queue(plan: DevicePlan, call: LayerCall) -> None:
    """Queue a plan on CuPy's current stream of the device that holds the call's arrays."""
    import cupy

    with cupy.cuda.Device(int(call.x.device.id)):
        plan.run(call, cupy.cuda.get_current_stream().ptr)


def _on_host(spec: LayerSpec, call: LayerCall) -> ExpertParts:
    if call.logits is not None:
        assert spec.routing is not None
        topk = reference_routing.route(call.logits, spec.routing, bias=call.bias)
        if call.replay is not None:
            call.replay[: call.num_tokens] = topk.ids[:, : spec.routing.top_k]
    else:
        topk = reference.expand(call.ids, call.topk_weights, spec.num_experts, spec.num_shared)
    return reference.expert_parts(
        call.x,
        call.x_scale,
        topk,
        spec.weights,
        weights_on_input=spec.weights_on_input,
        num_experts=spec.num_experts,
        num_shared_experts=spec.num_shared,
        shard=spec.shard,
        activation=spec.activation,
    )
