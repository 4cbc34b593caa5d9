"""The arguments that the benches share, and what they mean; each bench adds its own.

Owns names, defaults and help texts, so that ``--models``, ``--tokens`` and the rest are the same
everywhere. Measures nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.inputs import TINY, find_backend
from bench.shapes import Recipe


def make_parser(module: str, doc: str | None, results: Path) -> argparse.ArgumentParser:
    """Return a parser with ``--dry-run`` and ``--out``, which every bench has."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--dry-run", action="store_true", help="a tiny layer on NumPy; writes only to --out")
    add("--out", type=Path, help=f"default: bench/results/{results.name}")
    return parser


def make_stage_parser(
    module: str,
    doc: str | None,
    results: Path,
    *,
    variants: Sequence[str],
    tokens: Sequence[int],
    budget: float,
) -> argparse.ArgumentParser:
    """Return the parser of a bench of one stage: variants by numbers of tokens."""
    parser = make_parser(module, doc, results)
    add = parser.add_argument
    add("--variants", nargs="+", choices=variants, default=variants)
    add("--tokens", nargs="+", type=_count, metavar="T", help=f"default: {_words(tokens)}")
    add("--repeats", type=_count, default=30, help="samples (default: 30)")
    text = f"of one case's samples (default: {budget:g})"
    add("--budget", type=float, default=budget, metavar="SECONDS", help=text)
    add("--seed", type=int, default=0)
    add("--backend", choices=("auto", "numpy", "cupy"), default="auto")
    add("--merge", action="store_true", help="keep rows of the file that are not repeated")
    return parser


@dataclass(frozen=True)
class Settings:
    """What the shared arguments ask for.

    Attributes
    ----------
    xp : module
        ``numpy`` or ``cupy``.
    models : tuple of str
    tokens : tuple of int
    out : Path or None
        File of the results; None writes nothing.
    """

    xp: Any
    models: tuple[str, ...]
    tokens: tuple[int, ...]
    out: Path | None


@dataclass(frozen=True)
class CaseArguments:
    """Defaults of a bench that goes through models, recipes and numbers of tokens.

    Parameters
    ----------
    module : str
        As ``python -m`` wants it.
    models, recipes, tokens : tuple
        What runs unless the arguments say otherwise.
    dry_tokens : tuple of int
        Numbers of tokens of a dry run, whose model is ``"tiny"``.
    results : Path
        Where figures go unless the arguments say otherwise.
    more_recipes : tuple
        What the arguments may ask for beside `recipes`.
    """

    module: str
    models: tuple[str, ...]
    recipes: tuple[Recipe, ...]
    tokens: tuple[int, ...]
    dry_tokens: tuple[int, ...]
    results: Path
    more_recipes: tuple[Recipe, ...] = ()

    def parser(self, doc: str | None) -> argparse.ArgumentParser:
        """Return a parser with the shared arguments."""
        parser = make_parser(self.module, doc, self.results)
        add = parser.add_argument
        add("--models", nargs="+", metavar="NAME", help=f"default: {' '.join(self.models)}")
        recipes = (*self.recipes, *self.more_recipes)
        add("--recipes", nargs="+", choices=recipes, default=self.recipes)
        add("--tokens", nargs="+", type=_count, metavar="T", help=f"default: {_words(self.tokens)}")
        add("--seed", type=int, default=0)
        add("--backend", choices=("auto", "numpy", "cupy"), default="auto")
        add("--merge", action="store_true", help="keep rows of the file that are not repeated")
        return parser

    def settle(self, args: argparse.Namespace) -> Settings:
        """Return what parsed arguments ask for.

        Raises
        ------
        SystemExit
            If figures are asked for and there is no GPU.
        """
        dry = args.dry_run
        return Settings(
            find_backend("numpy" if dry else args.backend),
            tuple(args.models or ((TINY.name,) if dry else self.models)),
            tuple(args.tokens or (self.dry_tokens if dry else self.tokens)),
            args.out or (None if dry else self.results),
        )


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def _words(values: Sequence[object]) -> str:
    return " ".join(map(str, values))
