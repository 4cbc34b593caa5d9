"""Compiles kernels of ``cumoe/cu`` for the CPU and runs them on NumPy arrays.

A kernel is named by the same :class:`cumoe.launch.KernelSpec` as on a GPU. Its sources are not
changed: they are linked into a folder in which the files of ``tests/host/overlay`` take the place
of the headers with inline PTX, and compiled behind ``shim.h``. Libraries are kept in a cache
folder by the hash of all they are made of. Errors of a run (see ``errors.cpp``) are raised as
:class:`HostError`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from cumoe import kernels
from cumoe.launch import KERNEL_DIR, KernelSpec

HERE = Path(__file__).resolve().parent
OVERLAY = HERE / "overlay"
MAX_DYNAMIC_SMEM = 227 << 10
CUDA_ARCH = 900
KEEP_SECONDS = 14 * 24 * 3600  # of a library that no run used

_FLAGS = (
    "-std=c++17",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-ftls-model=global-dynamic",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-unused-variable",
    "-Wno-unused-but-set-variable",
    "-Wno-parentheses",
    "-Wno-psabi",
    "-Wno-attributes",
)
_UBSAN = (
    "-fsanitize=undefined",
    "-fsanitize=float-cast-overflow",
    "-fno-sanitize=vptr,return,null",
)
_ASAN = ("-fsanitize=address", "-fno-omit-frame-pointer")


class HostError(RuntimeError):
    """A run ended in an operation that is not allowed, a deadlock or a fault."""


class HostCompileError(RuntimeError):
    """The compiler rejects a kernel or the engine."""


class _Dim3(ctypes.Structure):
    _fields_ = [("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint)]


class _Kernel(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("entry", ctypes.c_void_p),
        ("params_bytes", ctypes.c_size_t),
        ("dynamic_smem", ctypes.c_void_p),
        ("dynamic_capacity", ctypes.c_size_t),
        ("cluster", _Dim3),
    ]


class _Grid(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.POINTER(_Kernel)),
        ("params", ctypes.c_void_p),
        ("grid", _Dim3),
        ("block", _Dim3),
        ("cluster", _Dim3),
        ("smem_bytes", ctypes.c_size_t),
        ("stream", ctypes.c_int),
    ]


@functools.cache
def compiler() -> str | None:
    """Return the C++ compiler: ``$CXX``, or the first of c++, g++ and clang++ that exists."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    return None


def why_unavailable() -> str | None:
    """Return why kernels cannot run on this machine's CPU, or None if they can."""
    if sys.platform != "linux":
        return f"kernels run on the CPU on Linux only, this is {sys.platform}"
    if compiler() is None:
        return "running kernels on the CPU needs a C++17 compiler (c++, g++, clang++ or $CXX)"
    return None


def require() -> None:
    """Skip the calling test where kernels cannot run on the CPU; fail it where CI is set."""
    import pytest

    reason = why_unavailable()
    if reason is not None:
        if os.environ.get("CI", "") not in ("", "0", "false"):
            pytest.fail(reason)
        pytest.skip(reason)


@functools.cache
def cache_dir() -> Path:
    """Return the folder of compiled libraries, private to this user; old ones are removed."""
    base = os.environ.get("CUMOE_HOST_CACHE_DIR")
    path = Path(base) if base else Path(tempfile.gettempdir()) / f"cumoe-host-{os.getuid()}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise PermissionError(f"{path}: expected a folder of this user")
    oldest = time.time() - KEEP_SECONDS
    for output in (*path.glob("*.so"), *path.glob("*.gch")):
        with contextlib.suppress(FileNotFoundError):
            if output.stat().st_mtime < oldest:
                output.unlink()
    return path


def asan_active() -> bool:
    """Tell whether this process runs under AddressSanitizer (see ``asan_environment``)."""
    return "libasan" in os.environ.get("LD_PRELOAD", "")


