"""From a kernel's source file and constants to a cubin, through NVRTC and the file cache.

A kernel is named by a :class:`KernelSpec`. It compiles unmodified: constants come by ``-D``, the
program is named by its real path (so messages and line tables point at it), architecture, C++
standard and floating point flags are always stated, and no header outside the kernel folders can be
found. Neither a GPU nor a driver is needed. The options are handed to NVRTC as they stand, because
they are the cache key.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .cache import CacheEntry, CacheKey, CubinCache, default_directory, make_key
from .errors import CompileError, LaunchError, check, require

__all__ = [
    "KERNEL_DIR",
    "CompiledKernel",
    "KernelSpec",
    "Resources",
    "cache_key",
    "compile_cubin",
    "default_cache",
    "nvrtc_build",
    "parse_resources",
    "warmup",
]

KERNEL_DIR = Path(__file__).resolve().parent.parent / "cu"

_NAME = re.compile(r"[A-Za-z_]\w*")
_ARCH = re.compile(r"sm_\d+[af]?")
_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include\b[ \t]*(.*)$", re.MULTILINE)
_LITERAL_INCLUDE = re.compile(r'"([^"]+)"|<([^>]+)>')
# Options that would bring text into the compile which the key does not cover.
_UNKEYED_OPTION = re.compile(
    r"-I|--?include|--?pre-include|-include|--?(create-|use-)?pch|--?use-bundled"
)


@dataclass(frozen=True)
class KernelSpec:
    """One kernel with its compile-time constants; hashable, whatever the order of its macros.

    Attributes
    ----------
    name : str
        Stem of the ``.cu`` file, name of its ``extern "C"`` entry, and stem of the cache file.
    defines : tuple of (str, str or int)
        Macros, sorted by name on construction.
    fmad : bool
        Whether multiplies and adds may be contracted. False reproduces separately rounded host
        arithmetic.
    max_registers : int, optional
        Ceiling on registers a thread.
    extra_options : tuple of str
        Further NVRTC options, one flag each.
    source_dir : Path, optional
        Folder of the ``.cu`` file; default ``cumoe/cu``, whose headers can be included in any case.

    Raises
    ------
    ValueError
        If a name is no C identifier, a macro is defined twice, or an option would include unkeyed
        text.
    """

    name: str
    defines: tuple[tuple[str, str | int], ...] = ()
    fmad: bool = True
    max_registers: int | None = None
    extra_options: tuple[str, ...] = ()
    source_dir: Path | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name: expected a C identifier (the file stem), got {self.name!r}")
        defines = tuple(
            sorted(((n, _plain(v)) for n, v in self.defines), key=lambda define: define[0])
        )
        names = [name for name, _ in defines]
        if len(set(names)) != len(names):
            raise ValueError(f"defines: expected each macro once, got {names}")
        for name, value in defines:
            if not _NAME.fullmatch(name) or "\n" in str(value):
                raise ValueError(
                    f"defines: expected an identifier and one line, got {(name, value)}"
                )
        for option in self.extra_options:
            if not option.startswith("-") or _UNKEYED_OPTION.match(option):
                raise ValueError(
                    f"extra_options: expected flags that include no text, got {option!r}"
                )
        object.__setattr__(self, "defines", defines)
        object.__setattr__(self, "extra_options", tuple(self.extra_options))

    @property
    def path(self) -> Path:
        """Real path of the ``.cu`` file."""
        return ((self.source_dir or KERNEL_DIR) / f"{self.name}.cu").resolve()

    @property
    def include_dirs(self) -> tuple[Path, ...]:
        """Folders headers are taken from: the kernel's own, then ``cumoe/cu``."""
        return tuple(dict.fromkeys((self.path.parent, KERNEL_DIR)))

    def options(self, arch: str) -> tuple[str, ...]:
        """Return the NVRTC options for ``arch``, all but the include folders.

        Raises
        ------
        ValueError
            If ``arch`` is not a real architecture such as ``"sm_90a"``.
        """
        if not _ARCH.fullmatch(arch):
            raise ValueError(f"arch: expected a real architecture such as 'sm_90a', got {arch!r}")
        registers = () if self.max_registers is None else (f"--maxrregcount={self.max_registers}",)
        return (
            f"--gpu-architecture={arch}",
            "--std=c++17",
            "--ftz=false",
            "--prec-div=true",
            "--prec-sqrt=true",
            f"--fmad={'true' if self.fmad else 'false'}",
            "--generate-line-info",
            "--ptxas-options=-v",
            # NOTE: without it NVRTC's own cache may answer, and then ptxas reports no resources.
            "--no-cache",
            *registers,
            *self.extra_options,
            *(f"-D{name}={value}" for name, value in self.defines),
        )


