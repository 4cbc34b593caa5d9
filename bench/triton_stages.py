"""The small kernels in Triton that cumoe's are compared with; imported only where Triton is.

Written for this comparison, as the users of Triton write them: a program takes a tile that it loads
once, reduces the groups of in registers, and stores. In all but the row kernel and the flat ones a
tile is ``ROWS`` rows by ``COLUMNS`` columns, held as (groups, columns of a group). Sizes of rows
are compile-time constants, numbers of rows are not.
"""

from __future__ import annotations

import triton
import triton.language as tl

FP8_MAX = tl.constexpr(448.0)
FP4_MAX = tl.constexpr(2688.0)  # 6 * 448
SIXTH = tl.constexpr(1.0 / 6.0)
MIN_SCALE = tl.constexpr(2.0**-126)
MIN_TOKEN_SCALE = tl.constexpr(2.0**-9 / 448)
MIN_UE8M0_SCALE = tl.constexpr(1e-10)
SCALE_BLOCK = tl.constexpr(128)
FP4_GROUP = tl.constexpr(16)


@triton.jit  # type: ignore[untyped-decorator]
def _tile(  # type: ignore[no-untyped-def]  # Triton would evaluate annotations
    WIDTH: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Return the row and the group of each of the tile's groups; tiles of a row are neighbours."""
    side_by_side: tl.constexpr = WIDTH // COLUMNS
    groups: tl.constexpr = COLUMNS // GROUP
    here = tl.arange(0, ROWS * groups)
    row = tl.program_id(0) // side_by_side * ROWS + here // groups
    group = tl.program_id(0) % side_by_side * groups + here % groups
    return row.to(tl.int64), group


@triton.jit  # type: ignore[untyped-decorator]
def _fp8_scale(amax, least):  # type: ignore[no-untyped-def]
    return tl.maximum(tl.div_rn(amax, tl.full(amax.shape, FP8_MAX, tl.float32)), least)


@triton.jit  # type: ignore[untyped-decorator]
def _silu(x):  # type: ignore[no-untyped-def]
    return x / (1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def activation(  # type: ignore[no-untyped-def]
    x,  # (num_rows, 2 * WIDTH), e4m3 or bf16: gate, then up
    x_scale,  # (num_rows, 2 * WIDTH / 128), float32; not read for bf16
    values,  # (num_rows, WIDTH), e4m3
    scale,  # (num_rows, WIDTH / 128), float32
    num_rows,
    FP8: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``values * scale = silu(gate) * up``, one scale for each row and 128 columns."""
    blocks: tl.constexpr = WIDTH // SCALE_BLOCK
    row, block = _tile(WIDTH, SCALE_BLOCK, ROWS, COLUMNS)
    live = row < num_rows
    column = block[:, None] * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)[None, :]
    gate_at = x + row[:, None] * (2 * WIDTH) + column
    gate = tl.load(gate_at, mask=live[:, None], other=0.0).to(tl.float32)
    up = tl.load(gate_at + WIDTH, mask=live[:, None], other=0.0).to(tl.float32)
    if FP8:
        scale_at = x_scale + row * (2 * blocks) + block
        gate *= tl.load(scale_at, mask=live, other=0.0)[:, None]
        up *= tl.load(scale_at + blocks, mask=live, other=0.0)[:, None]
    y = _silu(gate) * up
    y_scale = _fp8_scale(tl.max(tl.abs(y), axis=1), MIN_SCALE)
    tl.store(scale + row * blocks + block, y_scale, mask=live)
    q = (y * (1.0 / y_scale)[:, None]).to(tl.float8e4nv)
    tl.store(values + row[:, None] * WIDTH + column, q, mask=live[:, None])


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def quantize_block(  # type: ignore[no-untyped-def]
    x,  # (num_rows, WIDTH), bf16
    values,  # (num_rows, WIDTH), e4m3
    scale,  # (num_rows, WIDTH / 128), float32
    num_rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Fp8 with one scale for each row and 128 columns."""
    row, block = _tile(WIDTH, SCALE_BLOCK, ROWS, COLUMNS)
    live = row < num_rows
    lane = tl.arange(0, SCALE_BLOCK)
    at = row[:, None] * WIDTH + block[:, None] * SCALE_BLOCK + lane[None, :]
    wide = tl.load(x + at, mask=live[:, None], other=0.0).to(tl.float32)
    y_scale = _fp8_scale(tl.max(tl.abs(wide), axis=1), MIN_SCALE)
    tl.store(scale + row * (WIDTH // SCALE_BLOCK) + block, y_scale, mask=live)
    q = (wide * (1.0 / y_scale)[:, None]).to(tl.float8e4nv)
    tl.store(values + at, q, mask=live[:, None])


@triton.jit(do_not_specialize=["num_rows", "stride"])  # type: ignore[untyped-decorator]
def quantize_ue8m0(  # type: ignore[no-untyped-def]
    x,  # (num_rows, WIDTH), bf16
    values,  # (num_rows, WIDTH), e4m3
    scale,  # (WIDTH / GROUP / 4, stride, 4), uint8: group g of a row is byte g % 4 of word g // 4
    num_rows,
    stride,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Fp8 with a power of two for each row and GROUP columns."""
    row, group = _tile(WIDTH, GROUP, ROWS, COLUMNS)
    live = row < num_rows
    lane = tl.arange(0, GROUP)
    at = row[:, None] * WIDTH + group[:, None] * GROUP + lane[None, :]
    wide = tl.load(x + at, mask=live[:, None], other=0.0).to(tl.float32)
    least = _fp8_scale(tl.max(tl.abs(wide), axis=1), MIN_UE8M0_SCALE)
    exponent = (least.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23  # up to a power of two
    scale_at = (group // 4 * stride + row) * 4 + group % 4
    tl.store(scale + scale_at, exponent.to(tl.uint8), mask=live)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(values + at, (wide * inverse[:, None]).to(tl.float8e4nv), mask=live[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def quantize_token(  # type: ignore[no-untyped-def]
    x,  # (num_rows, WIDTH), bf16
    values,  # (num_rows, WIDTH), e4m3
    scale,  # (num_rows,), float32
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Fp8 with one scale for each row; a program has a whole row, COLUMNS >= WIDTH."""
    column = tl.arange(0, COLUMNS)
    at = tl.program_id(0).to(tl.int64) * WIDTH + column
    wide = tl.load(x + at, mask=column < WIDTH, other=0.0).to(tl.float32)
    y_scale = _fp8_scale(tl.max(tl.abs(wide), axis=0), MIN_TOKEN_SCALE)
    tl.store(scale + tl.program_id(0), y_scale)
    tl.store(values + at, (wide * (1.0 / y_scale)).to(tl.float8e4nv), mask=column < WIDTH)


@triton.jit  # type: ignore[untyped-decorator]
def tensor_amax(  # type: ignore[no-untyped-def]
    x,  # (count,), bf16
    partials,  # (programs,), float32
    count,
    PASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``partials[i]`` is the largest magnitude in the blocks i, i + programs, ... of x."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for _ in range(PASSES):
        wide = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(wide))
        at += tl.num_programs(0) * BLOCK
    tl.store(partials + tl.program_id(0), tl.max(largest, axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def quantize_tensor(  # type: ignore[no-untyped-def]
    x,  # (count,), bf16
    values,  # (count,), e4m3
    scale,  # (1,), float32: given, or written
    partials,  # (PARTIALS,), float32
    count,
    PARTIALS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Fp8 with one scale for all: that given if PARTIALS is 0, else of the partial maxima."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wide = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
    if PARTIALS == 0:
        y_scale = tl.load(scale)
    else:
        amax = tl.max(tl.load(partials + tl.arange(0, PARTIALS)), axis=0)
        y_scale = _fp8_scale(amax, MIN_SCALE)
        if tl.program_id(0) == 0:
            tl.store(scale, y_scale)
    y = tl.clamp(wide * (1.0 / y_scale), -FP8_MAX, FP8_MAX)
    tl.store(values + at, y.to(tl.float8e4nv), mask=at < count)


@triton.jit  # type: ignore[untyped-decorator]
def _e2m1(x):  # type: ignore[no-untyped-def]
    """Return the codes of e2m1: nearest, ties to even, saturating."""
    a = tl.abs(x)
    code = (a > 0.25).to(tl.int32) + (a >= 0.75).to(tl.int32) + (a > 1.25).to(tl.int32)
    code += (a >= 1.75).to(tl.int32) + (a > 2.5).to(tl.int32) + (a >= 3.5).to(tl.int32)
    code += (a > 5.0).to(tl.int32)
    return code | ((x.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def quantize_nvfp4(  # type: ignore[no-untyped-def]
    x,  # (num_rows, WIDTH), bf16
    values,  # (num_rows, WIDTH / 2), uint8: the even column in the low four bits
    scale,  # (num_rows, WIDTH / 16), e4m3
    global_scale,  # (1,), float32: given, or written
    partials,  # (PARTIALS,), float32
    num_rows,
    PARTIALS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """e2m1 with an e4m3 scale for each row and 16 columns; PARTIALS as in quantize_tensor."""
    row, group = _tile(WIDTH, FP4_GROUP, ROWS, COLUMNS)
    live = row < num_rows
    at = row[:, None] * WIDTH + group[:, None] * FP4_GROUP + tl.arange(0, FP4_GROUP)[None, :]
    wide = tl.load(x + at, mask=live[:, None], other=0.0).to(tl.float32)
    if PARTIALS == 0:
        total = tl.load(global_scale)
    else:
        amax = tl.max(tl.load(partials + tl.arange(0, PARTIALS)), axis=0)
        total = tl.div_rn(tl.full(amax.shape, FP4_MAX, tl.float32), amax)
        if tl.program_id(0) == 0:
            tl.store(global_scale, total)
    code = tl.minimum(total * (tl.max(tl.abs(wide), axis=1) * SIXTH), FP8_MAX).to(tl.float8e4nv)
    tl.store(scale + row * (WIDTH // FP4_GROUP) + group, code, mask=live)
    used = code.to(tl.float32)
    factor = tl.where(used == 0.0, 0.0, total / used)
    pairs = tl.reshape(
        _e2m1(wide * factor[:, None]), (ROWS * (COLUMNS // FP4_GROUP), FP4_GROUP // 2, 2)
    )
    low, high = tl.split(pairs)
    half = tl.arange(0, FP4_GROUP // 2)
    packed_at = row[:, None] * (WIDTH // 2) + group[:, None] * (FP4_GROUP // 2) + half[None, :]
    tl.store(values + packed_at, (low | (high << 4)).to(tl.uint8), mask=live[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def finalize(  # type: ignore[no-untyped-def]
    rows,  # (num_rows, WIDTH), bf16
    weights,  # (num_tokens, TOP_K), float32
    index,  # (num_tokens, TOP_K), int32; -1 is skipped
    out,  # (num_tokens, WIDTH), bf16
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``out[t] = sum over k of weights[t, k] * rows[index[t, k]]``, in float32."""
    parts: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    token = (tl.program_id(0) // parts).to(tl.int64)
    column = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    total = tl.zeros((COLUMNS,), tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(index + token * TOP_K + k).to(tl.int64)
        weight = tl.load(weights + token * TOP_K + k)
        held = inside & (row >= 0)
        total += weight * tl.load(rows + row * WIDTH + column, mask=held, other=0.0).to(tl.float32)
    tl.store(out + token * WIDTH + column, total.to(tl.bfloat16), mask=inside)
