"""The CPU runs are proven to catch faults: one line of a kernel is changed, and a case must fail.

A mutation whose line is no longer in the source fails here: it must move with the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from cumoe.launch import KERNEL_DIR
from tests.host import cases, loader

MAX_SEEDS = 12


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new` in a file, at its `nth` occurrence; the kernel's cases must notice."""

    file: str
    old: str
    new: str
    kernel: str = ""
    case: str = ""  # the one case to run; by default all until one fails
    nth: int = 0

    def apply(self) -> str:
        """Return the changed text."""
        parts = (KERNEL_DIR / self.file).read_text().split(self.old)
        assert len(parts) > self.nth + 1, f"{self.file}: {self.old!r} does not occur"
        head, tail = parts[: self.nth + 1], parts[self.nth + 1 :]
        return self.old.join(head) + self.new + self.old.join(tail)


BARRIER, WARP_SYNC = "__syncthreads();", "__syncwarp();"
GEMM, SM90 = "sm80_grouped_gemm.cu", "sm90_fp8_grouped_gemm.cu"
EMPTY_WAIT = "ptx::mbarrier_wait(ptx::smem_address(&smem.empty[ring.stage]), ring.phase ^ 1);"
DEEP = "two stages, one block, several tiles"

MUTATIONS = {
    # Removed block barriers, every one there is.
    "count: barrier after zeroing": Mutation("permute_count.cu", BARRIER, "", case="tails"),
    "count: barrier before the store": Mutation(
        "permute_count.cu", BARRIER, "", case="tails", nth=1
    ),
    "scan: barrier after the counts": Mutation(
        "permute_scan.cu", BARRIER, "", case="more experts than threads"
    ),
    "scan: barrier before the scan": Mutation("permute_scan.cu", BARRIER, "", case="tails", nth=1),
    "scan: barrier after reading": Mutation("permute_scan.cu", BARRIER, "", case="tails", nth=2),
    "scan: barrier after adding": Mutation("permute_scan.cu", BARRIER, "", case="tails", nth=3),
    "finalize: barrier": Mutation("finalize.cu", BARRIER, "", case="tails"),
    "weights: barrier": Mutation("quantize_fp8_weights.cu", BARRIER, "", case="tails"),
    "gemm: barrier of the pipeline": Mutation(GEMM, BARRIER, "", case="bf16 gated"),
    "gemm: barrier of the scale": Mutation(GEMM, BARRIER, "", case="fp8 gated to fp8", nth=1),
    # Removed warp synchronisation.
    "place: warp sync before the update": Mutation(
        "permute_place.cu", WARP_SYNC, "", case="tails", nth=1
    ),
    "routing: warp sync after the groups": Mutation(
        "routing_topk.cu", WARP_SYNC, "", case="deepseek_v3 groups"
    ),
    "routing: warp sync after marking": Mutation(
        "routing_topk.cu", WARP_SYNC, "", case="deepseek_v3 odd groups", nth=2
    ),
    # Dropped tail checks.
    "block: rows": Mutation("quantize_fp8_block.cu", "row < p.num_rows && ", "", case="tails"),
    "block: columns": Mutation(
        "quantize_fp8_block.cu", " && column < p.num_columns", "", case="tails"
    ),
    "weights: rows": Mutation(
        "quantize_fp8_weights.cu", "row < p.n && column < p.k", "column < p.k", case="tails"
    ),
    "weights: columns": Mutation(
        "quantize_fp8_weights.cu", "row >= p.n || column >= p.k", "row >= p.n", case="tails"
    ),
    "expand: slots": Mutation(
        "topk_expand.cu",
        "if (slot >= static_cast<int64_t>(p.num_tokens) * columns) return;",
        "",
        case="packed",
    ),
    "finalize: columns": Mutation(
        "finalize.cu", "if (column >= p.hidden_size) return;", "", case="tails"
    ),
    "activation: columns": Mutation(
        "activation.cu", "inside = column < p.intermediate_size", "inside = true", case="to fp8"
    ),
    "activation: half a lane loaded": Mutation(
        "activation.cu", "if (first ? low : high)", "if (low)",
        case="halves",
    ),
    "activation: half a lane stored": Mutation(
        "activation.cu", "c * kElems < 8 || high", "true",
        case="halves",
    ),
    "activation: rows held": Mutation(
        "activation.cu", "*p.num_held_rows : p.num_rows", "p.num_rows : p.num_rows", case="shard"
    ),
    "activation: last rows": Mutation(
        "activation.cu", "inside && row0 + r < p.num_rows", "inside"
    ),
    "activation: next unit": Mutation(
        "activation.cu", "if (block >= p.num_blocks) block -= p.num_blocks, ++group;", "",
        case="704, several rounds",
    ),
    "activation: 32-bit offsets": Mutation(
        "activation.cu",
        "row0 * (kSides * half_bytes)",
        "row0 * static_cast<unsigned>(kSides * half_bytes)",
        case="offsets past 2^32",
    ),
    "activation: one warp's shuffles": Mutation(
        "activation.cu", "int offset = kLanes / 2;", "int offset = kLanes;", case="exact"
    ),
    "activation: zeros of their sign": Mutation(
        "e4m3.cuh",
        "__fmaf_rn(-__fmaf_rn(b, q, -a), reciprocal, q)",
        "__fmaf_rn(__fmaf_rn(-b, q, a), reciprocal, q)",
        "activation", case="exact, from float32",
    ),
    "activation: division by infinity": Mutation(
        "e4m3.cuh", "scale == INFINITY ? 0.0f : scale * factor", "scale * factor", "activation",
        case="exact, from float32",
    ),
    "activation: tiny scales": Mutation(
        "e4m3.cuh", "amax < 1.0f ? 0x1p64f : 0x1p-64f", "1.0f", "activation", case="midpoints"
    ),
    "activation: quotient": Mutation(
        "e4m3.cuh", "return __fmaf_rn(-__fmaf_rn(b, q, -a), reciprocal, q);", "return q;",
        "activation", case="midpoints",
    ),
    "activation: 448": Mutation(
        "e4m3.cuh", "quotient(amax, kE4m3Max, 1.0f / kE4m3Max)", "amax * (1.0f / kE4m3Max)",
        "activation", case="midpoints",
    ),
    "routing: tokens": Mutation(
        "routing_topk.cu", "if (token >= p.num_tokens) return;", "", case="default"
    ),
    "routing: experts": Mutation(
        "routing_topk.cu",
        "image[i] = expert < NUM_EXPERTS ? order_image(key) : 0;",
        "image[i] = order_image(key);",
    ),
    "count: slots": Mutation(
        "permute_count.cu",
        "min(begin + kChunkSlots, p.num_slots)",
        "begin + kChunkSlots",
        case="tails",
    ),
    "gemm: rows": Mutation(GEMM, "if (row >= row_end) continue;", "", case="bf16 gated"),
    "gemm: columns": Mutation(GEMM, "if (column >= p.n) continue;", "", case="bf16 gated"),
    "gemm: k": Mutation(GEMM, "const bool k_valid = k < p.k_bytes;", "const bool k_valid = true;"),
    "gemm: tiles": Mutation(
        GEMM, "if (row_tile >= *p.num_tiles) return;", "", case="fp8 gated to fp8"
    ),
    # Gate and up swapped.
    "activation: gate and up": Mutation(
        "activation.cu", "sides[2] = {x + (swapped ? half_bytes : 0)", "sides[2] = {x",
        case="fp8 to fp8, experts",
    ),
    "activation: scales of gate and up": Mutation(
        "activation.cu", "{scale + (swapped ? half : 0)", "{scale", case="704, several rounds"
    ),
    "activation: pairs": Mutation(
        "activation.cu", "INTERLEAVED == 2 ? 1 - side : side", "side", case="interleaved up first"
    ),
    "gemm: gate and up": Mutation(
        GEMM,
        "activate(accum[0][i][j][v], accum[kHalves - 1][i][j][v], act)",
        "activate(accum[kHalves - 1][i][j][v], accum[0][i][j][v], act)",
    ),
    "gemm: scales of gate and up": Mutation(
        GEMM,
        "half ? p.up_scale_row : p.gate_scale_row",
        "half ? p.gate_scale_row : p.up_scale_row",
        case="fp8 gated to fp8",
    ),
    # A wrong swizzle.
    "gemm: swizzle": Mutation(GEMM, "(chunk ^ (row & 7))", "(chunk ^ (row & 15))"),
    "gemm: fragment": Mutation(GEMM, "lane % 8 + lane / 16 * 8", "lane % 16"),
    "gemm: wide order": Mutation(
        GEMM,
        "f16x2_from_e4m3x2(bh & 0xffffu), f16x2_from_e4m3x2(bh >> 16)",
        "f16x2_from_e4m3x2(bh >> 16), f16x2_from_e4m3x2(bh & 0xffffu)",
        case="fp8 plain",
    ),
    # Off by one in the expert offsets.
    "scan: offsets": Mutation(
        "permute_scan.cu",
        "p.expert_offsets[e] = tiles * p.tile;",
        "p.expert_offsets[e] = (tiles + 1) * p.tile;",
        case="tails",
    ),
    "scan: last offset": Mutation(
        "permute_scan.cu", "if (threadIdx.x == kThreads - 1) {", "if (threadIdx.x == 0) {",
        case="tails",
    ),
    "experts: row to expert": Mutation(
        "experts.cuh", "offsets[middle] <= row", "offsets[middle] < row", "permute_place"
    ),
    "activation: expert": Mutation(
        "activation.cu", "p.tile_expert[row0 / p.tile]", "p.tile_expert[row0 / p.tile / 2]"
    ),
    "experts: shard": Mutation(
        "experts.cuh", "routed < num_local_routed", "routed <= num_local_routed", "permute_count",
        case="shard",
    ),
    "gemm: expert": Mutation(
        GEMM, "p.tile_expert[row_tile];", "p.tile_expert[row_tile ? row_tile - 1 : 0];"
    ),
    # A missing wait.
    "gemm: wait": Mutation(
        GEMM, "wait_group<NUM_STAGES - 2>", "wait_group<NUM_STAGES - 1>", case="bf16 gated"
    ),
    "gemm: commit": Mutation(
        GEMM, "ptx::cp_async_commit_group();", "", case="bf16 gated", nth=1
    ),
    # Hopper's pipeline: waits, phases, bytes, arrivals.
    "sm90: wait for full": Mutation(
        SM90, "ptx::mbarrier_wait(ptx::smem_address(&smem.full[ring.stage]), ring.phase);", "",
        case="plain",
    ),
    "sm90: wait for empty, weights": Mutation(SM90, EMPTY_WAIT, "", case=DEEP),
    "sm90: wait for empty, tokens": Mutation(SM90, EMPTY_WAIT, "", case=DEEP, nth=1),
    "sm90: wait for empty, scales": Mutation(SM90, EMPTY_WAIT, "", case=DEEP, nth=3),
    "sm90: phase": Mutation(SM90, "stage = 0, phase ^= 1", "stage = 0", case=DEEP),
    "sm90: bytes": Mutation(SM90, "boxes * kBoxRows * 128", "boxes * kBoxRows * 64", case="plain"),
    "sm90: arrivals": Mutation(SM90, "kConsumers * 4 * CLUSTER)", "kConsumers * 4)",
                               case="clusters, gated"),
    "sm90: multicast": Mutation(SM90, "full, 0x3,", "full, 0x1,", case="clusters, gated"),
    "sm90: gathered swizzle": Mutation(SM90, "(chunk ^ first)", "chunk", case="gated"),
    "sm90: gathered tail": Mutation(SM90, "< p.k ? 16 : 0", "< p.k ? 16 : 16"),
    "sm90: scale barrier": Mutation(
        SM90, "ptx::named_barrier_sync(1, kConsumerThreads);", "", case="gated"
    ),
    "sm90: staging barrier": Mutation(
        SM90, "ptx::named_barrier_sync(1, kConsumerThreads);", "", case="gated", nth=2
    ),
    "sm90: staging barrier, bf16": Mutation(
        SM90, "ptx::named_barrier_sync(2 + group, 128);", "", case="plain"
    ),
    "sm90: staging reused": Mutation(
        SM90, "ptx::named_barrier_sync(2 + group, 128);", "", case=DEEP, nth=1
    ),
    "sm90: rows": Mutation(SM90, "row >= tile.rows || ", "", case="plain"),
    "sm90: columns": Mutation(SM90, " || column0 + column >= p.n", "", case="plain"),
    "sm90: halves": Mutation(SM90, "p.first_half ^ h", "p.first_half", case="gated"),
    "sm90: cluster starts together": Mutation(
        SM90, "CLUSTER > 1 ? ptx::cluster_sync() : __syncthreads();", "__syncthreads();",
        case="clusters, gated",
    ),
    # A slot of -1 written or used.
    "place: slot of -1": Mutation(
        "permute_place.cu", "if (row >= 0) p.token_idx", "p.token_idx", case="shard"
    ),
    "place: padding": Mutation(
        "permute_place.cu", "p.token_idx[r] = -1;", "p.token_idx[r] = 0;", case="tails"
    ),
    "finalize: slot of -1": Mutation(
        "finalize.cu", "if (row[k] < 0) continue;", "", case="tails"
    ),
    "activation: padding": Mutation(
        "activation.cu", "p.token_idx[row0 + r] >= 0", "p.token_idx[row0 + r] >= -1",
        case="interleaved up first",
    ),
    # Arithmetic that must be exact, and order.
    "routing: ties": Mutation(
        "routing_topk.cu", "if (image[i] > best) best", "if (image[i] >= best) best"
    ),
    "routing: NaN": Mutation("routing_topk.cu", "return x == x ? x : -INFINITY;", "return x;"),
    "exact: order of the sum": Mutation(
        "exact.cuh",
        "for (int offset = 16; offset > 0; offset /= 2) {",
        "for (int offset = 1; offset < 32; offset *= 2) {",
        "routing_topk",
        case="default",
    ),
    "e4m3: scale": Mutation(
        "e4m3.cuh", "__fdiv_rn(amax, kE4m3Max)", "__fmul_rn(amax, 1.0f / kE4m3Max)",
        "quantize_fp8_block",
    ),
    "activation: limit of up": Mutation(
        "activation.cuh", "x < -limit ? -limit : x", "x", "activation"
    ),
    "activation: NaN of relu2": Mutation(
        "activation.cuh", "x < 0.0f ? 0.0f : x", "x > 0.0f ? x : 0.0f", "activation",
        case="relu2, fp8 to fp8",
    ),
    "finalize: fused": Mutation(
        "finalize.cu",
        "__fadd_rn(sum[i], __fmul_rn(weight[k], x[i]))",
        "__fmaf_rn(weight[k], x[i], sum[i])",
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _compiler() -> None:
    loader.require()


@pytest.mark.parametrize("name", MUTATIONS, ids=lambda n: n.replace(" ", "_"))
def test_caught(name):
    mutation = MUTATIONS[name]
    changed = {mutation.file: mutation.apply()}
    table = cases.CASES[mutation.kernel or mutation.file.removesuffix(".cu")]
    chosen = [case for case in table if mutation.case in ("", case.name)]
    assert chosen, f"no case {mutation.case!r}"
    for case in chosen:
        for seed in range(MAX_SEEDS if len(chosen) == 1 else 1):
            try:
                cases.check(case, loader.HostOptions(seed=seed, changed=changed))
            except (AssertionError, loader.HostError) as error:
                print(f"caught by {case.name!r}, seed {seed}: {str(error).splitlines()[0]}")
                return
    pytest.fail(f"not caught in {len(chosen)} cases")