@dataclass(frozen=True)
class Resources:
    """What one kernel takes, as ptxas reports it. Spills and stack include functions it calls."""

    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    static_smem_bytes: int


@dataclass(frozen=True)
class CompiledKernel:
    """A cubin, the compiler's log, its resources, and the cache file if there is one."""

    cubin: bytes = field(repr=False)
    log: str = field(repr=False)
    resources: Resources
    path: Path | None = None


def compile_cubin(
    spec: KernelSpec, arch: str, *, cache: CubinCache | None = None, use_cache: bool = True
) -> CompiledKernel:
    """Compile a kernel, or take it from the cache.

    Parameters
    ----------
    spec : KernelSpec
    arch : str
        Target such as ``"sm_90a"``.
    cache : CubinCache, optional
        Default: the one of :func:`default_cache`.
    use_cache : bool
        False compiles in any case and stores nothing.

    Returns
    -------
    CompiledKernel

    Raises
    ------
    CompileError
        If NVRTC rejects the source; carries path, options and log.
    ValueError
        If ``arch`` is malformed or the source includes what cannot be keyed.
    FileNotFoundError
        If there is no such ``.cu`` file.
    LaunchError
        If NVRTC is not installed.

    Notes
    -----
    Needs no GPU and no driver. Processes that ask for the same kernel at once compile it once.
    """
    if not use_cache:
        return _compiled(CacheEntry(*_compile(spec, arch)), None)
    cache = default_cache() if cache is None else cache
    while True:
        key = cache_key(spec, arch)
        try:
            entry = cache.get_or_build(key, functools.partial(_compile_keyed, spec, arch, key))
        except _SourcesChangedError:
            continue
        return _compiled(entry, cache.path(key))


def cache_key(spec: KernelSpec, arch: str) -> CacheKey:
    """Return the cache key of a kernel: sources, headers, options, and the NVRTC build.

    Where the sources lie is not part of it, so a cache filled on one machine serves an installation
    elsewhere; only the file names in line tables would differ.

    Raises
    ------
    ValueError
        If an ``#include`` leaves the kernel folders or is not spelled out, so that it cannot be
        keyed.
    """
    return make_key(
        spec.name, arch, options=spec.options(arch), sources=_sources(spec), compiler=nvrtc_build()
    )


def default_cache() -> CubinCache:
    """Return this process's cache for the directory now chosen by the environment."""
    return _cache_of(default_directory())


@functools.cache
def nvrtc_build() -> str:
    """Return version, library name, size and header hash of the NVRTC in use.

    The version alone does not tell 12.9.41 from 12.9.86; the start of the library, where its build
    id lies, and its size do.
    """
    nvrtc = require("cuda.bindings.nvrtc")
    major, minor = check(nvrtc.nvrtcVersion(), "nvrtcVersion")
    location = require("cuda.pathfinder").load_nvidia_dynamic_lib("nvrtc").abs_path
    if location is None:
        raise LaunchError("the NVRTC library has no known path, so its build cannot be keyed")
    library = Path(location).resolve()
    with library.open("rb") as stream:
        head = hashlib.sha256(stream.read(1 << 16)).hexdigest()[:16]
    return f"nvrtc {major}.{minor} {library.name} {library.stat().st_size} {head}"


