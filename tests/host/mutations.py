"""One changed line of a kernel, which a case must notice."""

from __future__ import annotations

from dataclasses import dataclass

from cumoe.launch import KERNEL_DIR

BARRIER = "__syncthreads();"


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new` in a file, at its `nth` occurrence; the kernel's cases must notice.

    A line moves when `moved` names the text before which it is put instead.
    """

    file: str
    old: str
    new: str
    kernel: str = ""
    case: str = ""  # the one case to run; by default all until one fails
    nth: int = 0
    moved: str = ""

    def apply(self) -> str:
        """Return the changed text."""
        parts = (KERNEL_DIR / self.file).read_text().split(self.old)
        assert len(parts) > self.nth + 1, f"{self.file}: {self.old!r} does not occur"
        head, tail = parts[: self.nth + 1], parts[self.nth + 1 :]
        text = self.old.join(head) + self.new + self.old.join(tail)
        if self.moved:
            assert text.count(self.moved) == 1, f"{self.file}: {self.moved!r} is not there once"
            text = text.replace(self.moved, f"{self.old} {self.moved}")
        return text
