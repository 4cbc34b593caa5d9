"""Compiled kernels on disk: one verified file per key, compiled once by however many processes.

An entry is the cubin followed by its metadata and a trailer, so the file itself loads as a cubin
(the loader stops at the ELF image) and one ``os.replace`` publishes everything. A reader checks
length, hash and key, and removes what does not hold; a writer that dies leaves a temporary file and
a released lock, neither of which is in anyone's way. A directory that cannot be written costs one
warning, no more. The key says what an entry depends on; gathering that is the compiler's part
(``compile.py``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["CacheEntry", "CacheKey", "CubinCache", "default_directory", "make_key"]

SCHEMA = 1
"""Version of the key and of the file layout; raise it when either changes."""

_MAGIC = b"CUMOECB1"
_TRAILER = struct.Struct("<32sQQ8s")  # sha256 of what precedes, cubin bytes, metadata bytes, magic
_ELF_MAGIC = b"\x7fELF"
_STALE_SECONDS = 3600.0
_LOCK_TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class CacheKey:
    """Identity of a compile.

    Attributes
    ----------
    stem, arch : str
        Kernel and target, for people reading the directory.
    digest : str
        Hex sha256 over everything the cubin depends on.
    """

    stem: str
    arch: str
    digest: str

    @property
    def file_name(self) -> str:
        """``<stem>-<arch>-<digest prefix>.cubin``."""
        return f"{self.stem}-{self.arch}-{self.digest[:32]}.cubin"


@dataclass(frozen=True)
class CacheEntry:
    """A cubin and what was recorded when it was compiled (JSON values)."""

    cubin: bytes = field(repr=False)
    metadata: dict[str, Any]


def make_key(
    stem: str,
    arch: str,
    *,
    options: Sequence[str],
    sources: Sequence[tuple[str, str]],
    compiler: str,
) -> CacheKey:
    """Hash everything a cubin depends on.

    Parameters
    ----------
    stem, arch : str
    options : sequence of str
        Compiler options, defines included; directories excluded.
    sources : sequence of (name, text)
        The kernel and every header it may include, named relative to its directory.
    compiler : str
        The exact build of the compiler.

    Returns
    -------
    CacheKey
    """
    parts = [SCHEMA, stem, arch, list(options), [list(source) for source in sources], compiler]
    return CacheKey(stem, arch, hashlib.sha256(json.dumps(parts).encode()).hexdigest())


def default_directory() -> Path:
    """Return ``$CUMOE_CACHE_DIR``, or ``$XDG_CACHE_HOME/cumoe``, or ``~/.cache/cumoe``."""
    chosen = os.environ.get("CUMOE_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cumoe"


class CubinCache:
    """A directory of compiled kernels, with what this process has seen kept in memory.

    Parameters
    ----------
    directory : str or Path, optional
        Created with mode 0700 when first written. Default: :func:`default_directory`.

    Notes
    -----
    Safe for any number of processes and threads, and for a process killed at any moment. Whoever
    may write to the directory may replace a kernel, so share one only within a trusted group.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        self.directory = default_directory() if directory is None else Path(directory).expanduser()
        self._memory: dict[str, CacheEntry] = {}
        self._warned = False
        self._tidied = False

    def get(self, key: CacheKey) -> CacheEntry | None:
        """Return the entry of ``key``, or None. A damaged file is removed and counts as absent."""
        entry = self._memory.get(key.digest)
        if entry is not None:
            return entry
        path = self.directory / key.file_name
        try:
            data = path.read_bytes()
        except OSError:
            return None
        entry = _decode(data, key)
        if entry is None:
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        self._memory[key.digest] = entry
        return entry

    def put(self, key: CacheKey, cubin: bytes, metadata: dict[str, Any]) -> CacheEntry:
        """Store a cubin; if the directory cannot be written, keep it in memory and warn once.

        Raises
        ------
        ValueError
            If ``cubin`` is not an ELF image.
        """
        if not cubin.startswith(_ELF_MAGIC):
            raise ValueError(f"cubin: expected an ELF image, got {cubin[:8]!r}")
        entry = CacheEntry(cubin, metadata)
        self._memory[key.digest] = entry
        try:
            self._make_directory()
            _write_atomically(self.directory / key.file_name, _encode(entry, key))
            if not self._tidied:  # looks at every file, so once a process
                self._remove_stale()
                self._tidied = True
        except OSError as error:
            self._warn(error)
        return entry

    def get_or_build(
        self, key: CacheKey, build: Callable[[], tuple[bytes, dict[str, Any]]]
    ) -> CacheEntry:
        """Return the entry of ``key``, calling ``build`` if absent, in one process at a time.

        Parameters
        ----------
        key : CacheKey
        build : callable
            Returns ``(cubin, metadata)``.
        """
        entry = self.get(key)
        if entry is not None:
            return entry
        with self._lock(key):
            entry = self.get(key)  # another process may have built it while this one waited
            return self.put(key, *build()) if entry is None else entry

    def path(self, key: CacheKey) -> Path | None:
        """Return the file of ``key``, or None if it is not on disk."""
        path = self.directory / key.file_name
        return path if path.is_file() else None

    def entries(self) -> list[Path]:
        """Return the entry files, sorted by name."""
        return sorted(self.directory.glob("*.cubin")) if self.directory.is_dir() else []

    def size_bytes(self) -> int:
        """Return the bytes that the entries take on disk."""
        total = 0
        for path in self.entries():
            with contextlib.suppress(OSError):
                total += path.stat().st_size
        return total

    def clear(self) -> None:
        """Remove every entry, from disk and from memory. Loaded kernels are not affected."""
        self._memory.clear()
        for pattern in ("*.cubin", ".*.tmp", ".*.lock"):
            for path in self.directory.glob(pattern):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _make_directory(self) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextlib.contextmanager
    def _lock(self, key: CacheKey) -> Iterator[None]:
        """Hold the key's lock; where locks do not work go on without, to compile twice at worst."""
        import filelock

        with contextlib.ExitStack() as stack:
            try:
                self._make_directory()
                lock_path = self.directory / f".{key.file_name}.lock"
                lock = filelock.FileLock(lock_path, mode=0o666)  # the directory's mode decides
                stack.enter_context(lock.acquire(timeout=_LOCK_TIMEOUT_SECONDS))
                with contextlib.suppress(OSError):
                    os.utime(lock_path)  # in use now, so not stale
            except (OSError, NotImplementedError, filelock.Timeout) as error:
                self._warn(error)
            yield

    def _remove_stale(self) -> None:
        """Remove temporary and lock files that no live process can still be using."""
        oldest = time.time() - _STALE_SECONDS
        for pattern in (".*.tmp", ".*.lock"):
            for path in self.directory.glob(pattern):
                with contextlib.suppress(OSError):
                    if path.stat().st_mtime < oldest:
                        path.unlink()

    def _warn(self, error: BaseException) -> None:
        """Say once that kernels will not be kept."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"kernel cache {self.directory} is not usable ({error}); kernels are compiled anew "
                "in every process. Set CUMOE_CACHE_DIR to a writable directory.",
                RuntimeWarning,
                stacklevel=2,
            )


def _encode(entry: CacheEntry, key: CacheKey) -> bytes:
    """Lay an entry out as cubin, metadata, trailer."""
    metadata = json.dumps({"key": key.digest, "metadata": entry.metadata}).encode()
    body = entry.cubin + metadata
    return body + _TRAILER.pack(
        hashlib.sha256(body).digest(), len(entry.cubin), len(metadata), _MAGIC
    )


def _decode(data: bytes, key: CacheKey) -> CacheEntry | None:
    """Read an entry back, or return None if anything about it is wrong."""
    if len(data) < _TRAILER.size:
        return None
    body = data[: -_TRAILER.size]
    digest, cubin_bytes, metadata_bytes, magic = _TRAILER.unpack(data[-_TRAILER.size :])
    if magic != _MAGIC or cubin_bytes + metadata_bytes != len(body):
        return None
    if hashlib.sha256(body).digest() != digest or not body.startswith(_ELF_MAGIC):
        return None
    record = json.loads(body[cubin_bytes:])
    if record["key"] != key.digest:
        return None
    return CacheEntry(body[:cubin_bytes], record["metadata"])


def _write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it appears complete or not at all."""
    descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            os.fchmod(stream.fileno(), 0o644)  # the directory's mode decides who reads it
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