def parse_resources(log: str, entry: str) -> Resources:
    """Read the resources of ``entry`` from a ``ptxas -v`` log.

    Raises
    ------
    ValueError
        If the log does not report on that entry.
    """
    _, found, section = log.partition(f"Compiling entry function '{entry}'")
    section = section.partition("Compiling entry function")[0]
    used = re.search(r"Used (\d+) registers(.*)", section)
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", section
    )
    if not found or used is None or not frames:
        raise ValueError(f"log: expected a ptxas report on entry {entry!r}, got {log!r}")
    cumulative_stack = re.search(r"(\d+) bytes cumulative stack size", used.group(2))
    smem = re.search(r"(\d+) bytes smem", used.group(2))
    stacks, stores, loads = zip(*(map(int, frame) for frame in frames), strict=True)
    return Resources(
        registers=int(used.group(1)),
        spill_store_bytes=sum(stores),
        spill_load_bytes=sum(loads),
        stack_bytes=int(cumulative_stack.group(1)) if cumulative_stack else max(stacks),
        static_smem_bytes=int(smem.group(1)) if smem else 0,
    )


def warmup(
    specs: Iterable[KernelSpec],
    archs: Iterable[str],
    progress: Callable[[int, int, KernelSpec, str], None] | None = None,
    processes: int | None = None,
    *,
    cache: CubinCache | None = None,
) -> dict[tuple[KernelSpec, str], CompiledKernel]:
    """Compile every kernel for every architecture into the cache, in parallel.

    Parameters
    ----------
    specs : iterable of KernelSpec
    archs : iterable of str
    progress : callable, optional
        Called as ``progress(num_done, num_total, spec, arch)`` after each kernel.
    processes : int, optional
        Default: one for each usable CPU. With 1 everything happens in this process.
    cache : CubinCache, optional

    Returns
    -------
    dict
        ``(spec, arch) -> CompiledKernel``.

    Raises
    ------
    CompileError
        The first one, after all others have finished.

    Notes
    -----
    NVRTC does not scale over threads, so this spawns processes; a script that calls it needs the
    usual ``if __name__ == "__main__"`` guard.
    """
    cache = default_cache() if cache is None else cache
    archs = tuple(archs)
    jobs = list(dict.fromkeys((spec, arch) for spec in specs for arch in archs))
    done: dict[tuple[KernelSpec, str], CompiledKernel] = {}
    failures: list[CompileError] = []

    def finish(job: tuple[KernelSpec, str], kernel: CompiledKernel) -> None:
        done[job] = kernel
        if progress is not None:
            progress(len(done), len(jobs), *job)

    missing = []
    for job in jobs:
        key = cache_key(*job)
        entry = cache.get(key)
        if entry is None:
            missing.append(job)
        else:
            finish(job, _compiled(entry, cache.path(key)))

    workers = min(processes or len(os.sched_getaffinity(0)), len(missing))
    if workers > 1:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor, as_completed

        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            futures = {pool.submit(_compile_job, *job, cache.directory): job for job in missing}
            for future in as_completed(futures):
                try:
                    finish(futures[future], future.result())
                except CompileError as error:
                    failures.append(error)
    else:
        for job in missing:
            try:
                finish(job, compile_cubin(*job, cache=cache))
            except CompileError as error:
                failures.append(error)
    if failures:
        raise failures[0]
    return done


def _compile_job(spec: KernelSpec, arch: str, directory: Path) -> CompiledKernel:
    """Compile one kernel in a worker process."""
    return compile_cubin(spec, arch, cache=_cache_of(directory))


class _SourcesChangedError(Exception):
    """A source was edited between its reading for the key and its reading by NVRTC."""


