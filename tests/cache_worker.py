"""A process that uses the kernel cache, for the tests that race or kill such processes.

Run as ``python cache_worker.py MODE SOURCE_DIR CACHE_DIR LOG GO``: waits until the file GO exists,
then compiles the kernel ``tiny`` and prints the sha256 of its cubin. Each compile adds a line to
LOG. MODE is ``run``, ``die_compiling`` (killed while it holds the lock) or ``die_writing`` (killed
before it publishes).
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

from cumoe.launch import CubinCache, KernelSpec, compile, compile_cubin


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(mode: str, source_dir: str, cache_dir: str, log: str, go: str) -> None:
    run_nvrtc = compile._run_nvrtc
    compile.KERNEL_DIR = Path(source_dir)  # no other headers in the key

    def logged(source: str, path: str, options: tuple[str, ...]) -> tuple[bytes, str]:
        with open(log, "a") as stream:
            stream.write("compile\n")
        time.sleep(0.2)  # a window for the others to arrive in
        return run_nvrtc(source, path, options)

    compile._run_nvrtc = die if mode == "die_compiling" else logged  # type: ignore[assignment]
    if mode == "die_writing":
        os.replace = die  # type: ignore[assignment]
    spec = KernelSpec("tiny", source_dir=Path(source_dir))
    cache = CubinCache(cache_dir)
    print("ready", flush=True)
    while not os.path.exists(go):
        time.sleep(0.01)
    kernel = compile_cubin(spec, "sm_90a", cache=cache)
    print(hashlib.sha256(kernel.cubin).hexdigest(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
