"""Changed lines of the quantisation kernels and of finalize, for ``test_host_mutations.py``."""

from __future__ import annotations

from tests.host.mutations import BARRIER, Mutation

QUANTIZE_MUTATIONS = {
    "block: rows": Mutation(
        "quantize_fp8_block.cu", "row < p.num_rows ? ", "row <= p.num_rows ? ", case="tails"
    ),
    "block: columns": Mutation(
        "quantize_fp8_block.cu", "valid_of_16(column, p.num_columns)", "16", case="tails"
    ),
    "block: rows of eight bytes": Mutation(
        "quantize_fp8_block.cu", "p.num_columns % 16 == 0", "true", case="tails"
    ),
    "block: 32-bit offsets": Mutation(
        "quantize_fp8_block.cu", "const int64_t row =", "const int row =",
        case="offsets past 2^32",
    ),
    "block: slots without a row": Mutation(
        "raw.cuh", "if (row >= 0) store(row);", "store(row);", "quantize_fp8_block",
        case="permuted",
    ),
    "block: slots": Mutation(
        "raw.cuh", "row = index_[slot];", "row = index_[0];", "quantize_fp8_block",
        case="permuted",
    ),
    "tensor: rows of a permutation": Mutation(
        "quantize_fp8_tensor.cu", "row = PERMUTED ? static_cast<unsigned>(unit) / of_row : 0;",
        "row = 0;", case="permuted",
    ),
    "tensor: rows of eight bytes": Mutation(
        "quantize_fp8_tensor.cu", "!PERMUTED || p.num_columns % kElems == 0", "true",
        case="permuted, one slot, tails",
    ),
    "tensor: 32-bit offsets": Mutation(
        "quantize_fp8_tensor.cu", "p.values + row * p.num_columns",
        "p.values + (int)(row * p.num_columns)",
        case="permuted, offsets past 2^32",
    ),
    "token: barrier": Mutation("quantize_fp8_token.cu", BARRIER, "", case="float32"),
    "token: rows": Mutation(
        "quantize_fp8_token.cu", "row < p.num_rows ? p.num_columns : 0", "p.num_columns",
        case="several rows a block",
    ),
    "token: columns": Mutation(
        "quantize_fp8_token.cu", "if (column < num_columns) store", "store", case="float32"
    ),
    "token: warps of the row": Mutation(
        "quantize_fp8_token.cu", "warp_amax[first + i]", "warp_amax[i]",
        case="float16, two rows a block",
    ),
    "token: the last piece alone": Mutation(
        "quantize_fp8_token.cu", "load(--piece)", "--piece", case="several pieces"
    ),
    "tensor: barrier of the maxima": Mutation(
        "raw.cuh", BARRIER, "", "quantize_fp8_tensor", case="tails"
    ),
    "tensor: all maxima": Mutation(
        "raw.cuh", "for (int i = threadIdx.x; i < count; i += blockDim.x)",
        "for (int i = threadIdx.x; i < count - 1; i += blockDim.x)", "quantize_fp8_tensor",
    ),
    "tensor: half a lane": Mutation(
        "raw.cuh", "column + 8 < num_columns ? 16", "column < num_columns ? 16",
        "quantize_fp8_tensor", case="tails",
    ),
    "tensor: large quotients": Mutation(
        "e4m3.cuh", "fminf(fmaxf(a * reciprocal, -0x1p20f), 0x1p20f)", "a * reciprocal",
        "quantize_fp8_tensor", case="given",
    ),
    "tensor: quotient": Mutation(
        "e4m3.cuh", "y[i] = __fmaf_rn(-__fmaf_rn(divisor, q, -a), reciprocal, q);", "y[i] = q;",
        "quantize_fp8_tensor", case="ties",
    ),
    "tensor: infinite scale": Mutation(
        "e4m3.cuh", "const bool infinite = scale == INFINITY;", "const bool infinite = false;",
        "quantize_fp8_tensor", case="wild",
    ),
    "tensor: tiny scale": Mutation(
        "e4m3.cuh", "scale < 0x1p-80f ? 0x1p64f : ", "", "quantize_fp8_tensor", case="given, tiny",
    ),
    "tensor: huge scale": Mutation(
        "e4m3.cuh", "scale > 0x1p90f ? 0x1p-64f : 1.0f", "1.0f", "quantize_fp8_tensor",
        case="given, huge",
    ),
    "amax: barrier": Mutation("tensor_amax.cu", BARRIER, "", case="several rounds"),
    "amax: warps": Mutation(
        "tensor_amax.cu", "i < kThreads / kWarpSize", "i < kThreads / kWarpSize - 1",
        case="several rounds",
    ),
    "amax: end": Mutation("tensor_amax.cu", "index < p.num_elems ? 8 : 0", "8", case="one row"),
    "ue8m0: up": Mutation(
        "e4m3.cuh", "kMinUe8m0Scale)) + 0x7fffffu) >> 23", "kMinUe8m0Scale))) >> 23",
        "quantize_fp8_ue8m0",
    ),
    "ue8m0: floor": Mutation(
        "e4m3.cuh", "fmaxf(scale, kMinUe8m0Scale)", "scale", "quantize_fp8_ue8m0", case="extreme"
    ),
    "ue8m0: NaN scale": Mutation(
        "e4m3.cuh", "scale < 255u ? (254u - scale) << 23 : 0u", "(254u - scale) << 23",
        "quantize_fp8_ue8m0", case="tails",
    ),
    "ue8m0: bytes of a word": Mutation(
        "quantize_fp8_ue8m0.cu", "scales |= __shfl_xor_sync(kFullMask, scales, 2 * kGroupLanes);",
        "", case="tails",
    ),
    "ue8m0: unused bytes": Mutation(
        "quantize_fp8_ue8m0.cu", "valid ? scale << lane / kGroupLanes * 8 : 0",
        "scale << lane / kGroupLanes * 8", case="tails",
    ),
    "ue8m0: words between columns": Mutation(
        "quantize_fp8_ue8m0.cu", "word + 1 < p.num_words ? p.word_stride : p.num_rows",
        "p.num_rows", case="tails",
    ),
    "ue8m0: words past the array": Mutation(
        "quantize_fp8_ue8m0.cu", "word + 1 < p.num_words ? p.word_stride : p.num_rows",
        "p.word_stride", case="tails",
    ),
    "nvfp4: tiles": Mutation(
        "fp4.cuh", "row_in_tile % 32 * 16 + row_in_tile / 32 * 4",
        "row_in_tile / 4 * 16 + row_in_tile % 4 * 4", "quantize_nvfp4", case="tails, swizzled",
    ),
    "nvfp4: rows of tiles": Mutation(
        "fp4.cuh", "row / 128 * (num_groups / 4)", "row / 128", "quantize_nvfp4",
        case="tails, swizzled",
    ),
    "nvfp4: padding": Mutation(
        "quantize_nvfp4.cu", "if (row < p.scale_rows) {", "if (valid) {", case="tails, swizzled"
    ),
    "nvfp4: past the scales": Mutation(
        "quantize_nvfp4.cu", "if (row < p.scale_rows) {", "{", case="tails"
    ),
    "nvfp4: saturation": Mutation(
        "quantize_nvfp4.cu", "has_nan || !(__fmul_rn(amax, factor) < 7.0f)",
        "has_nan", case="float16",
    ),
    "nvfp4: NaN": Mutation(
        "quantize_nvfp4.cu", "has_nan || !(__fmul_rn(amax, factor) < 7.0f)",
        "!(__fmul_rn(amax, factor) < 7.0f)", case="tails",
    ),
    "nvfp4: sign of NaN": Mutation(
        "fp4.cuh", "if (y[i] != y[i]) bits[i] = 0;", "", "quantize_nvfp4", case="tails"
    ),
    "nvfp4: steps below 1": Mutation(
        "fp4.cuh", "fmaxf(y, 1.0f)", "fmaxf(y, 0.5f)", "quantize_nvfp4", case="ties"
    ),
    "nvfp4: even and odd": Mutation(
        "fp4.cuh", "codes[0] + (codes[1] << 4)", "codes[1] + (codes[0] << 4)", "quantize_nvfp4",
        case="one row",
    ),
    "nvfp4: signs": Mutation(
        "fp4.cuh", "signs[0] >> 4 & 0x08080808u", "signs[0] >> 4 & 0x00080808u", "quantize_nvfp4",
        case="tails",
    ),
    "nvfp4: a sixth": Mutation(
        "fp4.cuh", "__fmul_rn(global_scale, __fmul_rn(amax, 1.0f / 6.0f))",
        "__fdiv_rn(__fmul_rn(global_scale, amax), 6.0f)", "quantize_nvfp4", case="tails",
    ),
    "nvfp4: no scale": Mutation(
        "fp4.cuh", "wide == 0.0f ? 0.0f : ", "", "quantize_nvfp4", case="extreme"
    ),
    "nvfp4: largest global scale": Mutation(
        "fp4.cuh", "fminf(fmaxf(__fdiv_rn(kFp4Max, amax), kMinScale), 3.402823466e38f)",
        "fmaxf(__fdiv_rn(kFp4Max, amax), kMinScale)", "quantize_nvfp4", case="its own scale, tiny",
    ),
    "nvfp4: least global scale": Mutation(
        "fp4.cuh", "fmaxf(__fdiv_rn(kFp4Max, amax), kMinScale)", "__fdiv_rn(kFp4Max, amax)",
        "quantize_nvfp4", case="its own scale, infinite",
    ),
    "finalize: rows of a batch": Mutation(
        "finalize.cu", "const int64_t from = row[first + i];",
        "const int from = row[first + i];", case="offsets past 2^32",
    ),
    "finalize: columns of the token": Mutation(
        "finalize.cu", "threadIdx.x < p.columns", "true", case="top 32 and a shared one"
    ),
}  # fmt: skip
