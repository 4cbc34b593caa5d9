"""Changed lines of the activation kernel, for ``test_host_mutations.py``."""

from __future__ import annotations

from tests.host.mutations import Mutation

ACTIVATION_MUTATIONS = {
    "activation: columns": Mutation(
        "activation.cu", "inside = column < p.intermediate_size", "inside = true", case="to fp8"
    ),
    "activation: half a lane loaded": Mutation(
        "activation.cu",
        "if (first ? low : high)",
        "if (low)",
        case="halves",
    ),
    "activation: half a lane stored": Mutation(
        "activation.cu",
        "c * kElems < 8 || high",
        "true",
        case="halves",
    ),
    "activation: rows held": Mutation(
        "activation.cu", "*p.num_held_rows : p.num_rows", "p.num_rows : p.num_rows", case="shard"
    ),
    "activation: scale of up": Mutation(
        "activation.cu", "fabsf(x_scale[1]) <= 0x1p100f", "true", case="silu, scales"
    ),
    "activation: zeros": Mutation("activation.cu", "zeros ? kMinScale : ", "", case="silu, scales"),
    "activation: rows of the other way": Mutation(
        "activation.cu", "finish(!usual);", "finish(true);", case="silu, scales"
    ),
    "activation: scale of a lane past the row": Mutation(
        "activation.cu",
        "if (chosen & (lane == r))",
        "if (chosen & low & (lane == r))",
        case="shard",
    ),
    "activation: last rows": Mutation(
        "activation.cu", "if (index >= size) return -1;", "", case="fp8 to fp8, odd tile"
    ),
    "activation: last rows, first round": Mutation(
        "activation.cu", "first < num_held ? row_entry : -1", "row_entry", case="shard"
    ),
    "activation: last rows, next rounds": Mutation(
        "activation.cu",
        "num_entries = by_slots ? p.num_slots : num_held",
        "num_entries = by_slots ? p.num_slots : p.num_rows",
        case="shard, several rounds",
    ),
    "activation: hardly fewer slots than rows": Mutation(
        "activation.cu", "num_held / 4 * 3", "num_held", case="hardly fewer slots than rows"
    ),
    "activation: slots of a shard": Mutation(
        "activation.cu", " && p.num_slots <= num_held / 4 * 3", "", case="shard"
    ),
    "activation: rows of slots": Mutation(
        "activation.cu", "entry < 0 || by_slots", "entry < 0", case="fp8 to fp8, experts"
    ),
    "activation: next slots": Mutation(
        "activation.cu",
        "look_up(by_slots ? p.permuted_idx : p.token_idx, group",
        "look_up(p.token_idx, group",
        case="704, several rounds of slots",
    ),
    "activation: a row for each lane": Mutation(
        "activation.cu", "from_lane(own_row, r)", "from_lane(own_row, 0)", case="exact"
    ),
    "activation: scales for each side": Mutation(
        "activation.cu", "side * ROWS + r", "r", case="exact"
    ),
    "activation: parameters for each row": Mutation(
        "activation.cu",
        "from_lane(act.alpha, r)",
        "from_lane(act.alpha, 0)",
        case="fp8 to fp8, experts",
    ),
    "activation: next unit": Mutation(
        "activation.cu",
        "block += p.block_step - wrapped * p.num_blocks;",
        "block += p.block_step;",
        case="704, several rounds",
    ),
    "activation: 32-bit offsets": Mutation(
        "activation.cu",
        "static_cast<uint64_t>(static_cast<uint32_t>(row)) * row_bytes",
        "static_cast<uint32_t>(row) * row_bytes",
        case="offsets past 2^32, slots",
    ),
    "activation: one warp's shuffles": Mutation(
        "activation.cu", "int offset = kLanes / 2;", "int offset = kLanes;", case="exact"
    ),
    "activation: zeros of their sign": Mutation(
        "e4m3.cuh",
        "__fmaf_rn(-__fmaf_rn(b, q, -a), reciprocal, q)",
        "__fmaf_rn(__fmaf_rn(-b, q, a), reciprocal, q)",
        "activation",
        case="exact, from float32",
    ),
    "activation: division by infinity": Mutation(
        "e4m3.cuh",
        "scale == INFINITY ? 0.0f : scale * factor",
        "scale * factor",
        "activation",
        case="exact, from float32",
    ),
    "activation: tiny scales": Mutation(
        "e4m3.cuh", "scale < 1.0f ? 0x1p64f : 0x1p-64f", "1.0f", "activation", case="midpoints"
    ),
    "activation: quotient": Mutation(
        "e4m3.cuh",
        "return __fmaf_rn(-__fmaf_rn(b, q, -a), reciprocal, q);",
        "return q;",
        "activation",
        case="midpoints",
    ),
    "activation: 448": Mutation(
        "e4m3.cuh",
        "quotient(amax, kE4m3Max, 1.0f / kE4m3Max)",
        "amax * (1.0f / kE4m3Max)",
        "activation",
        case="midpoints",
    ),
    "activation: gate and up": Mutation(
        "activation.cu",
        "sides[2] = {x + (swapped ? half_bytes : 0)",
        "sides[2] = {x",
        case="fp8 to fp8, experts",
    ),
    "activation: scales of gate and up": Mutation(
        "activation.cu",
        "(lane / ROWS % kSides != 0) != swapped",
        "lane / ROWS % kSides != 0",
        case="704, several rounds",
    ),
    "activation: pairs": Mutation(
        "activation.cu", "INTERLEAVED == 2 ? 1 - side : side", "side", case="interleaved up first"
    ),
    "activation: expert": Mutation(
        "activation.cu",
        "p.tile_expert[own_row / p.tile]",
        "p.tile_expert[own_row / p.tile / 2]",
        case="interleaved up first",
    ),
    "activation: padding": Mutation(
        "activation.cu",
        "entry < 0 || by_slots",
        "entry < -1 || by_slots",
        case="shard",
    ),
    "activation: limit of up": Mutation(
        "activation.cuh", "x < -limit ? -limit : x", "x", "activation"
    ),
    "activation: NaN of relu2": Mutation(
        "activation.cuh",
        "x < 0.0f ? 0.0f : x",
        "x > 0.0f ? x : 0.0f",
        "activation",
        case="relu2, fp8 to fp8",
    ),
}
