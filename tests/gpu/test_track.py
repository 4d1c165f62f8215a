"""The step of a monitor on the device: against the reference and the plain definition, over hostile streams."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emocore import ops
from emocore.reference_track import Tracked, track_ref
from emocore.tracking import Tracks
from emocore.watching import Rule, Watch

POISON = {torch.int64: -7, torch.int8: 1, torch.float32: torch.nan, torch.float64: torch.nan}
SHARED = ("forward", "whole", "alpha", "statistic", "level", "release", "raised", "taken", "window")
RULES: list[Rule] = [("a", 0, 0, 0.8, 0.1), ("b", 1, 1, 0.2, 0.2), ("c", 2, 2, 0.3, -0.1)]
ULP = 3e-7  # two roundings of a float32 of order 1, in another order


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def poisoned(k: int, device: torch.device, points: int = 1, window: int = 16, alpha: float = 1 / 8, **options) -> Watch:
    """A watch whose every table holds the worst that a forgotten sequence may leave, with a rule for each direction up
    to the third."""
    rules = {str(m): [rule for rule in RULES if rule[2] < k] for m in range(points)}
    watch = Watch(k, list(map(str, range(points))), rules, alpha, window, 4, device, **options)
    for name, table in watch.state._asdict().items():
        if isinstance(table, Tensor) and name not in SHARED:
            table.fill_(POISON[table.dtype])
    return watch


def laid_out(parts: Sequence[Tensor], holes: float, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
    """Scores [M, t, K] of several sequences among NaN rows: scores (a strided view), first, kept and marks, which leave
    out a fraction of the rows, different ones at every hook point."""
    points, _, k = parts[0].shape
    n = sum(part.shape[1] + 2 for part in parts) + 3
    wide = torch.full((points, n, k + 5), torch.nan)
    marks = (torch.rand(points, n, generator=torch.Generator().manual_seed(seed)) >= holes).to(torch.int8) * 2
    first, at = [], 1
    for part in reversed(parts):  # the sequences of a batch in any order
        first.insert(0, at)
        wide[:, at : at + part.shape[1], 2 : k + 2] = part
        at += part.shape[1] + 2
    wide[marks == 0] = torch.nan
    kept = [part.shape[1] for part in parts]
    counts = [torch.tensor(count, dtype=torch.int32, device=device) for count in (first, kept)]
    return wide.to(device)[:, :, 2 : k + 2], *counts, marks.to(device)


def advance(watch: Watch, parts: Sequence[Tensor], slots: Sequence[int], serials: Sequence[int], holes: float = 0.0):
    given = laid_out(parts, holes, watch.device, seed=sum(part.shape[1] for part in parts))
    at = torch.tensor(slots, dtype=torch.int32, device=watch.device)
    watch.step(*given, at, torch.tensor(serials, device=watch.device))


def copied(state: Tracked) -> dict[str, Tensor]:
    return {name: table.clone() for name, table in state._asdict().items() if isinstance(table, Tensor)}


def recorded(state: Tracked) -> list[tuple[float, ...]]:
    n = min(int(state.raised), len(state.values))
    return sorted((*r, v) for r, v in zip(state.records[:n].tolist(), state.values[:n].tolist(), strict=True))


def check_same(found: Tracked, expected: Tracked, exact: bool = False) -> None:
    """Every table, poison included, and the records in any order."""
    for name, table in found._asdict().items():
        if not isinstance(table, Tensor) or name in ("records", "values"):
            continue
        near = 0.0 if exact or not table.is_floating_point() else ULP if table.dtype == torch.float32 else 1e-12
        if name in ("sums", "squares"):  # of statistics that were rounded
            near = 0.0 if exact else 40 * ULP
        other = getattr(expected, name).to(table.device)
        torch.testing.assert_close(
            table, other, rtol=near, atol=near, equal_nan=True, msg=lambda said, name=name: f"{name}: {said}"
        )
    for one, other in zip(recorded(found), recorded(expected), strict=True):
        assert one[:-1] == other[:-1]
        assert one[-1] == pytest.approx(other[-1], abs=0 if exact else ULP)


@pytest.mark.parametrize(
    ("k", "window", "alpha", "cuts", "options"),
    [
        (3, 16, 1 / 8, [[1, 20], [0, 1], [15, 3], [2, 0]], {}),
        (3, 1, 1.0, [[5, 1], [1, 1]], {}),
        (1, 2, 0.001, [[3, 1], [1, 0], [1, 9]], {}),
        (3, 4, 0.5, [[3, 4], [5, 2]], {"sums": False}),
        (65, 5, 1 / 8, [[2, 7], [6, 1]], {}),
        (171, 3, 0.3, [[1, 1], [4, 0]], {}),
    ],
)
def test_equals_the_reference(k: int, window: int, alpha: float, cuts, options, device: torch.device) -> None:
    found = poisoned(k, device, 2, window, alpha, **options)
    expected = poisoned(k, torch.device("cpu"), 2, window, alpha, **options)
    streams = [randn(2, sum(sizes), k, seed=i) for i, sizes in enumerate(zip(*cuts, strict=True))]
    pieces = [z.split(list(sizes), 1) for z, sizes in zip(streams, zip(*cuts, strict=True), strict=True)]
    for step in range(len(cuts)):
        parts = [piece[step] for piece in pieces]
        advance(found, parts, [3, 1], [5, 9], holes=0.25)
        with ops.use("reference"):
            advance(expected, parts, [3, 1], [5, 9], holes=0.25)
    assert int(found.state.raised) > (k < 171)  # something rose, and not only at the first hook point
    check_same(found.state, expected.state)


@pytest.mark.parametrize("window", [1, 2, 16, 100])
def test_the_bits_do_not_depend_on_the_cuts(window: int, device: torch.device) -> None:
    z = randn(1, 200, 3)
    expected = Tracks(3, 1, 1 / 8, window, 0, 1)
    values = expected.step(torch.tensor([expected.slot("r")]), z.double(), torch.tensor([200]))
    watches = []
    for cuts in ([200], [63, 1, 64, 65, 7]):
        watch = poisoned(3, device, window=window)
        for part in z.split(cuts, 1):
            advance(watch, [part], [2], [1])
        watches.append(watch)
    whole, cut = (watch.state for watch in watches)
    for state in (whole, cut):
        state.records[:, 0] = 1  # the forward
        state.forward.zero_()
    check_same(cut, whole, exact=True)
    torch.testing.assert_close(whole.ema[0, 2].cpu(), expected.ema[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(whole.largest[:, 0, 2].cpu().double(), expected.largest[:, 0], rtol=0, atol=ULP)
    torch.testing.assert_close(whole.sums[:, 0, 2].cpu(), values[:, 0].sum(1), rtol=0, atol=200 * ULP)


def test_it_does_not_drift(device: torch.device) -> None:
    """A million tokens on a GPU. In float32 this EMA would be off by 5e-5, and the window's sum by 8e-4."""
    n = 1_000_000 if device.type == "cuda" else 300
    z, watch = randn(1, n, 1) + 3, poisoned(1, device, alpha=0.001, record_capacity=1)
    advance(watch, [z], [1], [1])
    expected = Tracks(1, 1, 0.001, 16, 0, 1)
    values = expected.step(torch.tensor([expected.slot("r")]), z.double(), torch.tensor([n]))
    torch.testing.assert_close(watch.state.ema[0, 1].cpu(), expected.ema[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(watch.state.rest[0, 1].cpu(), z[0, -15:].double().sum(0), rtol=1e-11, atol=0)
    torch.testing.assert_close(watch.state.sums[:, 0, 1].cpu(), values[:, 0].sum(1), rtol=1e-7, atol=0)


def test_nothing_else_is_touched(device: torch.device) -> None:
    """Slot 0, slots that there are not, and a forward that does not count: not a bit changes."""
    watch = poisoned(3, device, 2)
    parts = [randn(2, 3, 3, seed=i) for i in range(4)]
    before = copied(watch.state)
    advance(watch, parts, [0, -1, 4, 1 << 30], [1, 2, 3, 4])
    watch.state.whole.zero_()
    advance(watch, parts, [1, 2, 3, 0], [1, 2, 3, 4])
    before["forward"] += 2
    before["whole"].zero_()
    for name, table in copied(watch.state).items():
        assert torch.equal(table.nan_to_num(-9.0), before[name].nan_to_num(-9.0)), name


def test_no_rows_change_nothing_but_a_new_sequence_begins(device: torch.device) -> None:
    watch, empty = poisoned(3, device), torch.zeros(1, 0, 3)
    advance(watch, [randn(1, 9, 3)], [2], [1])
    before = copied(watch.state)
    advance(watch, [empty], [2], [1])
    before["forward"] += 1
    for name, table in copied(watch.state).items():
        assert torch.equal(table.nan_to_num(-9.0), before[name].nan_to_num(-9.0)), name
    advance(watch, [empty], [2], [8])
    state = watch.state
    assert state.serials[0, 2].tolist() == [8]
    for table in (state.tokens, state.ema, state.rest, state.active):
        assert not table[:, 2].any()
    assert (state.largest[:, :, 2] == -torch.inf).all()


def test_rows_left_out_are_as_if_they_were_not_there(device: torch.device) -> None:
    z = randn(1, 40, 3)
    there = torch.rand(40, generator=torch.Generator().manual_seed(1)) > 0.5
    there[:4] = there[20:30] = False
    there[10:14] = True
    holed, packed = poisoned(3, device, window=4), poisoned(3, device, window=4)
    one, slots, serial = torch.ones(1, dtype=torch.int32, device=device), [2], [3]
    scores = z.masked_fill(~there[:, None], torch.nan).to(device)
    marks = there.to(torch.int8)[None].to(device)
    holed.step(scores, one * 0, one * 40, marks, one * 2, torch.tensor(serial, device=device))
    advance(packed, [z[:, there]], slots, serial)
    check_same(holed.state, packed.state, exact=True)


def test_alarms_by_hand(device: torch.device) -> None:
    watch = poisoned(1, device, alpha=0.5, window=2)
    watch.state.level.fill_(4.0)
    watch.state.release.fill_(2.0)
    scores = torch.tensor([4.0, 5.0, 3.0, 6.0, 2.0, 7.0, 1.0, 4.5])[None, :, None]  # ends below the release, not at it
    advance(watch, [scores[:, :3]], [1], [11])
    advance(watch, [scores[:, 3:]], [1], [11])
    assert recorded(watch.state) == [(1, 0, 11, 1, 0, 5.0), (2, 0, 11, 7, 0, 4.5)]
    assert watch.state.active[0, 1].tolist() == [1]


@pytest.mark.parametrize(("statistic", "position", "value"), [(0, 3, 8.0), (2, 5, 6.0), (1, 6, 8 * (1 - 0.75**4))])
def test_each_statistic_rises_in_its_own_time(statistic: int, position: int, value: float, device) -> None:
    # the mean of 4 is above 4 with the third 8, an EMA of 1/4 above 5 when .75^m < 3/8, m = 4
    watch = poisoned(1, device, alpha=0.25, window=4)
    watch.state.statistic.fill_(statistic)
    watch.state.level.fill_(5.0 if statistic == 1 else 4.0)
    advance(watch, [torch.tensor([0.0] * 3 + [8.0] * 5)[None, :, None]], [1], [1])
    assert recorded(watch.state) == [(1, 0, 1, position, 0, value)]


def test_records_past_the_capacity_are_counted_and_not_written(device: torch.device) -> None:
    watch = poisoned(1, device, record_capacity=8)
    state = watch.state._replace(records=watch.state.records[:3], values=watch.state.values[:3])
    state.release.fill_(0.8)
    alternating = torch.tensor([1.0, 0.0] * 5)[None, :, None].to(device)
    one = torch.ones(1, dtype=torch.int32, device=device)
    marks = torch.ones(1, 10, dtype=torch.int8, device=device)
    ops.step("track", device)(alternating, one * 0, one * 10, marks, one, one.long(), state)
    assert int(state.raised) == 5
    assert sorted(r[3] for r in state.records.tolist()) == [0, 2, 4]
    assert (watch.state.records[3:] == POISON[torch.int64]).all()
    assert watch.state.values[3:].isnan().all()


def test_many_programs_lose_no_alarm(device: torch.device) -> None:
    watch = poisoned(130, device, points=3, record_capacity=5000)
    watch.state.level.fill_(-9.0)
    watch.state.statistic.zero_()
    z = [randn(3, 1, 130, seed=i) for i in range(3)]
    advance(watch, z, [1, 2, 3], [1, 2, 3])
    expected = [(1, m, i + 1, 0, k, float(z[i][m, 0, k])) for m in range(3) for i in range(3) for k in range(130)]
    assert recorded(watch.state) == expected


def test_the_reference_serves_where_there_is_no_kernel() -> None:
    with ops.use("reference"):
        assert ops.step("track", torch.device("cuda")) is track_ref


COMPILED = """
import dataclasses
from emocore import aot
for variant in aot.variants("track"):
    for arch in aot.ARCHITECTURES:
        built = aot.build(variant, arch)
        assert built.spilled == 0 and built.shared == 0 and built.registers <= 128, built
        assert "shfl" not in built.ptx  # a lane is a thread: nothing crosses
    if None in variant.constants.values():
        continue
    # strides as narrow as they come: every product of an offset is still 64 bits wide
    narrow = {name: "i32" if kind == "i64" else kind for name, kind in variant.types.items()}
    narrowed = aot.build(dataclasses.replace(variant, types=narrow), 90)
    assert "mul.lo.s32" not in narrowed.ptx and "mad.lo.s32" not in narrowed.ptx, narrowed.name
"""


def test_it_compiles_without_spills_and_with_wide_offsets(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
