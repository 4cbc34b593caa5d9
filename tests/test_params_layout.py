"""Each kernel's ``Params`` has the size, fields and offsets of its NumPy dtype.

The kernel's own source is compiled with assertions appended, so no GPU is needed. NVRTC has no
offsetof: a wrong offset leaves a call of an undefined function, which ptxas refuses by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cumoe.launch import KERNEL_DIR, CompileError, KernelSpec, compile_cubin
from cumoe.params import PARAMS
from tests.test_kernels_compile import shipped


def spec_of(name: str) -> tuple[KernelSpec, str]:
    """Return some configuration of a kernel, and an architecture it runs on."""
    arch = "sm_90a" if name.startswith("sm90_") else "sm_80"
    return next(item.spec for item in shipped(arch) if item.spec.name == name), arch


def offsets(dtype: np.dtype, prefix: str = "", start: int = 0) -> Iterator[tuple[str, int, int]]:
    """Yield the path, offset and size of every field, fields of nested structs included."""
    assert dtype.fields is not None
    for name, (kind, offset, *_) in dtype.fields.items():
        yield prefix + name, start + offset, kind.itemsize
        if kind.fields is not None:
            yield from offsets(kind, f"{prefix}{name}.", start + offset)


def assertions(dtype: np.dtype) -> str:
    """Return C++ that compiles only if ``Params`` is laid out as the dtype."""
    lines = [f'static_assert(sizeof(Params) == {dtype.itemsize}, "size of Params");']
    calls = []
    for path, offset, size in offsets(dtype):
        wrong = f"{path.replace('.', '_')}_is_not_at_{offset}"
        lines += [
            f'extern "C" __device__ void {wrong}();',
            f'static_assert(sizeof(Params{{}}.{path}) == {size}, "size of {path}");',
        ]
        distance = f"reinterpret_cast<const char*>(&p.{path}) - reinterpret_cast<const char*>(&p)"
        calls.append(f"  if ({distance} != {offset}) {wrong}();")
    body = "\n".join(calls)
    kernel = f'extern "C" __global__ void check(const __grid_constant__ Params p) {{\n{body}\n}}'
    return "\n".join([*lines, kernel]) + "\n"


def compile_with(name: str, dtype: np.dtype, folder: Path) -> None:
    """Compile a kernel with the assertions of a dtype."""
    spec, arch = spec_of(name)
    source = (KERNEL_DIR / f"{name}.cu").read_text()
    (folder / f"{name}.cu").write_text(source + "\n" + assertions(dtype))
    compile_cubin(KernelSpec(name, spec.defines, source_dir=folder), arch, use_cache=False)


@pytest.mark.parametrize("name", PARAMS)
def test_offsets(name: str, tmp_path: Path) -> None:
    compile_with(name, PARAMS[name], tmp_path)


@pytest.mark.parametrize("name", PARAMS)
def test_fields(name: str) -> None:
    """Padding could hide a field that only one side has, so the names are compared too."""
    texts = {f"{name}.cu": ""}  # of the kernel and all that it includes
    while files := [file for file, text in texts.items() if not text]:
        for file in files:
            texts[file] = (KERNEL_DIR / file).read_text()
            for header in re.findall(r'^#include "([^"]+)"', texts[file], re.MULTILINE):
                texts.setdefault(header, "")
    definition = re.compile(r"^struct Params \{\n(.*?)^\};", re.MULTILINE | re.DOTALL)
    (struct,) = [body for text in texts.values() for body in definition.findall(text)]
    declarations = re.sub(r"//.*", "", struct).split(";")
    bare = [re.sub(r"\[\w+\]", "", line).strip() for line in declarations]
    names = [re.split(r"[\s*]+", line)[-1] for line in bare if line]
    assert tuple(names) == PARAMS[name].names


def test_every_kernel_has_params() -> None:
    assert set(PARAMS) == {path.stem for path in KERNEL_DIR.glob("*.cu")}


POINTERS = ("rows", "weights", "permuted_idx", "out")


@pytest.mark.parametrize(
    "fields",
    [
        (*POINTERS, "hidden_size", "columns", "num_pieces", "unused_"),
        (*POINTERS, "columns", "hidden_size", "num_pieces", "one_more"),
    ],
)
def test_a_difference_is_found(fields: tuple[str, ...], tmp_path: Path) -> None:
    kinds = dict.fromkeys(fields[:4], np.uint64) | dict.fromkeys(fields[4:], np.int32)
    with pytest.raises(CompileError, match="hidden_size_is_not_at_32|has no member"):
        compile_with("finalize", np.dtype(list(kinds.items())), tmp_path)
