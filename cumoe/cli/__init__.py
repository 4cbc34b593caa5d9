"""The command line, ``python -m cumoe demo | doctor | warmup``.

Owns the arguments, the exit codes and what a user sees when something cannot be done; each command
is a module of its own, imported when it is called. Exit codes: 0 done, 1 the demo's answer is
wrong, 2 the command cannot run, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from cumoe.cli.console import CommandError
from cumoe.config import RoutingMethod
from cumoe.launch import ARCHS, CompileError, LaunchError
from cumoe.models import MODELS

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        By default those of the process.

    Returns
    -------
    int
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        return _run(args)
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
    except (LaunchError, CompileError) as error:
        print(f"error: {error}\n`python -m cumoe doctor` shows what was found", file=sys.stderr)
    except BrokenPipeError:
        # The reader, `head` say, has seen enough. Nothing more can be flushed at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 2


def _run(args: argparse.Namespace) -> int:
    """Call the chosen command."""
    if args.command == "demo":
        if args.ranks is not None:
            from cumoe.cli import ranks

            return ranks.run(args)
        from cumoe.cli import demo

        return demo.run(args)
    if args.command == "doctor":
        from cumoe.cli import doctor

        return doctor.run(args)
    from cumoe.cli import warmup

    return warmup.run(args)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    from cumoe import __version__

    parser = argparse.ArgumentParser(
        prog="python -m cumoe", description="Mixture-of-Experts layers on CuPy arrays."
    )
    parser.add_argument("--version", action="version", version=f"cumoe {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    _add_demo(commands)
    _add_doctor(commands)
    _add_warmup(commands)
    return parser


_Commands = argparse._SubParsersAction


def _add_demo(commands: _Commands[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="run one expert layer: plan, load, time per stage, error",
        description="Run the expert layer of a model, its size fitted to the machine, and compare "
        "a sample of its tokens with an oracle.",
    )
    demo.add_argument(
        "--model",
        choices=sorted(MODELS),
        default="deepseek_v3",
        metavar="NAME",
        help=f"one of {', '.join(sorted(MODELS))} (default: %(default)s)",
    )
    demo.add_argument(
        "--tokens",
        type=_positive,
        metavar="N",
        help="tokens of the call (default: 4096 on a GPU, 256 on NumPy, 64 of several ranks)",
    )
    demo.add_argument(
        "--recipe",
        choices=("fp8_block", "bf16"),
        default="fp8_block",
        help="precision of weights and activations (default: %(default)s)",
    )
    demo.add_argument(
        "--backend",
        choices=("auto", "numpy", "cuda"),
        default="auto",
        help="what runs it (default: a GPU if one is usable)",
    )
    demo.add_argument(
        "--seed",
        type=_natural,
        default=0,
        metavar="N",
        help="of weights, tokens and logits (default: %(default)s)",
    )
    demo.add_argument(
        "--ranks",
        type=_positive,
        metavar="N",
        help="start N processes, one for each GPU, that find each other and share memory; on "
        "NumPy each runs a shard of the layer",
    )


def _add_doctor(commands: _Commands[argparse.ArgumentParser]) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="show what is installed and found, and which backend is on or off and why",
        description="Show what is installed and found, and which backend is on or off and why.",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead")


def _add_warmup(commands: _Commands[argparse.ArgumentParser]) -> None:
    warmup = commands.add_parser(
        "warmup",
        help="compile what given shapes need into the cache, with or without a GPU",
        description="Compile the kernels that expert layers need into the cache. Works without a "
        "GPU: say for which architectures.",
    )
    shapes = warmup.add_argument_group("shapes", "named models, or one given by its sizes")
    shapes.add_argument(
        "--shapes",
        type=_names(sorted(MODELS)),
        metavar="NAME,...",
        help=f"any of {', '.join(sorted(MODELS))}, or all",
    )
    shapes.add_argument("--hidden", type=_positive, metavar="N", help="hidden size")
    shapes.add_argument("--intermediate", type=_positive, metavar="N", help="intermediate size")
    shapes.add_argument("--experts", type=_positive, metavar="N", help="routed experts")
    shapes.add_argument("--top-k", type=_positive, metavar="N", help="routed experts of a token")
    shapes.add_argument(
        "--shared-experts",
        type=_natural,
        default=0,
        metavar="N",
        help="experts that every token uses (default: %(default)s)",
    )
    shapes.add_argument(
        "--method",
        choices=[m.value for m in RoutingMethod],
        default="renormalize",
        metavar="NAME",
        help=f"one of {', '.join(RoutingMethod)} (default: %(default)s)",
    )
    shapes.add_argument(
        "--groups",
        type=_positive,
        default=1,
        metavar="N",
        help="groups of experts (default: %(default)s)",
    )
    shapes.add_argument(
        "--top-groups",
        type=_positive,
        default=1,
        metavar="N",
        help="groups that a token chooses from (default: %(default)s)",
    )
    warmup.add_argument(
        "--recipe",
        type=_names(["fp8_block", "bf16", "fp8_tensor"]),
        metavar="NAME,...",
        default=["fp8_block", "bf16"],
        help="fp8_block, bf16, fp8_tensor or all (default: the first two)",
    )
    warmup.add_argument(
        "--max-num-tokens",
        type=_positive,
        metavar="N",
        help="most tokens of a call (default: any number)",
    )
    warmup.add_argument(
        "--arch",
        type=_names(list(ARCHS)),
        metavar="NAME,...",
        help=f"any of {', '.join(ARCHS)}, or all (default: those of the GPUs here, or sm_90a)",
    )
    warmup.add_argument(
        "--processes",
        type=_positive,
        metavar="N",
        help="compiler processes (default: one for each CPU)",
    )


def _integer(text: str, low: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}") from None
    if value < low:
        raise argparse.ArgumentTypeError(f"expected at least {low}, got {value}")
    return value


def _positive(text: str) -> int:
    """Read an integer of at least 1."""
    return _integer(text, 1)


def _natural(text: str) -> int:
    """Read an integer of at least 0."""
    return _integer(text, 0)


class _names:  # noqa: N801
    """Reads a comma-separated choice of names; ``all`` stands for every one."""

    def __init__(self, known: Sequence[str]) -> None:
        self._known = list(known)

    def __call__(self, text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        if names == ["all"]:
            return list(self._known)
        unknown = [name for name in names if name not in self._known]
        if unknown or not names:
            raise argparse.ArgumentTypeError(
                f"expected one or more of {', '.join(self._known)} or all, got {text!r}"
            )
        return list(dict.fromkeys(names))
