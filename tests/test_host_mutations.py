"""The CPU runs are proven to catch faults: one line of a kernel is changed, and a case must fail.

A mutation whose line is no longer in the source fails here: it must move with the kernel.
"""

from __future__ import annotations

import pytest

from tests.host import cases, loader
from tests.host.activation_mutations import ACTIVATION_MUTATIONS
from tests.host.mutations import BARRIER, Mutation
from tests.host.quantize_mutations import QUANTIZE_MUTATIONS
from tests.host.routing_mutations import ROUTING_MUTATIONS
from tests.host.rows_mutations import ROWS_MUTATIONS

MAX_SEEDS = 12


GEMM, SM90, SM90_STORE = "sm80_grouped_gemm.cu", "sm90_grouped.cuh", "sm90_store.cuh"
SM90_SCALES, SM90_COLUMNS = "sm90_scales.cuh", "sm90_columns.cuh"
FP8, BF16 = "sm90_fp8_grouped_gemm", "sm90_grouped_gemm"
SM90_FP8, SM90_BF16 = f"{FP8}.cu", f"{BF16}.cu"
EMPTY_WAIT, TMA_WAIT = (f"{ring}.wait(smem.empty, {ring}.phase ^ 1);" for ring in ("ring", "at"))
RELEASE = "in.release(previous, lane);"
TEAM_MEETS = "\n  meet();"
GROUP_MEETS = "ptx::named_barrier_sync(1 + group, 128);"
CLUSTER_STARTS = "CLUSTER > 1 ? ptx::cluster_sync() : __syncthreads();"
CLUSTER_ENDS = "if constexpr (CLUSTER > 1) ptx::cluster_sync();"
DEEP, DEEP_GATED = "one block, several tiles", "one block, several tiles, gated"
SHORT = "one block, several tiles, short k"
FEW, FEW_GATED = "clusters, few rows", "clusters, few rows, gated"
WEIGHTED = "fp8 gated interleaved, weights of tokens"

