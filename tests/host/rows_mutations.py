"""Mutations of ``sm90_fp8_rows_grouped_gemm``: of what it does not share with the other GEMMs."""

from __future__ import annotations

from tests.host.mutations import Mutation

KERNEL = "sm90_fp8_rows_grouped_gemm"
ROWS = f"{KERNEL}.cu"
COMMON, SCALES = "sm90_grouped.cuh", "sm90_scales.cuh"
COLUMNS = "sm90_columns.cuh"
DEEP, DEEP_GATED = "one block, several tiles", "one block, several tiles, gated"

ROWS_MUTATIONS = {
    f"rows: {name}": mutation
    for name, mutation in {
        "wait for empty, scales": Mutation(
            SCALES, "ring.wait(smem.empty, ring.phase ^ 1);", "", KERNEL, case=DEEP
        ),
        "wait for gathered": Mutation(
            SCALES, "ring.wait(smem.landed, ring.phase);", "", KERNEL, case="gated"
        ),
        "wait for full": Mutation(
            ROWS, "in.wait();\n        of =", "of =", case=DEEP
        ),
        "wait for the product": Mutation(
            ROWS, "wgmma::wait<0>();", "wgmma::wait<1>();", case="plain"
        ),
        "fence": Mutation(ROWS, "wgmma::fence();", "", case="plain"),
        "commit": Mutation(ROWS, "wgmma::commit();", "", case="plain"),
        "release before the product": Mutation(
            ROWS, "wgmma::wait<0>();\n      in.release(slot, lane);",
            "in.release(slot, lane);\n      wgmma::wait<0>();", case=DEEP,
        ),
        "tokens of a consumer": Mutation(
            ROWS, "+ group * (kTokens * 128)", "+ group * (kTokens * 64)", case="shares"
        ),
        "half of the weights": Mutation(
            ROWS, "of.weights + kHalfBytes / 16", "of.weights", case="plain"
        ),
        "scale of the second token": Mutation(
            ROWS, "scale[row + 8]", "scale[row]", case="plain"
        ),
        "scales of two tokens": Mutation(
            ROWS, "i % 4 < 2 ? by.x : by.y", "i % 2 < 1 ? by.x : by.y", case="plain"
        ),
        "scale of the weights": Mutation(
            ROWS, "part == 0 ? weight.x", "part == 1 ? weight.x", case="gated"
        ),
        "scale rows of the tile": Mutation(
            SCALES, ", 0) * (GATED ? 1 : 2)", ", 0)", KERNEL, case="plain"
        ),
        "scales loaded ahead": Mutation(
            SCALES, "load(step + 4)", "load(step + 3)", KERNEL, case=DEEP
        ),
        "largest of four lanes": Mutation(
            ROWS, "amax = fmaxf(amax, __shfl_xor_sync(kFullMask, amax, 2));", "", case="gated"
        ),
        "scale past the last token": Mutation(
            ROWS, "&& token < rows &&", "&&", case="shares, gated"
        ),
        "scale past the last column": Mutation(
            ROWS, "token < rows && block * 128 < p.n", "token < rows", case="activated"
        ),
        "after the staging": Mutation(ROWS, "__syncwarp();\n  const", "const", case="gated"),
        "columns, fp8": Mutation(ROWS, "if (column < p.n) {", "{", case="gated"),
        "staged": Mutation(
            ROWS, "ring.wait(smem.staged[group], ring.phase);", "", case="plain"
        ),
        "drained": Mutation(
            ROWS, "if constexpr (kWriters) ring.wait(smem.drained[group], ring.phase ^ 1);", "",
            case=DEEP,
        ),
        "rows of the blocks": Mutation(
            COMMON, "begin += rank * height", "begin += rank * 64", KERNEL, case="clusters, plain"
        ),
        "few rows, weights": Mutation(
            COMMON, "if (!tile.shares) {", "if (CLUSTER == 1) {", KERNEL,
            case="clusters, few rows, gated",
        ),
        "few rows, columns": Mutation(
            COMMON, "column_tile + rank : -1", "column_tile : -1", KERNEL,
            case="clusters, few rows, gated",
        ),
        "nothing left to do": Mutation(
            COMMON, "column_tile < 0 ? 1 : steps", "column_tile < 0 ? 0 : steps", KERNEL,
            case="clusters, few rows, gated",
        ),
        "columns: most": Mutation(
            COMMON, "rows <= kColumns; }", "rows <= kColumns + 1; }", KERNEL, case="shares"
        ),
        "columns: weight scale of a group": Mutation(
            COLUMNS, "group == 0 ? weight_scale.x", "group == 1 ? weight_scale.x", KERNEL,
            case="clusters, columns",
        ),
        "columns: scales": Mutation(
            SCALES, "if (tile.has_columns()) {", "if (false) {", KERNEL, case="shares"
        ),
        "columns: written": Mutation(
            ROWS, "if (tile.has_columns()) {", "if (false) {", case="clusters, columns"
        ),
        "columns: release": Mutation(
            COLUMNS, "in.release(in.ring.previous(), lane, tile.rows > 0);", "", KERNEL, case=DEEP
        ),
        "columns: before the next staging": Mutation(
            COLUMNS, "if constexpr (WHOLE_BLOCKS) meet();", "", KERNEL,
            case="columns and rows by turns",
        ),
    }.items()
}  # fmt: skip
