"""The fused-MoE kernel in Triton that cumoe is compared with; imported only where Triton is.

Written for this comparison after the well-known design of vLLM and SGLang: slots sorted by expert
and padded per expert to whole blocks, one program for each block of the result, rows of the left
operand gathered through the sorted slots, program order grouped so that neighbours share weights
in L2.
"""

from __future__ import annotations

import triton
import triton.language as tl

SCALE_BLOCK = tl.constexpr(128)


@triton.jit(do_not_specialize=["num_slots", "slots_per_row"])  # type: ignore[untyped-decorator]
def triton_moe(  # type: ignore[no-untyped-def]  # Triton would evaluate annotations
    a,  # (num_rows, k), bf16 or e4m3; k innermost, as in b and in c
    b,  # (num_experts, n, k)
    c,  # (num_slots, n), bf16
    a_scale,  # (num_rows, k / 128), float32
    b_scale,  # (num_experts, n / 128, k / 128), float32
    sorted_slots,  # (num_blocks_m * BLOCK_M,), int32; num_slots in padding
    block_expert,  # (num_blocks_m,), int32
    num_slots,
    slots_per_row,
    n,
    k,
    FP8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """``c[s] = a[s // slots_per_row] @ b[expert(s)].T``; n and k are whole blocks."""
    # Programs run down GROUP_M blocks of rows before they step to the next block of columns.
    program = tl.program_id(0)
    blocks_n = n // BLOCK_N
    blocks_m = tl.num_programs(0) // blocks_n
    first_m = program // (GROUP_M * blocks_n) * GROUP_M
    height = min(blocks_m - first_m, GROUP_M)
    place = program % (GROUP_M * blocks_n)
    block_m = first_m + place % height
    block_n = place // height

    slot = tl.load(sorted_slots + block_m * BLOCK_M + tl.arange(0, BLOCK_M))
    live = slot < num_slots
    row = (slot // slots_per_row).to(tl.int64)
    expert = tl.load(block_expert + block_m).to(tl.int64)
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    a_at = a + row[:, None] * k + depth[None, :]
    b_at = b + expert * n * k + column[None, :] * k + depth[:, None]
    if FP8:
        num_scales = k // SCALE_BLOCK
        a_scale_at = a_scale + row * num_scales
        b_scale_at = b_scale + expert * (n // SCALE_BLOCK) * num_scales

    accum = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        a_tile = tl.load(a_at, mask=live[:, None], other=0.0)
        b_tile = tl.load(b_at)
        if FP8:
            # One scale of each operand per 128 of k: products are scaled before they are added.
            scale = start // SCALE_BLOCK
            a_factor = tl.load(a_scale_at + scale, mask=live, other=0.0)
            if BLOCK_N <= SCALE_BLOCK:
                b_row = block_n * BLOCK_N // SCALE_BLOCK
                factor = a_factor * tl.load(b_scale_at + b_row * num_scales + scale)
                accum += tl.dot(a_tile, b_tile) * factor[:, None]
            else:
                b_factor = tl.load(b_scale_at + column // SCALE_BLOCK * num_scales + scale)
                accum += tl.dot(a_tile, b_tile) * a_factor[:, None] * b_factor[None, :]
        else:
            accum = tl.dot(a_tile, b_tile, accum)
        a_at += BLOCK_K
        b_at += BLOCK_K

    c_at = c + slot.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(c_at, accum.to(tl.bfloat16), mask=live[:, None])
