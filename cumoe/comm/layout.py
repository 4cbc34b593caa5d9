"""The memory that the ranks of a collective share: its size, its parts, and what it holds at first.

Every rank owns one block of ``workspace_bytes(...)`` bytes that its peers can write; the kernels
poll only their own. The block has ``NUM_BUFFERS`` equal buffers, used in turn. A buffer serves one
of two protocols at a time:

one-shot
    ``world_size - 1`` slots of ``slot_bytes``: slot ``s`` holds the rows of peer ``s``, or of
    ``s + 1`` from the own rank on.
two-shot
    ``world_size - 1`` slots of ``share_bytes``, the peers' rows of the tokens that this rank
    reduces, and behind them, at ``results_offset``, the reduced rows of all tokens.

A word that has not arrived is ``SENTINEL``, minus zero in all wire dtypes at once: as float32, or
as the upper of two 16-bit elements. Senders turn minus zero into zero, and whoever has read a word
puts the sentinel back; so between two calls all buffers hold nothing else, and a call with any
number of tokens may follow any other.

A rank keeps ``STATE_WORDS`` words of its own on the device, which peers never see. They are part of
the memory and not of the launch, so the replay of a CUDA graph takes its turn.
"""

from __future__ import annotations

from dataclasses import dataclass

from cumoe.arrays import DTYPES

SENTINEL = 0x80000000
"""Every 32-bit word of a new block, and of a block between two calls."""

NUM_BUFFERS = 3
"""A buffer is read and cleared in call n. A peer writes it again in call n + NUM_BUFFERS, when it
has received what this rank sent after the end of call n + NUM_BUFFERS - 2. Two would do; with three
a whole call lies between, since only relaxed accesses of memory tell the peer."""

STATE_WORDS = 4
"""int32 words, zeros at first: [0] buffer of the next call, [1] blocks of it that have arrived."""

WIRE_DTYPES = ("bfloat16", "float16", "float32")
MAX_WORLD_SIZE = 16
ALIGNMENT = 128

ONE_SHOT_BYTES: dict[int, int] = {2: 1 << 62, 3: 1 << 20, 4: 448 << 10}
"""World size to the bytes of a rank's rows up to which every rank sends all of them to every peer.
Two ranks send no more that way than in two steps. Four H200, finalize_allreduce in us with one shot
/ two: 224 KiB 7.2 / 8.4, 448 KiB 9.4 / 9.3, 672 KiB 13.4 / 11.9. The others from that by what one
shot sends more: (n - 1) * (1 - 2 / n) * bytes."""

ONE_SHOT_BYTES_OF_MORE = 128 << 10
"""The same for the world sizes that ``ONE_SHOT_BYTES`` does not name."""


@dataclass(frozen=True)
class BlockLayout:
    """Sizes and offsets, in bytes, of a rank's block.

    Attributes
    ----------
    slot_bytes : int
        A peer's rows, one-shot.
    share_bytes : int
        A peer's rows of the tokens this rank reduces, two-shot; 0 where it is never needed.
    results_offset : int
        Of the reduced rows in a buffer, two-shot.
    buffer_bytes, num_bytes : int
        One buffer, and all of them.
    """

    slot_bytes: int
    share_bytes: int
    results_offset: int
    buffer_bytes: int
    num_bytes: int


def one_shot_bytes(world_size: int) -> int:
    """Return the bytes of a rank's rows up to which the one-shot protocol is used."""
    return ONE_SHOT_BYTES.get(world_size, ONE_SHOT_BYTES_OF_MORE)


def check_sizes(world_size: int, max_num_tokens: int, hidden_size: int, dtype: str) -> None:
    """Raise ValueError unless a workspace of these sizes can exist."""
    if not 1 <= world_size <= MAX_WORLD_SIZE:
        raise ValueError(f"world_size: expected 1 to {MAX_WORLD_SIZE}, got {world_size}")
    if max_num_tokens < 1:
        raise ValueError(f"max_num_tokens: expected at least 1, got {max_num_tokens}")
    if hidden_size < 8 or hidden_size % 8:
        raise ValueError(f"hidden_size: expected a multiple of 8, got {hidden_size}")
    if dtype not in WIRE_DTYPES:
        raise ValueError(f"dtype: expected one of {list(WIRE_DTYPES)}, got {dtype!r}")


def block_layout(
    world_size: int,
    max_num_tokens: int,
    hidden_size: int,
    dtype: str = "bfloat16",
    *,
    one_shot: int | None = None,
) -> BlockLayout:
    """Return sizes and offsets of a rank's block.

    Parameters
    ----------
    world_size : int
        1 to 16. One rank exchanges nothing and needs no bytes.
    max_num_tokens : int
        At least 1.
    hidden_size : int
        A multiple of 8.
    dtype : {"bfloat16", "float16", "float32"}
        On the wire.
    one_shot : int, optional
        Overrides :func:`one_shot_bytes`.

    Raises
    ------
    ValueError
        If a size is out of range.
    """
    check_sizes(world_size, max_num_tokens, hidden_size, dtype)
    if world_size == 1:
        return BlockLayout(0, 0, 0, 0, 0)
    row_bytes = hidden_size * DTYPES[dtype].itemsize
    all_bytes, peers = max_num_tokens * row_bytes, world_size - 1
    limit = one_shot_bytes(world_size) if one_shot is None else one_shot
    slot_bytes = _aligned(min(all_bytes, max(limit, row_bytes)))
    share_bytes = results_offset = used = 0
    if all_bytes > slot_bytes:
        share_bytes = _aligned(-(-max_num_tokens // world_size) * row_bytes)
        results_offset = peers * share_bytes
        used = results_offset + _aligned(all_bytes)
    buffer_bytes = max(peers * slot_bytes, used)
    return BlockLayout(
        slot_bytes, share_bytes, results_offset, buffer_bytes, NUM_BUFFERS * buffer_bytes
    )


def workspace_bytes(
    world_size: int, max_num_tokens: int, hidden_size: int, dtype: str = "bfloat16"
) -> int:
    """Return the bytes of a rank's block; see :func:`block_layout`.

    Its base is aligned to ``ALIGNMENT`` bytes and every 32-bit word is ``SENTINEL`` before any
    rank's first call.
    """
    return block_layout(world_size, max_num_tokens, hidden_size, dtype).num_bytes


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
