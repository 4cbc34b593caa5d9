"""The kernel cache: what an entry depends on, damaged entries, and other processes.

No GPU. Processes that race or are killed are those of ``cache_worker.py``.
"""

from __future__ import annotations

import importlib
import os
import signal
import stat
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cumoe.launch import CubinCache, KernelSpec, compile_cubin
from cumoe.launch.cache import CacheKey, default_directory, make_key
from cumoe.launch.compile import cache_key, nvrtc_build

compile_module = importlib.import_module("cumoe.launch.compile")

WORKER = Path(__file__).with_name("cache_worker.py")
REPO = WORKER.parents[1]
TINY = '#include "tiny.cuh"\nextern "C" __global__ void tiny(int* p) { *p = kValue; }\n'
ARCH = "sm_90a"


@pytest.fixture
def source_dir(tmp_path, monkeypatch):
    """A kernel folder with one kernel and one header, and no other headers in sight."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "tiny.cu").write_text(TINY)
    (folder / "tiny.cuh").write_text("#pragma once\nconstexpr int kValue = 1;\n")
    monkeypatch.setattr(compile_module, "KERNEL_DIR", folder)
    return folder


@pytest.fixture
def spec(source_dir):
    return KernelSpec("tiny", source_dir=source_dir)


@pytest.fixture
def compiles(monkeypatch):
    """A list that grows by one path with every run of NVRTC in this process."""
    runs: list[str] = []
    run_nvrtc = compile_module._run_nvrtc

    def counted(source, path, options):
        runs.append(path)
        return run_nvrtc(source, path, options)

    monkeypatch.setattr(compile_module, "_run_nvrtc", counted)
    return runs


def start_worker(mode: str, source_dir: Path, cache_dir: Path, tmp_path: Path) -> subprocess.Popen:
    arguments = [mode, source_dir, cache_dir, tmp_path / "log", tmp_path / "go"]
    return subprocess.Popen(
        [sys.executable, str(WORKER), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )


def num_compiles(tmp_path: Path) -> int:
    log = tmp_path / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


class TestKey:
    def test_same_inputs_same_key(self, spec):
        assert cache_key(spec, ARCH) == cache_key(spec, ARCH)

    def test_file_name(self, spec):
        key = cache_key(spec, ARCH)
        assert key.file_name == f"tiny-{ARCH}-{key.digest[:32]}.cubin"

    @pytest.mark.parametrize(
        "change",
        [
            {"defines": (("A", 1),)},
            {"fmad": False},
            {"max_registers": 64},
            {"extra_options": ("--restrict",)},
        ],
    )
    def test_options(self, spec, source_dir, change):
        changed = KernelSpec("tiny", source_dir=source_dir, **change)
        assert cache_key(changed, ARCH) != cache_key(spec, ARCH)

    def test_arch(self, spec):
        assert cache_key(spec, "sm_80") != cache_key(spec, ARCH)

    def test_order_of_defines_does_not_count(self, source_dir):
        a = KernelSpec("tiny", (("A", 1), ("B", "x")), source_dir=source_dir)
        b = KernelSpec("tiny", (("B", "x"), ("A", 1)), source_dir=source_dir)
        assert a == b and hash(a) == hash(b) and cache_key(a, ARCH) == cache_key(b, ARCH)

    @pytest.mark.parametrize("name", ["tiny.cu", "tiny.cuh", "ptx/deep.cuh"])
    def test_text_of_source_and_headers(self, spec, source_dir, name):
        path = source_dir / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        before = cache_key(spec, ARCH)
        path.write_text(path.read_text() + "// a change\n")
        assert cache_key(spec, ARCH) != before

    def test_headers_of_the_package(self, spec, tmp_path, monkeypatch):
        shared = tmp_path / "shared"
        shared.mkdir()
        monkeypatch.setattr(compile_module, "KERNEL_DIR", shared)
        before = cache_key(spec, ARCH)
        (shared / "common.cuh").write_text("#pragma once\n")
        assert cache_key(spec, ARCH) != before

    def test_folder_does_not_count(self, spec, source_dir, tmp_path, monkeypatch):
        before = cache_key(spec, ARCH)
        moved = source_dir.rename(tmp_path / "moved")
        monkeypatch.setattr(compile_module, "KERNEL_DIR", moved)
        assert cache_key(KernelSpec("tiny", source_dir=moved), ARCH) == before

    def test_nvrtc_build(self, spec, monkeypatch):
        before = cache_key(spec, ARCH)
        assert nvrtc_build().startswith("nvrtc 1")
        monkeypatch.setattr(compile_module, "nvrtc_build", lambda: nvrtc_build() + "1")
        assert cache_key(spec, ARCH) != before

    def test_schema(self, monkeypatch):
        def key() -> CacheKey:
            return make_key("a", ARCH, options=[], sources=[("a.cu", "")], compiler="c")

        before = key()
        monkeypatch.setattr(importlib.import_module("cumoe.launch.cache"), "SCHEMA", 10**6)
        assert key() != before

    def test_no_two_splits_collide(self):
        keys = {
            make_key("a", ARCH, options=options, sources=sources, compiler="c")
            for options in (["-Dab"], ["-Da", "b"], [])
            for sources in ([("a", "b")], [("ab", "")], [("a", ""), ("b", "")])
        }
        assert len(keys) == 9


class TestEntries:
    def test_hit_survives_the_process_memory(self, spec, tmp_path, compiles):
        first = compile_cubin(spec, ARCH, cache=CubinCache(tmp_path / "c"))
        again = compile_cubin(spec, ARCH, cache=CubinCache(tmp_path / "c"))
        assert len(compiles) == 1
        assert again == first and first.log and first.resources.registers > 0

    def test_memory_needs_no_disk(self, spec, tmp_path, compiles):
        cache = CubinCache(tmp_path / "c")
        first = compile_cubin(spec, ARCH, cache=cache)
        assert first.path is not None
        first.path.unlink()
        assert compile_cubin(spec, ARCH, cache=cache).cubin == first.cubin
        assert len(compiles) == 1

    def test_use_cache_false(self, spec, tmp_path, compiles):
        cache = CubinCache(tmp_path / "c")
        for _ in range(2):
            kernel = compile_cubin(spec, ARCH, cache=cache, use_cache=False)
        assert len(compiles) == 2 and kernel.path is None and cache.entries() == []

    def test_file_is_itself_a_cubin(self, spec, tmp_path):
        kernel = compile_cubin(spec, ARCH, cache=CubinCache(tmp_path / "c"))
        assert kernel.path is not None
        assert kernel.path.read_bytes()[: len(kernel.cubin)] == kernel.cubin

    def test_listing_and_clear(self, spec, tmp_path, compiles):
        cache = CubinCache(tmp_path / "c")
        assert cache.entries() == [] and cache.size_bytes() == 0
        kernel = compile_cubin(spec, ARCH, cache=cache)
        assert cache.entries() == [kernel.path] == [cache.path(cache_key(spec, ARCH))]
        assert cache.size_bytes() > len(kernel.cubin)
        cache.clear()
        assert cache.entries() == [] and cache.path(cache_key(spec, ARCH)) is None
        compile_cubin(spec, ARCH, cache=cache)
        assert len(compiles) == 2

    def test_directory_is_private(self, spec, tmp_path):
        compile_cubin(spec, ARCH, cache=CubinCache(tmp_path / "c"))
        assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o700

    def test_default_directory(self, monkeypatch, tmp_path):
        monkeypatch.delenv("CUMOE_CACHE_DIR", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", "/home/someone")
        assert default_directory() == Path("/home/someone/.cache/cumoe")
        monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
        assert default_directory() == Path("/xdg/cumoe")
        monkeypatch.setenv("CUMOE_CACHE_DIR", str(tmp_path))
        assert CubinCache().directory == tmp_path

    def test_put_refuses_what_is_no_cubin(self, spec, tmp_path):
        with pytest.raises(ValueError, match="cubin: expected an ELF image"):
            CubinCache(tmp_path).put(cache_key(spec, ARCH), b"// ptx", {})

    def test_source_edited_while_compiling(self, spec, source_dir, tmp_path, monkeypatch):
        run_nvrtc = compile_module._run_nvrtc
        header = source_dir / "tiny.cuh"

        def editing(source, path, options):
            built = run_nvrtc(source, path, options)
            if "= 1" in header.read_text():
                header.write_text("#pragma once\nconstexpr int kValue = 2;\n")
            return built

        monkeypatch.setattr(compile_module, "_run_nvrtc", editing)
        kernel = compile_cubin(spec, ARCH, cache=CubinCache(tmp_path / "c"))
        assert kernel.path == tmp_path / "c" / cache_key(spec, ARCH).file_name
        assert CubinCache(tmp_path / "c").entries() == [kernel.path]


class TestDamage:
    DAMAGES = {
        "empty": lambda data: b"",
        "truncated": lambda data: data[: len(data) // 2],
        "last_byte_gone": lambda data: data[:-1],
        "bit_flipped_in_cubin": lambda data: data[:99] + bytes([data[99] ^ 1]) + data[100:],
        "bit_flipped_in_metadata": lambda data: data[:-80] + bytes([data[-80] ^ 1]) + data[-79:],
        "wrong_magic": lambda data: data[:-8] + b"CUMOECB0",
        "not_elf": lambda data: b"\0" + data[1:],
        "grown": lambda data: data + b"\0",
        "zeros": lambda data: bytes(len(data)),
    }

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_damaged_entry_is_compiled_anew(self, spec, tmp_path, compiles, damage):
        good = compile_cubin(spec, ARCH, cache=CubinCache(tmp_path / "c"))
        assert good.path is not None
        intact = good.path.read_bytes()
        good.path.write_bytes(self.DAMAGES[damage](intact))
        assert compile_cubin(spec, ARCH, cache=CubinCache(tmp_path / "c")).cubin == good.cubin
        assert len(compiles) == 2
        assert good.path.read_bytes()[: len(good.cubin)] == good.cubin

    def test_entry_of_another_key(self, spec, tmp_path, compiles):
        cache = CubinCache(tmp_path / "c")
        other = compile_cubin(spec, "sm_80", cache=cache)
        assert other.path is not None
        key = cache_key(spec, ARCH)
        other.path.rename(cache.directory / key.file_name)
        assert CubinCache(tmp_path / "c").get(key) is None
        assert cache.entries() == []

    @pytest.mark.parametrize("where", ["/proc/nowhere", "{tmp}/file/below"])
    def test_unwritable_directory(self, spec, tmp_path, compiles, where):
        (tmp_path / "file").touch()
        cache = CubinCache(where.format(tmp=tmp_path))
        with pytest.warns(RuntimeWarning, match="is not usable") as caught:
            kernel = compile_cubin(spec, ARCH, cache=cache)
            compile_cubin(spec, "sm_80", cache=cache)
            compile_cubin(spec, ARCH, cache=cache)
        assert len(caught) == 1
        assert len(compiles) == 2 and kernel.path is None and cache.entries() == []

    def test_disk_full(self, spec, tmp_path, monkeypatch):
        def full(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.warns(RuntimeWarning, match="No space left"):
            kernel = compile_cubin(spec, ARCH, cache=CubinCache(tmp_path / "c"))
        assert kernel.cubin and kernel.path is None
        assert not list((tmp_path / "c").glob(".*.tmp"))

    def test_stale_files_are_removed(self, spec, tmp_path):
        cache = CubinCache(tmp_path / "c")
        cache.directory.mkdir()
        old, young = cache.directory / ".old.tmp", cache.directory / ".young.tmp"
        lock = cache.directory / ".other.cubin.lock"
        for path in (old, young, lock):
            path.touch()
        for path in (old, lock):
            os.utime(path, (time.time() - 1e5,) * 2)
        compile_cubin(spec, ARCH, cache=cache)
        assert not old.exists() and not lock.exists() and young.exists()


class TestProcesses:
    def test_many_processes_compile_once(self, source_dir, tmp_path):
        workers = [start_worker("run", source_dir, tmp_path / "c", tmp_path) for _ in range(32)]
        for worker in workers:
            assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
        (tmp_path / "go").touch()
        digests = {worker.communicate(timeout=100)[0] for worker in workers}
        assert [worker.returncode for worker in workers] == [0] * 32
        assert num_compiles(tmp_path) == 1
        assert len(digests) == 1 and len(digests.pop()) == 65

    def test_many_threads_compile_once(self, spec, tmp_path, compiles):
        cache = CubinCache(tmp_path / "c")
        with ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(compile_cubin, spec, ARCH, cache=cache) for _ in range(8)]
        assert len({job.result().cubin for job in jobs}) == 1 and len(compiles) == 1

    @pytest.mark.parametrize(("mode", "leftovers"), [("die_compiling", 0), ("die_writing", 1)])
    def test_killed_process_is_in_nobodys_way(self, spec, source_dir, tmp_path, mode, leftovers):
        (tmp_path / "go").touch()
        dying = start_worker(mode, source_dir, tmp_path / "c", tmp_path)
        dying.communicate(timeout=100)
        assert dying.returncode == -signal.SIGKILL
        assert (tmp_path / "c" / f".{cache_key(spec, ARCH).file_name}.lock").exists()
        assert not CubinCache(tmp_path / "c").entries()
        assert len(list((tmp_path / "c").glob(".*.tmp"))) == leftovers

        start = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kernel = compile_cubin(spec, ARCH, cache=CubinCache(tmp_path / "c"))
        assert kernel.path is not None and time.monotonic() - start < 60