def _compile_keyed(spec: KernelSpec, arch: str, key: CacheKey) -> tuple[bytes, dict[str, Any]]:
    """Compile what ``key`` was made of, or raise if that is no longer what the files say."""
    built = _compile(spec, arch)
    if cache_key(spec, arch) != key:
        raise _SourcesChangedError
    return built


def _compile(spec: KernelSpec, arch: str) -> tuple[bytes, dict[str, Any]]:
    """Compile and return the cubin with the metadata that is cached beside it."""
    options = (*spec.options(arch), *(f"-I{folder}" for folder in spec.include_dirs))
    cubin, log = _run_nvrtc(spec.path.read_text(encoding="utf-8"), str(spec.path), options)
    try:
        resources = parse_resources(log, spec.name)
    except ValueError as error:
        raise CompileError(
            str(spec.path), options, f'no extern "C" __global__ {spec.name} was compiled: {error}'
        ) from error
    return cubin, {"log": log, "resources": asdict(resources), "nvrtc": nvrtc_build()}


def _run_nvrtc(source: str, path: str, options: tuple[str, ...]) -> tuple[bytes, str]:
    """Run NVRTC on one program and return its cubin and log."""
    nvrtc = require("cuda.bindings.nvrtc")
    program = check(nvrtc.nvrtcCreateProgram(source.encode(), path.encode(), 0, [], []))
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])[0]
        # NOTE: the buffers are bytearrays: the bindings write into what they are given, and a bytes
        # object of length one is shared by the whole interpreter.
        buffer = bytearray(check(nvrtc.nvrtcGetProgramLogSize(program)))
        check(nvrtc.nvrtcGetProgramLog(program, buffer))
        log = buffer.decode(errors="replace").rstrip("\0\n ")
        if status:
            raise CompileError(path, options, log or status.name)
        cubin = bytearray(check(nvrtc.nvrtcGetCUBINSize(program)))
        if not cubin:
            raise CompileError(path, options, f"NVRTC returned an empty cubin\n{log}")
        check(nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(cubin), log


def _compiled(entry: CacheEntry, path: Path | None) -> CompiledKernel:
    """Turn a cache entry into a CompiledKernel."""
    metadata = entry.metadata
    return CompiledKernel(entry.cubin, metadata["log"], Resources(**metadata["resources"]), path)


def _sources(spec: KernelSpec) -> list[tuple[str, str]]:
    """Return (name, text) of the kernel and of every header; refuse includes that escape."""
    kernel, folders = spec.path, spec.include_dirs
    files = [(kernel.parent, kernel)]
    for folder in folders:
        files += [(folder, header) for header in sorted(folder.rglob("*.cuh"))]
    sources = []
    for folder, path in files:
        text = path.read_text(encoding="utf-8")
        for argument in _INCLUDE.findall(text):
            _check_include(argument, path, folders)
        sources.append((path.relative_to(folder).as_posix(), text))
    return sources


def _check_include(argument: str, path: Path, folders: tuple[Path, ...]) -> None:
    """Refuse an include from outside the kernel folders; NVRTC may report one found nowhere."""
    literal = _LITERAL_INCLUDE.match(argument)
    if literal is None:
        raise ValueError(f"{path}: expected #include of a literal name, got {argument!r}")
    name = PurePosixPath(literal.group(1) or literal.group(2))
    outside = name.is_absolute() or ".." in name.parts
    found = any((folder / name).exists() for folder in (path.parent, *folders))
    if outside or (found and name.suffix != ".cuh"):
        raise ValueError(
            f"{path}: expected #include of a .cuh below {' or '.join(map(str, folders))}, "
            f"got {str(name)!r}; its text could not be part of the cache key"
        )


def _plain(value: str | int) -> str | int:
    """Write a bool as the 0 or 1 that a macro needs."""
    return int(value) if isinstance(value, bool) else value


@functools.cache
def _cache_of(directory: Path) -> CubinCache:
    """Return the process's one cache of a directory."""
    return CubinCache(directory)