def asan_environment() -> dict[str, str]:
    """Return the environment in which a Python process checks every access of a kernel."""
    tool = compiler()
    assert tool is not None
    path = subprocess.run(
        [tool, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    options = (
        "detect_leaks=0:detect_stack_use_after_return=0:handle_segv=0:allow_user_segv_handler=1"
    )
    return {**os.environ, "LD_PRELOAD": path, "ASAN_OPTIONS": options, "PYTHONMALLOC": "malloc"}


@functools.cache
def _compiler_version() -> str:
    tool = compiler()
    assert tool is not None
    return subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def _host_text() -> str:
    files = sorted([*HERE.glob("*.h"), *OVERLAY.glob("*")])
    return "".join(f"{f.name}\0{f.read_text()}\0" for f in files)


def _build(key_parts: Iterable[str], name: str, compile_into: Any) -> Path:
    """Return the output of a key, compiled into a temporary folder and moved if it is missing."""
    key = hashlib.sha256("\0".join([_compiler_version(), *key_parts]).encode()).hexdigest()[:24]
    stem, suffix = os.path.splitext(name)
    target = cache_dir() / f"{stem}-{key}{suffix}"
    try:
        os.utime(target)
    except FileNotFoundError:
        with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
            output = compile_into(Path(folder))
            os.replace(output, target)
    return target


def _run_compiler(arguments: Sequence[str | Path]) -> None:
    tool = compiler()
    assert tool is not None
    # Without AddressSanitizer's library in the compiler: it would take five times as long.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        [tool, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise HostCompileError(f"{tool} {' '.join(map(str, arguments))}\n{done.stderr}")


@functools.cache
def _engine() -> ctypes.CDLL:
    sources = sorted(HERE.glob("*.cpp"))
    asan = _ASAN if asan_active() else ()
    flags = ["-std=c++17", "-O1", "-g1", "-fPIC", "-pthread", *asan]

    def compile_into(folder: Path) -> Path:
        units = [folder / f"{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            commands = [[*flags, "-c", *pair] for pair in zip(sources, units, strict=True)]
            list(pool.map(lambda c: _run_compiler([*c[:-1], "-o", c[-1]]), commands))
        _run_compiler(["-shared", "-pthread", *asan, *units, "-o", folder / "engine.so"])
        return folder / "engine.so"

    files = (*sources, *sorted(HERE.glob("*.h")))
    texts = [f"{file.name}\0{file.read_text()}" for file in files]
    # Not once for each of the processes that start together.
    with FileLock(cache_dir() / "engine.lock"):
        path = _build([*texts, *flags], "engine.so", compile_into)
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library.cumoe_host_run.argtypes = [
        ctypes.POINTER(_Grid),
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_uint64,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_size_t,
    ]
    return library


def _sanitizers(spec: KernelSpec) -> tuple[str, ...]:
    """Return what a kernel is checked for: UBSan takes as long to compile as the kernel itself."""
    if asan_active():
        return (*_ASAN, *_UBSAN)
    # The tests' own kernels are of the engine, whose reports they are about.
    return _UBSAN if spec.source_dir else ("-fsanitize=alignment",)


@functools.cache
def _precompiled_shim(flags: tuple[str, ...]) -> Path:
    """Return ``shim.h`` compiled with these flags, which a kernel takes less time to read."""

    def compile_into(folder: Path) -> Path:
        _run_compiler([*flags, "-x", "c++-header", HERE / "shim.h", "-o", folder / "shim.gch"])
        return folder / "shim.gch"

    with FileLock(cache_dir() / "shim.lock"):
        return _build([*flags, _host_text()], "shim.gch", compile_into)


_DYNAMIC = re.compile(
    r"extern\s+__shared__\s+(?:__align__\(\d+\)|alignas\(\d+\))?\s*([\w:]+)\s+(\w+)\s*\[\s*\]"
)


_CLUSTER = re.compile(r"__cluster_dims__\(([^()]*)\)")


def _wrapper(spec: KernelSpec, source: str, params: np.dtype) -> str:
    """Return the translation unit that includes the kernel and describes it to the engine."""
    found = sorted(set(_DYNAMIC.findall(source)))
    if len(found) > 1:
        raise ValueError(f"{spec.name}: expected one extern __shared__ array, found {found}")
    element, array = found[0] if found else ("unsigned char", "cumoe_host_no_dynamic_smem")
    capacity = MAX_DYNAMIC_SMEM if found else 4096
    attribute = _CLUSTER.search(source)
    cluster = attribute[1] if attribute else "0, 0, 0"
    names = params.names or ()
    offsets = (
        f'static_assert(offsetof(Params, {name}) == {params.fields[name][1]}, "{name}");'
        for name in names
    )
    return "\n".join(
        [
            f'#include "{spec.name}.cu"',
            f"alignas(1024) thread_local {element} {array}[{capacity} / sizeof({element})];",
            f"static_assert(sizeof(Params) == {params.itemsize});",
            *offsets,
            "static void cumoe_host_entry(const void* p) {",
            f"  {spec.name}(*static_cast<const Params*>(p));",
            "}",
            "static unsigned char* cumoe_host_dynamic() {",
            f"  return reinterpret_cast<unsigned char*>(&{array}[0]);",
            "}",
            'extern "C" __attribute__((visibility("default")))',
            "const cumoe_host::Kernel cumoe_host_kernel = {",
            f'    "{spec.name}", cumoe_host_entry, sizeof(Params), cumoe_host_dynamic,',
            f"    {capacity}, {{{cluster}}}}};",
            "",
        ]
    )


def _sources(source_dir: Path, changed: Mapping[str, str]) -> dict[str, str]:
    """Return the text of every file a kernel may include, by name."""
    own = {} if source_dir == KERNEL_DIR else _texts(source_dir)
    return {**_kept_texts(KERNEL_DIR), **own, **_kept_texts(OVERLAY), **changed}


def _texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (*folder.glob("*.cu"), *folder.glob("*.cuh"))}


_kept_texts = functools.cache(_texts)


def _included(texts: Mapping[str, str], name: str, seen: set[str]) -> set[str]:
    """Return `name` and the files it includes, directly or not."""
    if name not in seen and name in texts:
        seen.add(name)
        for other in re.findall(r'#\s*include\s+"([^"]+)"', texts[name]):
            _included(texts, other, seen)
    return seen


def library_path(
    spec: KernelSpec,
    params: np.dtype,
    *,
    arch: int = CUDA_ARCH,
    changed: Mapping[str, str] | None = None,
) -> Path:
    """Compile a kernel, or find it in the cache, and return its library.

    Parameters
    ----------
    spec : KernelSpec
    params : numpy.dtype
        Mirror of the kernel's ``Params``; size and offsets are checked by the compiler.
    arch : int
        ``__CUDA_ARCH__``.
    changed : mapping of str to str, optional
        Texts of files that differ from those on disk.
    """
    # The kernels of a test's own folder may be rewritten between two launches.
    find = _library_path.__wrapped__ if spec.source_dir else _library_path
    return find(spec, params, arch, tuple((changed or {}).items()))


@functools.cache
def _library_path(
    spec: KernelSpec, params: np.dtype, arch: int, changes: tuple[tuple[str, str], ...]
) -> Path:
    changed, source_dir = dict(changes), spec.source_dir or KERNEL_DIR
    texts = _sources(source_dir, changed)
    used = sorted(_included(texts, f"{spec.name}.cu", set()))
    wrapper = _wrapper(spec, texts[f"{spec.name}.cu"], params)
    # What runs under four seeds is optimised; for a run or two that takes longer than it saves.
    level = "-O0" if changed or asan_active() else "-O1"
    compiled_with = (level, *_FLAGS, *_sanitizers(spec))
    flags = [
        *compiled_with,
        f"-D__CUDA_ARCH__={arch}",
        "-DCUMOE_HOST",
        *(f"-D{name}={value}" for name, value in spec.defines),
    ]

    def compile_into(folder: Path) -> Path:
        for name in used:
            origin = OVERLAY / name
            for candidate in (source_dir / name, KERNEL_DIR / name):
                if not origin.exists():
                    origin = candidate
            if name in changed:
                (folder / name).write_text(changed[name])
            else:
                (folder / name).symlink_to(origin)
        (folder / "wrapper.cpp").write_text(wrapper)
        (folder / "shim.h").symlink_to(HERE / "shim.h")
        if "clang" not in _compiler_version():  # GCC takes the one beside the file, if it fits
            (folder / "shim.h.gch").symlink_to(_precompiled_shim(compiled_with))
        unit, library = folder / "wrapper.o", folder / "kernel.so"
        _run_compiler(
            [
                *flags,
                f"-ffile-prefix-map={folder}={source_dir}",
                f"-I{HERE}",
                "-include",
                folder / "shim.h",
                "-c",
                folder / "wrapper.cpp",
            ]
            + ["-o", unit]
        )
        _run_compiler(["-shared", *(_ASAN if asan_active() else ()), unit, "-o", library])
        return library

    key = [wrapper, *flags, _host_text(), *(f"{name}\0{texts[name]}" for name in used)]
    return _build(key, f"{spec.name}.so", compile_into)


@functools.cache
def _load(path: Path) -> tuple[ctypes.CDLL, _Kernel]:
    _engine()
    library = ctypes.CDLL(str(path), mode=os.RTLD_LOCAL | os.RTLD_NOW)
    return library, _Kernel.in_dll(library, "cumoe_host_kernel")


@dataclass(frozen=True)
class HostOptions:
    """How launches run.

    Attributes
    ----------
    seed : int
        Chooses the schedule, the moments at which copies land, and the pattern in fresh memory.
    arch : int
        ``__CUDA_ARCH__``.
    resident : int, optional
        Blocks of a grid that are alive at the same time. By default, one in :func:`run` and all in
        :func:`run_together`.
    seconds : int
        Processor time after which a thread that makes no progress is an error.
    changed : mapping of str to str, optional
        Texts of source files that differ from those on disk.
    """

    seed: int = 0
    arch: int = CUDA_ARCH
    resident: int | None = None
    seconds: int = 60
    changed: Mapping[str, str] | None = None


def run(launches: Sequence[kernels.Launch], options: HostOptions | None = None) -> None:
    """Run launches one after the other, as one stream does.

    Raises
    ------
    HostError
        With kernel, block, thread and source line.
    """
    options = options or HostOptions()
    for launch in launches:
        _run([[launch]], options, options.resident or 1)


def run_together(launches: Sequence[kernels.Launch], options: HostOptions | None = None) -> None:
    """Run launches at the same time, as GPUs of their own: the ranks of a multi-GPU kernel.

    Each may have its own kernel, parameters and sizes. Blocks of all grids take random turns; some
    seeds start grids late, or let one crawl. In messages, ``grid`` is an index into `launches`.

    Raises
    ------
    HostError
        With kernel, grid, block, thread and source line, also where all that is left waits.
    """
    run_streams([[launch] for launch in launches], options)


def run_streams(
    streams: Sequence[Sequence[kernels.Launch]], options: HostOptions | None = None
) -> None:
    """Run streams of launches at the same time: each launch when the one before it has ended.

    As :func:`run_together`; in messages, ``grid`` counts the launches of all streams.
    """
    options = options or HostOptions()
    _run(streams, options, options.resident or 0)


def _run(streams: Sequence[Sequence[kernels.Launch]], options: HostOptions, resident: int) -> None:
    launches = [(i, launch) for i, stream in enumerate(streams) for launch in stream]
    grids = (_Grid * len(launches))()
    for grid, (stream, launch) in zip(grids, launches, strict=True):
        grid.stream = stream
        path = library_path(
            launch.spec, launch.params.dtype, arch=options.arch, changed=options.changed
        )
        grid.kernel = ctypes.pointer(_load(path)[1])
        grid.params = launch.params.ctypes.data
        grid.grid = _Dim3(*launch.config.grid)
        grid.block = _Dim3(*launch.config.block)
        grid.cluster = _Dim3(*(launch.config.cluster or (1, 1, 1)))
        grid.smem_bytes = launch.config.smem_bytes
    message = ctypes.create_string_buffer(16384)
    code = _engine().cumoe_host_run(
        grids,
        len(launches),
        resident,
        options.seed,
        options.seconds,
        message,
        len(message),
    )
    if code:
        raise HostError(message.value.decode(errors="replace"))
