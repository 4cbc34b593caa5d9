"""The parameter struct of every kernel as a NumPy dtype, laid out as the C++ compiler lays it out.

A test compiles each kernel's ``Params`` and compares size and offsets.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cumoe.launch import TENSOR_MAP, params_dtype


def _struct(*fields: tuple[Any, ...]) -> np.dtype:
    return params_dtype(fields)


_POINTER, _I64, _I32, _F32 = np.uint64, np.int64, np.int32, np.float32
_PER_EXPERT = _struct(("values", _POINTER), ("value", _F32), ("unused_", _F32))
_ACTIVATION = _struct(("alpha", _PER_EXPERT), ("beta", _PER_EXPERT), ("limit", _PER_EXPERT))
_EXPERTS = _struct(
    ("num_experts", _I32),
    ("num_shared", _I32),
    ("expert_offset", _I32),
    ("num_local_routed", _I32),
    ("shared_token_start", _I32),
    ("shared_token_stop", _I32),
)


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


_TABLES = _struct(
    *_fields(_POINTER, "tokens_per_expert expert_offsets permuted_idx token_idx"),
    *_fields(_POINTER, "tile_expert tile_row_end num_tiles"),
    *_fields(_I32, "max_tiles tile"),
)
_TOKEN_WEIGHTS = [
    ("token_weights", _POINTER),
    *_fields(_I32, "token_weights_columns num_weighted"),
]
_SM90_GROUPED_GEMM = _struct(
    ("a_map", TENSOR_MAP),
    ("w_map", TENSOR_MAP),
    ("out_map", TENSOR_MAP),
    *_fields(_POINTER, "a a_scale w_scale out out_scale token_idx tile_expert"),
    *_fields(_POINTER, "expert_offsets tokens_per_expert num_tiles queue"),
    *_fields(_I64, "a_scale_row_stride a_scale_block_stride"),
    *_fields(_I64, "out_scale_row_stride out_scale_block_stride"),
    *_fields(_I32, "n k_bytes tile num_column_tiles w_scale_rows first_half"),
    *_fields(_I32, "first_scale_row second_scale_row block_major"),
    ("activation", _ACTIVATION),
    *_TOKEN_WEIGHTS,
)

_ALLREDUCE = _struct(
    *_fields(_POINTER, "rows weights permuted_idx shared residual norm_weight"),
    *_fields(_POINTER, "sum_out result_out norm_out quant_out scale_out quant_scale state"),
    ("buffers", _I64, (16,)),  # addresses; a tensor map would be 16 of uint64
    *_fields(_I64, "buffer_bytes slot_bytes results_offset scale_row_stride scale_block_stride"),
    *_fields(_I32, "num_tokens hidden_size columns rank"),
    *_fields(_F32, "routed_scaling_factor eps weight_offset"),
)

PARAMS: dict[str, np.dtype] = {
    "routing_topk": _struct(
        *_fields(_POINTER, "logits bias ids weights replay"),
        ("num_tokens", _I32),
        ("scaling_factor", _F32),
    ),
    "routing_count": _struct(
        *_fields(_POINTER, "logits bias ids_in weights_in ids weights replay chunk_counts"),
        *_fields(_I32, "num_tokens top_k columns chunk_tokens run_tokens"),
        ("scaling_factor", _F32),
        ("experts", _EXPERTS),
    ),
    "routing_permute": _struct(
        *_fields(_POINTER, "logits bias ids_in weights_in ids weights replay"),
        *_fields(_I32, "num_tokens top_k columns chunk_tokens"),
        ("scaling_factor", _F32),
        ("experts", _EXPERTS),
        ("tables", _TABLES),
    ),
    "permute_place": _struct(
        *_fields(_POINTER, "ids chunk_counts"),
        *_fields(_I32, "num_slots columns chunk_slots num_chunks"),
        ("experts", _EXPERTS),
        ("tables", _TABLES),
    ),
    "quantize_fp8_block": _struct(
        *_fields(_POINTER, "x values scale"),
        *_fields(_I64, "scale_row_stride scale_block_stride num_rows"),
        *_fields(_I32, "num_columns num_blocks"),
        ("permuted_idx", _POINTER),
        *_fields(_I32, "slots unused_"),
    ),
    "quantize_fp8_ue8m0": _struct(
        *_fields(_POINTER, "x values scale"),
        *_fields(_I64, "word_stride num_rows"),
        *_fields(_I32, "num_columns num_words"),
    ),
    "quantize_fp8_token": _struct(
        *_fields(_POINTER, "x values scale"),
        ("num_rows", _I64),
        *_fields(_I32, "num_columns num_pieces"),
    ),
    "quantize_fp8_tensor": _struct(
        *_fields(_POINTER, "x values scale partials"),
        *_fields(_I64, "num_rows num_columns"),
        ("permuted_idx", _POINTER),
        *_fields(_I32, "slots num_partials"),
    ),
    "quantize_nvfp4": _struct(
        *_fields(_POINTER, "x values scale global_scale partials"),
        *_fields(_I64, "num_rows scale_rows"),
        *_fields(_I32, "num_columns scale_groups num_partials"),
    ),
    "tensor_amax": _struct(*_fields(_POINTER, "x partials"), ("num_elems", _I64)),
    "quantize_fp8_weights": _struct(
        *_fields(_POINTER, "w values scale"),
        *_fields(_I64, "input_expert_stride values_expert_stride scale_expert_stride"),
        *_fields(_I32, "n k"),
    ),
    "activation": _struct(
        *_fields(_POINTER, "x x_scale y y_scale"),
        *_fields(_I64, "x_scale_row_stride x_scale_block_stride"),
        *_fields(_I64, "y_scale_row_stride y_scale_block_stride"),
        *_fields(_POINTER, "num_held_rows token_idx permuted_idx tile_expert"),
        *_fields(_I32, "num_rows num_slots tile intermediate_size num_blocks first_half"),
        *_fields(_I32, "group_step block_step zero"),
        ("activation", _ACTIVATION),
    ),
    "finalize": _struct(
        *_fields(_POINTER, "rows weights permuted_idx out"),
        *_fields(_I32, "columns hidden_size num_pieces unused_"),
    ),
    "permute_rows": _struct(
        *_fields(_POINTER, "a a_scale permuted_idx out out_scale"),
        *_fields(_I64, "a_scale_row_stride a_scale_block_stride"),
        *_fields(_I32, "columns row_bytes num_blocks num_pieces"),
    ),
    "allreduce_one_shot": _ALLREDUCE,
    "allreduce_two_shot": _ALLREDUCE,
    "sm80_grouped_gemm": _struct(
        *_fields(_POINTER, "a a_scale b b_scale out out_scale"),
        *_fields(_POINTER, "token_idx tile_expert tile_row_end num_tiles"),
        *_fields(_I64, "a_scale_row_stride a_scale_block_stride"),
        *_fields(_I64, "b_expert_bytes b_row_bytes b_block_bytes"),
        *_fields(_I64, "out_scale_row_stride out_scale_block_stride"),
        *_fields(_I32, "n k_bytes row_step first_row up_row"),
        *_fields(_I32, "b_scale_rows gate_scale_row up_scale_row num_column_tiles"),
        ("activation", _ACTIVATION),
        *_TOKEN_WEIGHTS,
    ),
    "sm90_fp8_grouped_gemm": _SM90_GROUPED_GEMM,
    "sm90_fp8_rows_grouped_gemm": _SM90_GROUPED_GEMM,
    "sm90_grouped_gemm": _SM90_GROUPED_GEMM,
}
