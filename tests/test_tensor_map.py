"""Tensor maps: the limits, what the driver is handed, and a copy through the engine on a GPU."""

from __future__ import annotations

import ctypes
import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cumoe.launch import (
    TENSOR_MAP,
    KernelSpec,
    LaunchConfig,
    current_device,
    encode_tiled,
    get_kernel,
    launch,
    params_dtype,
)
from cumoe.launch.tensor_map import why_illegal

tensor_map_module = importlib.import_module("cumoe.launch.tensor_map")

CU = Path(__file__).with_name("cu")


class TestTensorMap:
    LEGAL: dict[str, Any] = {
        "address": 4096,
        "dtype": "uint8",
        "shape": (3, 100, 304),
        "strides_bytes": (30400, 304, 1),
        "box": (1, 64, 128),
        "swizzle": "128B",
    }

    def test_legal(self):
        assert why_illegal(**self.LEGAL) is None
        assert why_illegal(16, "float32", (8,), (4,), (4,), oob_fill="nan") is None

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"dtype": "int8"}, "dtype: expected one of uint8, .*, got 'int8'"),
            ({"swizzle": "256B"}, "swizzle: expected one of none, 32B"),
            ({"l2_promotion": "32B"}, "l2_promotion: expected"),
            ({"oob_fill": "ones"}, "oob_fill: expected one of zeros, nan"),
            ({"oob_fill": "nan"}, "oob_fill: expected 'zeros' for uint8"),
            ({"address": 4104}, "address: expected a multiple of 16, got 0x1008"),
            ({"address": 0}, "address: expected"),
            (
                {"shape": (), "strides_bytes": (), "box": ()},
                "shape: expected 1 to 5 dimensions, got 0",
            ),
            ({"shape": (1,) * 6}, "shape: expected 1 to 5 dimensions, got 6"),
            ({"shape": (3, 0, 304)}, r"shape: expected sizes from 1 to 2\*\*32"),
            ({"shape": (2**32 + 1, 1, 1)}, "shape: expected sizes"),
            ({"strides_bytes": (304, 1)}, "strides_bytes: expected 3 values"),
            ({"strides_bytes": (30400, 304, 2)}, "strides_bytes: expected the last .* contiguous"),
            ({"strides_bytes": (30400, 300, 1)}, "strides_bytes: expected multiples of 16"),
            ({"strides_bytes": (0, 304, 1)}, "strides_bytes: expected multiples of 16 above 0"),
            ({"strides_bytes": (2**40, 304, 1)}, r"below 2\*\*40"),
            ({"box": (64, 128)}, "box: expected 3 values"),
            ({"box": (1, 257, 128)}, "box: expected sizes from 1 to 256"),
            ({"box": (1, 64, 120)}, "box: expected a multiple of 16 bytes"),
            ({"box": (1, 64, 144)}, "box: expected at most 128 bytes"),
            ({"box": (1, 64, 64), "swizzle": "32B"}, "box: expected at most 32 bytes"),
            ({"element_strides": (1, 9, 1)}, "element_strides: expected values from 1 to 8"),
            ({"element_strides": (1, 1, 2)}, "element_strides: expected 1 along the last"),
        ],
    )
    def test_illegal(self, change, message):
        reason = why_illegal(**{**self.LEGAL, **change})
        assert reason is not None and re.search(message, reason)
        with pytest.raises(ValueError, match=message):
            encode_tiled(**{**self.LEGAL, **change})

    def test_arguments_of_the_driver(self, monkeypatch):
        seen = []

        def encode(words, dtype, rank, address, sizes, strides, box, steps, *modes):
            assert words % 64 == 0
            ctypes.memset(words, 0xAB, 128)
            arrays = [list(array[:rank]) for array in (sizes, strides, box, steps)]
            seen.append((int(dtype), address, arrays, [int(mode) for mode in modes]))
            return 0

        monkeypatch.setattr(tensor_map_module, "_encoder", lambda: encode)
        change = {"dtype": "bfloat16", "strides_bytes": (60800, 608, 2), "box": (1, 64, 64)}
        words = encode_tiled(**{**self.LEGAL, **change}, l2_promotion="128B")
        assert words.dtype == np.uint64 and words.tolist() == [0xABABABABABABABAB] * 16
        arrays = [[304, 100, 3], [608, 60800, 0], [64, 64, 1], [1, 1, 1]]
        assert seen == [(9, 4096, arrays, [0, 3, 2, 0])]


def expected_tiles(x: np.ndarray, swizzle: str) -> np.ndarray:
    """Tiles of (64, 128) bytes, zero past the array, as the swizzle stores them."""
    padded = np.zeros((128, 384), np.uint8)
    padded[: x.shape[0], : x.shape[1]] = x
    tiles = padded.reshape(2, 64, 3, 8, 16).transpose(0, 2, 1, 3, 4)
    if swizzle == "128B":  # 16-byte chunk c of row r lies at chunk c ^ (r % 8)
        chunk = np.arange(8)[None, :] ^ (np.arange(64) % 8)[:, None]
        tiles = np.take_along_axis(tiles, chunk[None, None, :, :, None], axis=3)
    return tiles.reshape(2, 3, 64, 128)


@pytest.mark.gpu
@pytest.mark.parametrize("swizzle", ["none", "128B"])
def test_copy_on_gpu(swizzle, tmp_path, monkeypatch):
    if current_device().compute_capability < (9, 0):
        pytest.skip("needs compute capability 9.0")
    monkeypatch.setenv("CUMOE_CACHE_DIR", str(tmp_path))
    cp = importlib.import_module("cupy")
    x = cp.random.randint(0, 256, (100, 304)).astype("u1")[:, :300]
    out = cp.full((2, 3, 64, 128), 0xFF, dtype="u1")
    params = np.zeros((), params_dtype([("out", "u8"), ("map", TENSOR_MAP)]))
    params["out"] = out.data.ptr
    params["map"] = encode_tiled(
        x.data.ptr, x.dtype, x.shape, x.strides, (64, 128), swizzle=swizzle
    )
    spec = KernelSpec("launch_tma", (("BOX_ROWS", 64), ("BOX_COLUMNS", 128)), source_dir=CU)
    stream = cp.cuda.get_current_stream()
    launch(get_kernel(spec), LaunchConfig((3, 2), (128,)), params, stream.ptr)
    np.testing.assert_array_equal(out.get(), expected_tiles(x.get(), swizzle))
