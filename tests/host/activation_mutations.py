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
    "activation: zeros": Mutation(
        "activation.cu", "largest == 0.0f ? kMinScale : ", "", case="silu, scales"
    ),
    "activation: rows of the other way": Mutation(
        "activation.cu",
        "if (to_do) store(y, scale);",
        "if (low) store(y, scale);",
        case="silu, scales",
    ),
    "activation: last rows": Mutation(
        "activation.cu",
        " && row0 + r < num_held",
        "",
        case="fp8 to fp8, odd tile",
    ),
    "activation: next unit": Mutation(
        "activation.cu",
        "block += p.block_step - wrapped * p.num_blocks;",
        "block += p.block_step;",
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
        "activation.cu", "{scale + (swapped ? half : 0)", "{scale", case="704, several rounds"
    ),
    "activation: pairs": Mutation(
        "activation.cu", "INTERLEAVED == 2 ? 1 - side : side", "side", case="interleaved up first"
    ),
    "activation: expert": Mutation(
        "activation.cu",
        "p.tile_expert[row0 / p.tile]",
        "p.tile_expert[row0 / p.tile / 2]",
        case="interleaved up first",
    ),
    "activation: padding": Mutation(
        "activation.cu",
        "tokens[r] >= 0",
        "tokens[r] >= -1",
        case="interleaved up first",
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
