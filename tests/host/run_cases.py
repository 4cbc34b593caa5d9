"""Run kernels' cases and print the seconds of each: ``python -m tests.host.run_cases``.

Compile times are left out: every case runs once before it is timed. ``--once`` runs each case once.
"""

from __future__ import annotations

import argparse
import time

from tests.host import cases, layer, loader


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernel", nargs="*", help="kernel names, or 'layer'; default all")
    parser.add_argument("--case", help="the one case to run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arch", type=int, default=loader.CUDA_ARCH)
    parser.add_argument("--every", type=int, default=1, help="the first case of so many")
    parser.add_argument("--once", action="store_true", help="do not time")
    arguments = parser.parse_args()
    options = loader.HostOptions(seed=arguments.seed, arch=arguments.arch)
    tables = {**cases.CASES, "layer": layer.LAYER_CASES}
    for kernel in arguments.kernel or tables:
        seconds, count = 0.0, 0
        for case in tables[kernel][:: arguments.every]:
            if arguments.case in (None, case.name):
                cases.check(case, options)
                start = time.perf_counter()
                if not arguments.once:
                    cases.check(case, options)
                seconds += time.perf_counter() - start
                count += 1
        print(f"{kernel:24} {count:3} cases  {seconds:6.2f} s", flush=True)


if __name__ == "__main__":
    main()
