"""How the benches of the small kernels time a stage and its peers.

Owns the choice between events and replays, the peer in array operations, and the Triton peer: its
configuration is chosen, its answer compared and its time taken in the same run, by the same method,
over the same inputs in the same rotation, taking turns with cumoe's. A Triton peer is a guest: one
that is not installed or fails is left out. The clocks are in :mod:`bench.harness`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bench.harness import Timing, measure
from bench.peer_stages import Stage, StageConfig
from bench.peers import guest, is_installed
from bench.record import Row, peer_fields

GRAPH_BELOW_US = 100.0
GRAPH_CALLS = 16
TUNING_REPEATS = 3
PEER_REPEATS = 5

Run = Callable[[int], object]


def has_triton() -> bool:
    """Whether torch and Triton are installed, and kernels compiled and not interpreted."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return is_installed("torch") and is_installed("triton") and not interpreted


def time_stage(
    xp: Any,
    run: Run,
    num_sets: int,
    args: argparse.Namespace,
    *,
    alone: Callable[[], object] | None = None,
    in_triton: Callable[[], Sequence[Stage]] | None = None,
) -> Row:
    """Time a stage whose answers have been checked, and its peers.

    From :data:`GRAPH_BELOW_US` on the stage is timed cold by events, one call after a flush of the
    L2; below as replays of a graph of several calls, which rotate over the inputs.

    Parameters
    ----------
    xp : module
        ``numpy``, where everything is timed by the host's clock, or ``cupy``.
    run : callable
        Makes the call on input set ``i < num_sets``.
    num_sets : int
    args : argparse.Namespace
        ``repeats`` and ``budget``.
    alone : callable, optional
        The stage in array operations, which allocates: timed by single calls on its one input.
    in_triton : callable, optional
        Returns the stage in Triton on each input set. Not called where torch or Triton is missing
        or there is no GPU.

    Returns
    -------
    dict
        ``timing``, ``method``, ``num_sets``, and the fields of :func:`bench.record.peer_fields`;
        peers are ``"numpy"`` or ``"cupy"``, and ``"triton"``.
    """
    on_host = xp is np
    settings: dict[str, Any] = {
        "inputs_rotate": num_sets,
        "repeats": args.repeats,
        "budget_s": args.budget,
        "warmup_s": 0.0 if on_host else 0.05,
        "clock": "host" if on_host else "device",
    }
    timing, method = measure({"op": run}, **settings)["op"], "host" if on_host else "events"
    replayed = not on_host and timing.us < GRAPH_BELOW_US
    if replayed:
        calls = max(GRAPH_CALLS, num_sets)
        method = f"graph of {calls}"
        settings |= {"graph": True, "calls": calls}
    peers: dict[str, Row] = {}
    in_triton = None if on_host or not has_triton() else in_triton
    if replayed or in_triton is not None:
        timing, peers = time_beside(run, in_triton, settings, method)
    if alone is not None:
        settings |= {"inputs_rotate": 1, "repeats": min(args.repeats, PEER_REPEATS)}
        settings |= {"graph": False, "calls": 1}
        found = measure({"peer": lambda i: alone()}, **settings)["peer"]
        peers["numpy" if on_host else "cupy"] = figures_of(found, "host" if on_host else "events")
    return {"timing": timing, "method": method, "num_sets": num_sets, **peer_fields(peers)}


def time_beside(
    run: Run,
    in_triton: Callable[[], Sequence[Stage]] | None,
    settings: dict[str, Any],
    method: str,
) -> tuple[Timing, dict[str, Row]]:
    """Time a stage, taking turns with Triton's where there is one that is right.

    Parameters
    ----------
    run, in_triton : callable
        As :func:`time_stage` takes them.
    settings : dict
        How :func:`bench.harness.measure` is asked.
    method : str
        Their name in a row.

    Returns
    -------
    timing : Timing
    peers : dict of str to dict
        ``"triton"``, or nothing.
    """
    if in_triton is not None:
        with guest("Triton"):
            stages = in_triton()
            config = choose_config(stages, settings)
            for stage in stages:
                stage.check(config)
            runs = [stage.run(config) for stage in stages]
            both = measure({"op": run, "triton": lambda i: runs[i]()}, **settings)
            figures = figures_of(both["triton"], method) | {"config": str(config)}
            return both["op"], {"triton": figures}
    return measure({"op": run}, **settings)["op"], {}


def figures_of(timing: Timing, method: str) -> Row:
    """Return what is kept of a peer."""
    return {"us": timing.us, "us_min": timing.us_min, "us_max": timing.us_max, "method": method}


def choose_config(stages: Sequence[Stage], settings: dict[str, Any]) -> StageConfig:
    """Return the fastest of the configurations that run.

    Parameters
    ----------
    stages : sequence of Stage
        The same stage on each input set.
    settings : dict
        How :func:`bench.harness.measure` is asked; samples are few here.

    Raises
    ------
    RuntimeError
        If none runs.
    """
    configs: dict[str, StageConfig] = {}
    variants: dict[str, Run] = {}
    failed = []
    for config in stages[0].candidates():
        runs = [stage.run(config) for stage in stages]
        try:
            runs[0]()
        except Exception as error:  # such as more registers than there are
            failed.append(f"{config}: {error}")
            continue
        configs[str(config)] = config
        variants[str(config)] = lambda i, runs=runs: runs[i]()  # type: ignore[misc]
    if not configs:
        raise RuntimeError(f"no configuration runs: {failed}")
    if len(configs) == 1:
        return next(iter(configs.values()))
    timings = measure(variants, **settings | {"repeats": TUNING_REPEATS, "warmup_s": 0.0})
    return configs[min(timings, key=lambda name: timings[name].us)]
