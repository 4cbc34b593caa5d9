"""What the commands print with: the console, units, bars, and the error that ends a command.

Everything is readable at 80 columns, without colours and, where the output's encoding has no block
characters, in ASCII.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

_BLOCKS = " ▁▂▃▄▅▆▇█"
_ASCII = " .:-=+*#@"
_EIGHTHS = "▏▎▍▌▋▊▉█"


class CommandError(Exception):
    """A command cannot do what it was asked for; the message is all that the user needs."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave a reader that has gone to the command line's main function."""
        raise BrokenPipeError


def make_console() -> Console:
    """Return a console on the standard output that prints text as it is: no markup, no emoji."""
    return _Console(highlight=False, emoji=False, markup=False)


def is_ascii(console: Console) -> bool:
    """Tell whether the output's encoding lacks block characters."""
    return bool(console.options.ascii_only)


def facts() -> Table:
    """Return an empty table of names and what is to be said about them."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, min_width=9)
    table.add_column(overflow="fold")
    return table


def seconds(value: float) -> str:
    """Write a time with a fitting unit: ``12.3 us``, ``4.56 ms``, ``1.2 s``."""
    for limit, unit, factor in ((1e-3, "us", 1e6), (1.0, "ms", 1e3)):
        if value < limit:
            return f"{value * factor:.3g} {unit}"
    return f"{value:.3g} s" if value < 100 else f"{value:.0f} s"


def quantity(value: float, unit: str) -> str:
    """Write a number with a decimal prefix: ``11.3 GB``, ``1.21 TFLOP/s``."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 999.5 or prefix == "T":
            break
        value /= 1000
    return f"{value:.3g} {prefix}{unit}"


def sparkline(values: Sequence[float], top: float, *, ascii_only: bool) -> str:
    """Draw one character for each value, its height out of `top`; only a zero is blank."""
    levels = _ASCII if ascii_only else _BLOCKS
    steps = len(levels) - 1
    heights = (max(1, min(steps, round(steps * v / (top or 1)))) if v > 0 else 0 for v in values)
    return "".join(levels[height] for height in heights)


def bar(fraction: float, width: int, *, ascii_only: bool) -> str:
    """Draw a horizontal bar of a fraction of `width` characters."""
    fraction = min(max(fraction, 0.0), 1.0)
    if ascii_only:
        return "#" * round(fraction * width)
    eighths = round(fraction * width * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[rest - 1] if rest else "")


def token_chart(counts: Sequence[int], *, ascii_only: bool, width: int = 64) -> list[str]:
    """Return lines that show how many tokens each expert got.

    Up to 16 experts get a bar each. More are columns of a chart, `width` to a line, each line with
    the number of its first expert; past 512 experts a column is the mean of several.
    """
    if len(counts) <= 16:
        top = max(counts, default=0)
        digits = len(str(top))
        room = width - digits - 3
        bars = [bar(n / (top or 1), room, ascii_only=ascii_only) for n in counts]
        return [f"{e:>5}  {counts[e]:>{digits}}  {drawn}" for e, drawn in enumerate(bars)]
    share = -(-len(counts) // 512)
    groups = (counts[i : i + share] for i in range(0, len(counts), share))
    columns = [sum(group) / len(group) for group in groups]
    lines = []
    for start in range(0, len(columns), width):
        part = sparkline(columns[start : start + width], max(columns), ascii_only=ascii_only)
        lines.append(f"{start * share:>5}  {part}")
    return lines