MUTATIONS = {
    **ACTIVATION_MUTATIONS,
    **ROUTING_MUTATIONS,
    **QUANTIZE_MUTATIONS,
    **ROWS_MUTATIONS,
    # Removed block barriers, every one there is.
    "finalize: barrier": Mutation("finalize.cu", BARRIER, "", case="tails"),
    "permute rows: slot of -1": Mutation(
        "raw.cuh", "if (row >= 0) store(row);", "store(row);", "permute_rows", case="tails"
    ),
    "permute rows: scales of its own": Mutation(
        "permute_rows.cu", "row * p.num_blocks + block", "token * p.num_blocks + block",
        case="scales",
    ),
    "permute rows: tail": Mutation(
        "permute_rows.cu", "if (at < p.row_bytes) *", "*", case="tails"
    ),
    "permute rows: pieces": Mutation(
        "permute_rows.cu", "(piece * kVectors", "(0", case="two pieces"
    ),
    "permute rows: scales by column": Mutation(
        "permute_rows.cu", "block * p.a_scale_block_stride", "block", case="scales by column, many"
    ),
    "permute rows: 64-bit offsets": Mutation(
        "permute_rows.cu", "uint8_t* out = p.out + row *", "uint8_t* out = p.out + (int)row *",
        case="offsets past 2^32",
    ),
    "weights: barrier": Mutation("quantize_fp8_weights.cu", BARRIER, "", case="tails"),
    "gemm: barrier of the pipeline": Mutation(GEMM, BARRIER, "", case="bf16 gated"),
    "gemm: barrier of the scale": Mutation(GEMM, BARRIER, "", case="fp8 gated to fp8", nth=1),
    # Dropped tail checks.
    "weights: rows": Mutation(
        "quantize_fp8_weights.cu", "row < p.n && column < p.k", "column < p.k", case="tails"
    ),
    "weights: columns": Mutation(
        "quantize_fp8_weights.cu", "row >= p.n || column >= p.k", "row >= p.n", case="tails"
    ),
    "finalize: columns": Mutation(
        "finalize.cu", "if (column >= p.hidden_size) return;", "", case="tails"
    ),
    "gemm: rows": Mutation(GEMM, "if (row >= row_end) continue;", "", case="bf16 gated"),
    "gemm: columns": Mutation(GEMM, "if (column >= p.n) continue;", "", case="bf16 gated"),
    "gemm: k": Mutation(GEMM, "const bool k_valid = k < p.k_bytes;", "const bool k_valid = true;"),
    "gemm: tiles": Mutation(
        GEMM, "if (row_tile >= *p.num_tiles) return;", "", case="fp8 gated to fp8"
    ),
    # Gate and up swapped.
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
        nth=1,
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
        SM90, "ptx::mbarrier_wait(full + 8 * ring.slot, ring.phase);", "", FP8, case="plain"
    ),
    "sm90: wait for empty, TMA": Mutation(SM90, TMA_WAIT, "", FP8, case=DEEP),
    "sm90: wait for empty, pairs": Mutation(SM90, TMA_WAIT, "", FP8, case="pairs"),
    "sm90: last pair": Mutation(SM90, "first + i >= stages", "false", FP8, case="pairs"),
    "sm90: steps of a pair": Mutation(SM90, "? 0 : step * 128", "? 0 : first * 128", FP8),
    "sm90: wait for empty, gathered": Mutation(SM90, EMPTY_WAIT, "", FP8, case=DEEP_GATED),
    "sm90: wait for empty, scales": Mutation(SM90_SCALES, EMPTY_WAIT, "", FP8, case=DEEP),
    "sm90: wait for gathered": Mutation(
        SM90_SCALES, "ring.wait(smem.landed, ring.phase);", "", FP8, case="gated"
    ),
    "sm90: phase": Mutation(SM90, "slot = 0, phase ^= 1", "slot = 0", FP8, case=DEEP),
    "sm90: bytes": Mutation(
        SM90, "boxes * kBoxRows * 128", "boxes * kBoxRows * 64", FP8, case="plain"
    ),
    "sm90: arrivals on full": Mutation(SM90, "1 + arrivals", "arrivals", FP8, case="plain"),
    "sm90: arrivals on empty": Mutation(
        SM90, "kConsumers * 4 * CLUSTER)", "kConsumers * 4)", FP8, case="clusters, gated"
    ),
    "sm90: arrivals on staged": Mutation(
        SM90, "&staged[g][c]), 4)", "&staged[g][c]), 3)", FP8, case="plain"
    ),
    "sm90: gathered arrivals": Mutation(
        SM90_SCALES, "&landed[s]), kGatherThreads)", "&landed[s]), 32)", FP8, case="gated"
    ),
    "sm90: announced": Mutation(
        SM90, "                : ptx::mbarrier_wait(announced, ring.phase);", ": (void)0;", FP8,
        case=SHORT,
    ),
    "sm90: announced to the cluster": Mutation(
        SM90, "ptx::mbarrier_wait_cluster(announced, ring.phase)", "(void)0", FP8,
        case=FEW_GATED,
    ),
    "sm90: announced with its bytes": Mutation(
        SM90, "ptx::mbarrier_arrive_expect_tx(announced, sizeof(int))",
        "ptx::mbarrier_arrive(announced)", FP8, case=FEW_GATED,
    ),
    "sm90: announced by the first block": Mutation(
        SM90, "      if (work.rank > 0) break;\n", "", FP8, case=FEW_GATED
    ),
    "sm90: seen by all": Mutation(
        SM90, "(1 + kConsumers * 4 + helpers) * CLUSTER", "kConsumers * 4 * CLUSTER", FP8, case=DEEP
    ),
    "sm90: seen before the next": Mutation(
        SM90, "ring.wait(smem.seen, ring.phase ^ 1);", "", FP8, case=SHORT
    ),
    "sm90: items of the queue": Mutation(
        SM90, "/ 8) next = clusters + atomicAdd(p.queue, 1);", "/ 8) next += clusters;", FP8,
        case="clusters, plain",
    ),
    "sm90: queue left as it was": Mutation(
        SM90, "p.queue[0] = p.queue[1] = 0", "p.queue[1] = 0", FP8, case="plain"
    ),
    "sm90: multicast": Mutation(SM90, "full, 0x3, k", "full, 0x1, k", FP8, case="clusters, gated"),
    "sm90: multicast of tokens": Mutation(
        SM90, "full, 0x3, step", "full, 0x1, step", FP8, case="clusters, plain"
    ),
    "sm90: release of the other block": Mutation(
        SM90, "lane % CLUSTER", "0", FP8, case="clusters, plain"
    ),
    "sm90: release before the product": Mutation(
        SM90_COLUMNS, RELEASE, "", FP8, case=DEEP, moved="add(0, false);"
    ),
    "sm90: cluster starts together": Mutation(
        SM90, CLUSTER_STARTS, "__syncthreads();", FP8, case="clusters, gated"
    ),
    "sm90: cluster ends together": Mutation(SM90_FP8, CLUSTER_ENDS, "", case=FEW),
    # Its loads and stores.
    "sm90: halves": Mutation(SM90, "p.first_half ^ h", "p.first_half", FP8, case="gated"),
    "sm90: half past the first": Mutation(
        SM90, "tile.column_tile * 256 + h * 128;", "tile.column_tile * 256;", FP8, case="plain"
    ),
    "sm90: block-major": Mutation(
        SM90, "p.block_major ? 0 : step * 128", "step * 128", FP8, case="block-major"
    ),
    "sm90: gathered swizzle": Mutation(SM90, "(chunk ^ first % 8)", "chunk", FP8, case="gated"),
    "sm90: gathered swizzle, passes": Mutation(
        SM90, "(offset ^ kRows % 8 << 4)", "offset", BF16, case="gated interleaved"
    ),
    "sm90: gathered tail": Mutation(SM90, "< p.k_bytes ? 16 : 0", "< p.k_bytes ? 16 : 16", FP8),
    "sm90: rounded rows": Mutation(
        SM90, "row < tile.rows ? row : 0", "row", BF16, case="one token"
    ),
    "sm90: rows": Mutation(
        SM90_STORE, "if (token0 + token >= tile.rows) break;", "", FP8, case="every remainder"
    ),
    "sm90: full chunks": Mutation(
        SM90_STORE, "token0 + kChunkTokens > tile.rows", "false", FP8, case="every remainder"
    ),
    "sm90: bulk store has read": Mutation(
        SM90_STORE, "ptx::cp_async_bulk_wait_group_read<0>();", "", FP8, case="plain, tile 80"
    ),
    "sm90: columns": Mutation(SM90_STORE, "if (column >= p.n) return;", "", FP8, case="plain"),
    "sm90: rows, fp8": Mutation(
        SM90_COLUMNS, "i < tile.rows * 8", "i < tile.groups() * 64", FP8,
        case="every remainder, gated",
    ),
    "sm90: columns, fp8": Mutation(
        SM90_COLUMNS, "if (column >= p.n) continue;", "", FP8, case="gated"
    ),
    "sm90: rows of the blocks": Mutation(
        SM90, "begin += rank * height", "begin += rank * 8", FP8, case=FEW
    ),
    "sm90: few rows, weights": Mutation(
        SM90, "if (!tile.shares) {", "if (CLUSTER == 1) {", FP8, case=FEW
    ),
    "sm90: few rows, columns": Mutation(
        SM90, "column_tile + rank : -1", "column_tile : -1", FP8, case=FEW_GATED
    ),
    "sm90: tiles before took all": Mutation(
        SM90, "max(rest, 0)", "rest", FP8, case="clusters that take more than a tile, rows in order"
    ),
    "sm90: nothing to do": Mutation(
        SM90, "    release(ring.slot, lane);\n", "", FP8, case=FEW_GATED
    ),
    "sm90: nothing to do, stages": Mutation(
        SM90, "column_tile < 0 ? 1 : steps", "column_tile < 0 ? 2 : steps", FP8, case=FEW_GATED
    ),
    "sm90: staged": Mutation(
        SM90_STORE, "ring.wait(smem.staged[group], ring.phase);", "", FP8, case="plain"
    ),
    "sm90: drained": Mutation(
        SM90_STORE, "if constexpr (kWriters) ring.wait(smem.drained[group], ring.phase ^ 1);", "",
        FP8, case="plain, tile 80",
    ),
    "sm90: staged for the group": Mutation(
        SM90_STORE, GROUP_MEETS, "", FP8, case="plain, gathered"
    ),
    "sm90: drained by the group": Mutation(
        SM90_STORE, GROUP_MEETS, "", FP8, case="plain, gathered", nth=1
    ),
    # Its products, scales and fp8 rows.
    "sm90: fence": Mutation(SM90_COLUMNS, "wgmma::fence();", "", FP8, case="plain"),
    "sm90: commit": Mutation(SM90_COLUMNS, "wgmma::commit();", "", FP8, case="plain"),
    "sm90: wait for the first product": Mutation(
        SM90_COLUMNS, "wgmma::wait<1>();", "wgmma::wait<2>();", FP8, case="plain"
    ),
    "sm90: wait for the second product": Mutation(
        SM90_COLUMNS, "wgmma::wait<1>();", "wgmma::wait<2>();", FP8, case="plain", nth=1
    ),
    "sm90: wait for the last product": Mutation(
        SM90_COLUMNS, "wgmma::wait<0>();", "wgmma::wait<1>();", FP8, case="plain"
    ),
    "sm90: scales loaded ahead": Mutation(
        SM90_SCALES, "load(step + 4)", "load(step + 3)", FP8, case=DEEP
    ),
    "sm90: scales of four stages": Mutation(
        SM90_SCALES, "s == 1 ? v.y", "s == 1 ? v.x", FP8, case="scales in rows"
    ),
    "sm90: scales of unaligned rows": Mutation(
        SM90_SCALES, " && p.a_scale_row_stride % 4 == 0", "", FP8, case="scales in unaligned rows"
    ),
    "sm90: weight scales of a stage": Mutation(
        SM90_SCALES, "weight, 2 * s)", "weight, 0)", FP8, case=DEEP
    ),
    "sm90: scales of the first stage": Mutation(
        SM90_COLUMNS, "scales[v] = first[v];", "scales[v] = scales[v];", FP8, case="plain"
    ),
    "sm90: scales of the next stage": Mutation(
        SM90_COLUMNS, "if (load) scales[v] = next[v];", "", FP8, case="plain"
    ),
    "sm90: scales of the stage after a pair": Mutation(
        SM90_COLUMNS, "add(1, s < STAGES || more);", "add(1, s < STAGES);", FP8, case="gated"
    ),
    "sm90: scale rows of gate and up": Mutation(
        SM90_SCALES, "lane % 2 == 0 ? p.first", "lane % 2 == 1 ? p.first", FP8, case="gated"
    ),
    "sm90: scale rows of the tile": Mutation(
        SM90_SCALES, ", 0) * (GATED ? 1 : 2)", ", 0)", FP8, case="plain"
    ),
    "sm90: weight rows of a group": Mutation(
        SM90_COLUMNS, "quarter = GATED ? group : part", "quarter = part", FP8, case="gated"
    ),
    "sm90: scales of gate and up": Mutation(
        SM90_COLUMNS, "part == 0 ? weight_scale.x", "part == 1 ? weight_scale.x", FP8,
        case="gated",
    ),
    "sm90: weight scale of the next stage": Mutation(
        SM90_COLUMNS, "if (load) load_weight_scale();", "if (!load) load_weight_scale();", FP8,
        case="gated",
    ),
    "sm90: columns of a team": Mutation(
        SM90_COLUMNS, "tile.column_tile * 2 + group", "tile.column_tile * 2", FP8,
        case="activated",
    ),
    "sm90: scale past the last column": Mutation(
        SM90_COLUMNS, "if (block * 128 < p.n) {", "{", FP8, case="activated"
    ),
    "sm90: staging of a team": Mutation(
        SM90_COLUMNS, "to.rows[team] + token * kStageRow + i", "to.rows[0] + token * kStageRow + i",
        FP8, case="activated",
    ),
    "sm90: largest of a team": Mutation(
        SM90_COLUMNS, "to.amax[team * 4 + w]", "to.amax[w]", FP8, case="activated"
    ),
    "sm90: columns of the products": Mutation(
        SM90_COLUMNS, ".z <= kFewer)", ".z <= kFewer + 1)", FP8, case="columns, gated"
    ),
    "sm90: after the largest": Mutation(SM90_COLUMNS, TEAM_MEETS, "", FP8, case="gated"),
    "sm90: after the scale": Mutation(SM90_COLUMNS, TEAM_MEETS, "", FP8, case="gated", nth=1),
    "sm90: after the staging": Mutation(SM90_COLUMNS, TEAM_MEETS, "", FP8, case="gated", nth=2),
    # What differs in bf16.
    "sm90 bf16: wait for full": Mutation(
        SM90, "ptx::mbarrier_wait(full + 8 * ring.slot, ring.phase);", "", BF16, case="plain"
    ),
    "sm90 bf16: wait for empty, TMA": Mutation(SM90, TMA_WAIT, "", BF16, case=DEEP),
    "sm90 bf16: wait for empty, gathered": Mutation(SM90, EMPTY_WAIT, "", BF16, case=DEEP_GATED),
    "sm90 bf16: gathered arrivals": Mutation(
        SM90_BF16, "GATHER ? kGatherThreads : 0", "GATHER ? 64 : 0", case="gated"
    ),
    "sm90 bf16: fence": Mutation(SM90_BF16, "wgmma::fence();", "", case="plain"),
    "sm90 bf16: wait for the stage before": Mutation(
        SM90_BF16, "wgmma::wait<1>();", "wgmma::wait<2>();", case=DEEP
    ),
    "sm90 bf16: wait for the last": Mutation(
        SM90_BF16, "wgmma::wait<0>();", "wgmma::wait<1>();", case="plain"
    ),
    "sm90 bf16: release before the product": Mutation(
        SM90_BF16, "if (left < steps) in.release(in.ring.previous(), lane);", "",
        case=DEEP, moved="wgmma::wait<1>();",
    ),
    "sm90 bf16: last release": Mutation(
        SM90_BF16, "in.release(in.ring.previous(), lane, tile.rows > 0);", "", case=DEEP
    ),
    "sm90 bf16: columns of the products": Mutation(
        SM90_BF16, "if (rows <= kFewer)", "if (rows <= kFewer + 1)", case="columns"
    ),
    "sm90 bf16: rows of gate and up": Mutation(
        SM90_BF16, "GATED ? kHalfBytes : kHalfBytes / 2", "kHalfBytes / 2", case="gated"
    ),
    "sm90 bf16: gate and up": Mutation(
        SM90_STORE, "activate(x, GATED ? accum[1][i] *", "activate(accum[1][i], GATED ? x *",
        BF16, case="gated",
    ),
    "sm90 bf16: staged for the group": Mutation(SM90_STORE, GROUP_MEETS, "", BF16, case="gated"),
    "sm90 bf16: drained by the group": Mutation(
        SM90_STORE, GROUP_MEETS, "", BF16, case="gated", nth=1
    ),
    "sm90 bf16: drained": Mutation(
        SM90_STORE, "if constexpr (kWriters) ring.wait(smem.drained[group], ring.phase ^ 1);", "",
        BF16, case=DEEP,
    ),
    "sm90 bf16: cluster starts together": Mutation(
        SM90, CLUSTER_STARTS, "__syncthreads();", BF16, case="clusters, gated"
    ),
    "sm90 bf16: cluster ends together": Mutation(SM90_BF16, CLUSTER_ENDS, "", case=FEW),
    # Scales of tensors, and weights of tokens.
    "gemm tensor: scales of gate and up": Mutation(
        GEMM, "half ? p.up_scale_row : p.gate_scale_row", "p.gate_scale_row",
        case="fp8 tensor gated to fp8",
    ),
    "gemm tensor: an expert's scale of rows": Mutation(
        GEMM, "p.a_scale[expert * p.a_scale_row_stride]", "p.a_scale[0]",
        case="fp8 tensor plain, tile 128",
    ),
    "gemm tensor: an expert's scale": Mutation(
        GEMM, "p.b_scale + expert * p.b_scale_rows;", "p.b_scale;",
        case="fp8 tensor plain, tile 128",
    ),
    "gemm tensor: an expert's scale of the result": Mutation(
        GEMM, "p.out_scale[expert * p.out_scale_row_stride]", "p.out_scale[0]",
        case="fp8 tensor gated to fp8",
    ),
    "gemm tensor: experts without weights": Mutation(
        GEMM, "row < row_end && expert < p.num_weighted", "row < row_end",
        case="fp8 tensor, weights of tokens",
    ),
    "gemm tensor: columns of weights": Mutation(
        GEMM, "token * p.token_weights_columns", "token", case="fp8 tensor, weights of tokens"
    ),
    "gemm tensor: row of a weight": Mutation(
        GEMM, "row0 + i * 16 + h * 8;\n      float", "row0 + i * 16;\n      float",
        case="fp8 tensor, weights of tokens",
    ),
    "sm90 tensor: scales of gate and up": Mutation(
        SM90_BF16, "a * w[p.second_scale_row]", "a * w[p.first_scale_row]", case="fp8 gated"
    ),
    "sm90 tensor: an expert's scale of rows": Mutation(
        SM90_BF16, "p.a_scale[expert * p.a_scale_row_stride]", "p.a_scale[0]", case="fp8 plain"
    ),
    "sm90 tensor: an expert's scale": Mutation(
        SM90_BF16, "p.w_scale + expert * p.w_scale_rows;", "p.w_scale;", case="fp8 plain"
    ),
    "sm90 tensor: an expert's scale of the result": Mutation(
        SM90_BF16, "p.out_scale[tile.expert * p.out_scale_row_stride]", "p.out_scale[0]",
        case="fp8 gated",
    ),
    "sm90 tensor: scaled rows": Mutation(
        SM90_STORE, "accum[part][i] * scale;", "accum[part][i];", BF16, case="fp8 plain"
    ),
    "sm90 tensor: experts without weights": Mutation(
        SM90_BF16, " && tile.expert < p.num_weighted", "", case=WEIGHTED
    ),
    "sm90 tensor: columns of weights": Mutation(
        SM90_BF16, "token * p.token_weights_columns", "token", case=WEIGHTED
    ),
    "sm90 tensor: tokens of weights": Mutation(
        SM90_BF16, "p.token_idx[tile.row0 + row]", "p.token_idx[tile.row0]", case=WEIGHTED
    ),
    "sm90 tensor: weights past 32 tokens": Mutation(
        SM90_BF16, "of_lane[first / kWarpSize]", "of_lane[0]", case="fp8 every remainder, gated"
    ),
    "sm90 tensor: weight of the second token": Mutation(
        SM90_BF16, "weights.of(token0, from + 1)", "weights.of(token0, from)", case=WEIGHTED
    ),
    "sm90 tensor: gate and up": Mutation(
        SM90_BF16, "GATED ? accum[1][at + i] * scale.y * weight[i % 2] : x", "x", case="fp8 gated"
    ),
    "sm90 tensor: pairs of columns": Mutation(
        SM90_BF16, "e4m3x2_from_f32(y[1], y[3])", "e4m3x2_from_f32(y[0], y[2])", case="fp8 gated"
    ),
    "sm90 tensor: order of columns": Mutation(
        SM90_STORE, "__byte_perm(v.x, v.y, 0x7531)", "__byte_perm(v.z, v.w, 0x7531)", BF16,
        case="fp8 gated",
    ),
    "sm90 tensor: pieces of a row": Mutation(
        SM90_STORE, "64 * ELEM_BYTES / 16", "8", BF16, case="fp8 gated"
    ),
    "sm90 tensor: staged for the group": Mutation(SM90_BF16, GROUP_MEETS, "", case="fp8 gated"),
    "sm90 tensor: drained by the group": Mutation(
        SM90_BF16, GROUP_MEETS, "", case="fp8 every remainder, gated", nth=1
    ),
    "sm90 tensor: staged": Mutation(
        SM90_STORE, "ring.wait(smem.staged[group], ring.phase);", "", BF16,
        case="fp8 gated, rows in order",
    ),
    "sm90 tensor: drained": Mutation(
        SM90_BF16, "if constexpr (kWriters) ring.wait(smem.drained[group], ring.phase ^ 1);", "",
        case="fp8 silu, rows in order, one block",
    ),
    # A slot of -1 written or used.
    "finalize: weights of ones": Mutation(
        "finalize.cu", "(p.weights, slot) : 1.0f", "(p.weights, slot) : 0.0f",
        case="without weights",
    ),
    "finalize: slot of -1": Mutation(
        "finalize.cu", "if (row[k] < 0) continue;", "", case="tails"
    ),
    # Arithmetic that must be exact, and order.
    "exact: order of the sum": Mutation(
        "exact.cuh",
        "for (int offset = 16; offset > 0; offset /= 2) {",
        "for (int offset = 1; offset < 32; offset *= 2) {",
        "routing_topk",
        case="default",
    ),
    "e4m3: scale": Mutation(
        "e4m3.cuh", "__fdiv_rn(amax, kE4m3Max)", "__fmul_rn(amax, 1.0f / kE4m3Max)",
        "quantize_fp8_block", case="extreme",
    ),
    "finalize: fused": Mutation(
        "finalize.cu",
        "__fadd_rn(sum[c], __fmul_rn(weight[k], x[c]))",
        "__fmaf_rn(weight[k], x[c], sum[c])", case="wide",
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _compiler() -> None:
    loader.require()


def assert_caught(mutation: Mutation) -> None:
    """Fail unless a case of the kernel notices the mutation."""
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


@pytest.mark.parametrize("name", MUTATIONS, ids=lambda n: n.replace(" ", "_"))
def test_caught(name):
    assert_caught(MUTATIONS[name])
