"""The ledger: every position that was offered is accounted for, and so is every row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import LedgerError


@dataclass
class _Counts:
    """Exact integer counts that add up."""

    def add(self, **counts: int) -> None:
        """Add to the named counts."""
        for name, n in counts.items():
            setattr(self, name, getattr(self, name) + int(n))

    def as_dict(self) -> dict[str, int]:
        """Counts by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass
class TokenCounts(_Counts):
    """offered == selected + masked + skipped + reseen + nonfinite + recomputed + rolled_back + orphan."""

    offered: int = 0
    selected: int = 0
    masked: int = 0
    skipped: int = 0
    reseen: int = 0
    nonfinite: int = 0
    recomputed: int = 0
    rolled_back: int = 0
    orphan: int = 0


@dataclass
class RowCounts(_Counts):
    """formed == accumulated + nonfinite + overrange + bad_label + too_short + dropped + sampled_out + pending."""

    formed: int = 0
    accumulated: int = 0
    nonfinite: int = 0
    overrange: int = 0
    bad_label: int = 0
    too_short: int = 0
    dropped: int = 0
    sampled_out: int = 0
    pending: int = 0

    @property
    def missing(self) -> int:
        """Rows that are formed and not accounted for yet."""
        return 2 * self.formed - sum(self.as_dict().values())


@dataclass
class FireCounts(_Counts):
    """expected == seen, over all committed forwards."""

    expected: int = 0
    seen: int = 0


@dataclass
class Ledger:
    """Token, row and fire counts of one hook point and sink; `check` raises LedgerError when they do not add up.

    `forwards` counts committed forwards and `unmasked` those among them that came without an attention mask.

    >>> ledger = Ledger()
    >>> ledger.tokens.add(offered=5, selected=4)
    >>> ledger.check()
    Traceback (most recent call last):
    emocore.errors.LedgerError: tokens: counts do not add up; expected offered == 4; got offered 5, selected 4. ...
    """

    tokens: TokenCounts = field(default_factory=TokenCounts)
    rows: RowCounts = field(default_factory=RowCounts)
    fires: FireCounts = field(default_factory=FireCounts)
    forwards: int = 0
    unmasked: int = 0

    def check(self, where: str = "") -> None:
        """Raise LedgerError unless tokens, rows and fires all add up."""
        at = f"{where}: " if where else ""
        for name, counts, total in (("tokens", self.tokens, "offered"), ("rows", self.rows, "formed")):
            values = counts.as_dict()
            whole = values.pop(total)
            if whole != sum(values.values()):
                shown = ", ".join(f"{k} {v}" for k, v in {total: whole, **values}.items() if v)
                raise LedgerError(
                    f"{at}{name}: counts do not add up",
                    expected=f"{total} == {sum(values.values())}",
                    got=shown,
                    way_out="Rows were lost or counted twice: do not trust this result.",
                )
        if self.fires.expected != self.fires.seen:
            raise LedgerError(
                f"{at}fires: the module did not run as often as declared",
                expected=self.fires.expected,
                got=self.fires.seen,
                way_out="Give optional=True for a module that a forward may skip.",
            )

    def merge(self, other: Ledger) -> None:
        """Add the counts of `other`."""
        for mine, theirs in ((self.tokens, other.tokens), (self.rows, other.rows), (self.fires, other.fires)):
            mine.add(**theirs.as_dict())
        self.forwards += other.forwards
        self.unmasked += other.unmasked

    def subtract(self, other: Ledger) -> None:
        """Take away the counts of `other`, a part merged before."""
        for mine, theirs in ((self.tokens, other.tokens), (self.rows, other.rows), (self.fires, other.fires)):
            mine.add(**{name: -n for name, n in theirs.as_dict().items()})
        self.forwards -= other.forwards
        self.unmasked -= other.unmasked

    def as_dict(self) -> dict[str, Any]:
        """All counts, JSON-ready."""
        return {
            "tokens": self.tokens.as_dict(),
            "rows": self.rows.as_dict(),
            "fires": self.fires.as_dict(),
            "forwards": self.forwards,
            "unmasked": self.unmasked,
        }

    @classmethod
    def from_dict(cls, counts: Mapping[str, Any]) -> Ledger:
        """Inverse of `as_dict`."""
        return cls(
            TokenCounts(**counts["tokens"]),
            RowCounts(**counts["rows"]),
            FireCounts(**counts["fires"]),
            counts["forwards"],
            counts["unmasked"],
        )

    def __str__(self) -> str:
        def line(name: str, counts: _Counts) -> str:
            shown = {k: v for i, (k, v) in enumerate(counts.as_dict().items()) if v or i < 2}
            return f"{name:<7}" + "  ".join(f"{k} {v:,}" for k, v in shown.items())

        return "\n".join(line(*pair) for pair in (("tokens", self.tokens), ("rows", self.rows), ("fires", self.fires)))
