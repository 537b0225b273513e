"""What one kind of trial gave: counts, and every failure with what reproduces it."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

_KEPT = 20


@dataclass
class Tally:
    """Counts of one kind of trial.

    Attributes:
        what: the kind.
        right: trials that ended as they should have: a right result, or after a fault nothing lost.
        refused: trials that ended in one clear error.
        failed: all others; `failures` describes the first of them.
        facts: whatever else was measured.
        skipped: why the trials could not be made, where they could not.
    """

    what: str
    right: int = 0
    refused: int = 0
    failed: int = 0
    failures: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    skipped: str | None = None

    @property
    def tried(self) -> int:
        return self.right + self.refused + self.failed

    def fail(self, described: str) -> None:
        """Count a failure; only the first few descriptions are kept."""
        self.failed += 1
        if len(self.failures) < _KEPT:
            self.failures.append(described)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tried": self.tried}


def merged(what: str, parts: Iterable[Tally]) -> Tally:
    """The sum of several tallies."""
    total = Tally(what)
    for part in parts:
        total.right += part.right
        total.refused += part.refused
        total.failed += part.failed
        total.failures += part.failures[: _KEPT - len(total.failures)]
    return total
