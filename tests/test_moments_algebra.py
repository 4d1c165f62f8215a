"""Update, merge, subtract, reset, relabel, save and load in any order, against exact fractions."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from emocore.errors import PrecisionWarning
from emocore.moments import Moments

LABELS = ("at ease", "self-critical", "sad")
D = 2

# Dyadic values, so that rows are exact in every dtype and a fraction says what they are.
VALUES = (0.0, 0.125, -1.0, 2.5, -7.75, 64.0, 3000.0, -(2.0**-10))


def decode(n: int) -> tuple[tuple[float, float], str | None, int]:
    """A row, its label and its weight, from one number: drawing is what these programs cost."""
    x, y, label, weight = (n >> shift & mask for shift, mask in ((0, 7), (3, 7), (6, 3), (8, 3)))
    return (VALUES[x], VALUES[y]), (*LABELS, None)[label], weight


batches = st.lists(st.integers(0, 1023), max_size=6).map(lambda ns: [decode(n) for n in ns])


@dataclass
class Exact:
    """What the rows seen so far add up to, in fractions, by label (None: all)."""

    count: dict[str | None, int] = field(default_factory=dict)
    weight: dict[str | None, int] = field(default_factory=dict)
    total: dict[str | None, list[Fraction]] = field(default_factory=dict)
    second: dict[str | None, list[Fraction]] = field(default_factory=dict)  # xx, xy, yy

    def add(self, row: tuple[float, ...], key: str | None, weight: int, times: int = 1) -> None:
        x, y = map(Fraction, row)
        w = weight * times
        self.count[key] = self.count.get(key, 0) + times
        self.weight[key] = self.weight.get(key, 0) + w
        for sums, new in ((self.total, (x, y)), (self.second, (x * x, x * y, y * y))):
            sums[key] = [a + w * b for a, b in zip(sums.get(key, [Fraction(0)] * len(new)), new, strict=True)]

    def take(self, batch: list, times: int = 1) -> None:
        for row, label, weight in batch:
            for key in {None, label}:
                self.add(row, key, weight, times)

    def mean(self, key: str | None) -> list[float]:
        return [float(t / self.weight[key]) for t in self.total[key]]

    def scatter(self, key: str | None) -> list[float]:
        (x, y), w = self.total[key], self.weight[key]
        xx, xy, yy = self.second[key]
        return [float(xx - x * x / w), float(xy - x * y / w), float(yy - y * y / w)]


def moments_of(batch: list) -> Moments:
    m = Moments(LABELS, covariance=True, dim=D)
    feed(m, batch)
    return m


def feed(m: Moments, batch: list) -> None:
    x = torch.tensor([row for row, _, _ in batch], dtype=torch.float64).reshape(-1, D)
    m.update(x, [label for _, label, _ in batch], [weight for _, _, weight in batch])


class Algebra(RuleBasedStateMachine):
    """One Moments lives through a program; `parts` are those merged in, any of which may be taken away again."""

    def __init__(self) -> None:
        super().__init__()
        self.m = Moments(LABELS, covariance=True)
        self.exact = Exact()
        self.parts: list[tuple[Moments, list]] = []

    @rule(batch=batches)
    def update(self, batch: list) -> None:
        feed(self.m, batch)
        self.exact.take(batch)

    @rule(batch=batches, mine_first=st.booleans())
    def merge(self, batch: list, mine_first: bool) -> None:
        part = moments_of(batch)
        if mine_first:
            self.m.merge(part)
        else:
            both = part.copy()
            both.merge(self.m)
            self.m = both
        self.exact.take(batch)
        self.parts.append((part, batch))

    @rule(a=batches, b=batches)
    def merge_of_a_merge(self, a: list, b: list) -> None:
        part = moments_of(a)
        part.merge(moments_of(b))
        self.m.merge(part)
        self.exact.take(a + b)
        self.parts.append((part, a + b))

    @precondition(lambda self: self.parts)
    @rule(which=st.integers(0, 7))
    def subtract(self, which: int) -> None:
        part, batch = self.parts.pop(which % len(self.parts))
        self.m.subtract(part)
        self.exact.take(batch, -1)

    @rule()
    def add_and_take_away_itself(self) -> None:
        same = self.m.copy()
        self.m.merge(same)
        self.m.subtract(same)

    @rule()
    def merge_with_nothing(self) -> None:
        empty = Moments(LABELS, covariance=True)
        self.m.merge(empty)
        self.m.subtract(empty)
        empty.merge(self.m)
        self.m = empty

    @rule()
    def reset(self) -> None:
        self.m.reset()
        self.exact, self.parts = Exact(), []

    @rule()
    def save_and_load(self) -> None:
        resumed = Moments()
        resumed.load_state_dict(self.m.state_dict())
        self.m = resumed

    @rule()
    def read(self) -> None:
        self.check()

    @rule()
    def relabel(self) -> None:
        """To two labels, read, and forgotten again."""
        coarse = self.m.relabel({"at ease": "fine", "self-critical": "low", "sad": "low"})
        count = self.exact.count
        assert coarse.label_count.tolist() == [
            count.get("at ease", 0),
            count.get("self-critical", 0) + count.get("sad", 0),
        ]
        assert coarse.count == self.m.count

    def teardown(self) -> None:
        self.check()

    def check(self) -> None:
        """Counts to the last row; sums to rounding at the size of the squares, a few hundred times 9e6."""
        exact, m = self.exact, self.m
        m.ledger.check()
        assert m.count == m.ledger.rows.accumulated == exact.count.get(None, 0)
        assert m.label_count.tolist() == [exact.count.get(k, 0) for k in LABELS]
        assert m.weight == exact.weight.get(None, 0)
        if not m.weight:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PrecisionWarning)  # rows of 3000 taken away leave a shift that is off
            s, label_variance = m.total_scatter(), m.label_variance
        close(m.mean.tolist(), exact.mean(None), 1e-10)
        close([s[0, 0], s[0, 1], s[1, 1]], exact.scatter(None), 1e-6)
        for k, label in enumerate(LABELS):
            if exact.weight.get(label, 0):
                close(m.label_mean[k].tolist(), exact.mean(label), 1e-10)
                diagonal = label_variance[k] * max(exact.weight[label] - 1, 0)
                wanted = exact.scatter(label) if exact.weight[label] > 1 else [0, 0, 0]
                close(diagonal.tolist(), [wanted[0], wanted[2]], 1e-6)


def close(found: list[float], wanted: list[float], tolerance: float) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert abs(a - b) <= tolerance


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two columns are too few to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


TestAlgebra = Algebra.TestCase
TestAlgebra.settings = settings(
    max_examples=2000,
    stateful_step_count=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
