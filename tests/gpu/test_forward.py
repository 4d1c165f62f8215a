"""The steps of a forward: kernels against their reference, on layouts of every kind."""

import dataclasses

import pytest
import torch

from emocore import control, ops
from emocore.control import Fault, Header, Place, Source, Station, Tally
from emocore.kernels import _control as words
from emocore.plans import Plan, Plans
from emocore.tokens import Tokens

RULES = [Tokens(), Tokens(skip=2), Tokens(span="said")]
STATIONS = [0, 1, 2, 1]  # the rule of each of four hook points
OUTPUTS = ("rank", "sequence", "dest", "kept", "first", "seen", "shown", "tally", "header", "stations")
EOS, PAD = 1, 0


def twin(device: torch.device, rules: list[Tokens] = RULES, optional: bool = False) -> tuple[Plans, Plans]:
    """Two memories alike: one for the kernels, one for the reference."""
    made = [
        Plans(rules, [r % len(rules) for r in STATIONS], optional, frozenset({EOS}), frozenset({PAD}), device)
        for _ in range(2)
    ]
    return made[0], made[1]


def agree(mine: Plan, other: Plan) -> None:
    for name in OUTPUTS:
        assert torch.equal(getattr(mine, name), getattr(other, name)), name


def begin_both(plans: tuple[Plans, Plans], shape: tuple[int, int], kind: str, **given) -> tuple[Plan, Plan]:
    found = []
    for memory, implementation in zip(plans, ("triton", "reference"), strict=True):
        plan = memory.fit(*shape, kind)
        for name in ("rank", "sequence", "dest", "kept", "first", "shown", "tally"):
            getattr(plan, name).fill_(-77)
        if implementation == "triton":
            plan.tally.copy_(torch.full_like(plan.tally, -77))
        with ops.use(implementation):
            args = {"mask": None, "shown": None, "past": 0, "written": -1} | given
            ops.step("begin", plan.rank.device)(plan, args["mask"], args["shown"], args["past"], args["written"])
        found.append(plan)
    return found[0], found[1]


def spans(b: int) -> list[dict[str, list[tuple[int, int]]]]:
    return [{"said": [(i, i + 2), (5, 9)]} if i % 3 else {} for i in range(b)]


def test_words_are_those_of_control() -> None:
    assert words.WIDTH.value == control.WIDTH
    assert words.TALLIES.value == len(Tally)
    assert words.PLACE_WIDTH.value == control.PLACE_WIDTH
    for name, word in [
        ("OPEN", Header.OPEN),
        ("FORWARDS", Header.FORWARDS),
        ("ERRORS", Header.ERRORS),
        ("GOES_ON", Header.GOES_ON),
        ("UNMASKED", Header.UNMASKED),
        ("LABELS", Header.LABELS),
        ("BATCH", Header.BATCH),
        ("COMMITTED", Station.FORWARDS),
        ("COMMITTED_UNMASKED", Station.UNMASKED),
        *((s.name, s) for s in Station if s.name not in ("FORWARDS", "UNMASKED")),
        *((f"TALLY_{t.name}", t) for t in Tally),
        *((f"FAULT_{f.name}", f) for f in Fault),
        *((f"PLACE_{p.name}", p) for p in Place),
        ("SOURCE_NONE", Source.NONE),
        ("SOURCE_SEQUENCE", Source.SEQUENCE),
    ]:
        assert getattr(words, name).value == word, name


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 1030), (33, 3)])
@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_masked(device, shape, past, dtype) -> None:
    b, t = shape
    g = torch.Generator().manual_seed(b)
    mask = (torch.rand(b, past + t, generator=g) > 0.3).to(dtype).to(device)
    plans = twin(device)
    for memory in plans:
        memory.set_spans(spans(b))
    agree(*begin_both(plans, shape, "padded", mask=mask))


def test_literal_left_padding(device) -> None:
    plans = twin(device, [Tokens(skip=1)])
    plan, _ = begin_both(plans, (2, 4), "padded", mask=torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]], device=device))
    assert plan.rank.tolist() == [-1, -1, 0, 1, 0, 1, 2, 2]
    assert plan.dest[0].tolist() == [-1, -1, -1, 0, -1, 1, 2, -1]
    assert plan.kept[0].tolist() == [1, 2]
    assert plan.first[0].tolist() == [0, 1]
    assert plan.shown.tolist() == [2, 3]
    assert plan.tally[0].tolist() == [8, 3, 3, 2, 0]  # offered, kept, masked, skipped, reseen


@pytest.mark.parametrize("past", [0, 3, "device"])
def test_without_a_mask_all_count_from_the_past_on(device, past) -> None:
    plans = twin(device)
    for memory in plans:
        memory.set_spans(spans(3))
    before = torch.tensor([3], device=device) if past == "device" else past
    mine, other = begin_both(plans, (3, 4), "padded", past=before)
    agree(mine, other)
    assert mine.rank[:4].tolist() == [(3 if past else 0) + i for i in range(4)]
    assert mine.header[Header.UNMASKED] == 1


def test_tokens_shown_before_are_reseen_while_the_batch_goes_on(device) -> None:
    for goes_on in (0, 1):
        plans = twin(device, [Tokens()])
        for memory in plans:
            memory.fit(2, 4, "padded").seen.copy_(torch.tensor([3, 1]))
            memory.header[Header.GOES_ON] = goes_on
        mine, other = begin_both(plans, (2, 4), "padded")
        agree(mine, other)
        assert mine.tally[0].tolist() == ([8, 4, 0, 0, 4] if goes_on else [8, 8, 0, 0, 0])


def test_stop_tokens_that_the_model_goes_on_writing_are_padding(device) -> None:
    shown = torch.tensor([[5, EOS, EOS], [EOS, 6, 7]], device=device)
    for written, kept in ((-1, 6), (0, 3), (2, 5)):
        mine, other = begin_both(twin(device, [Tokens()]), (2, 3), "padded", shown=shown, written=written)
        agree(mine, other)
        assert mine.tally[0, Tally.KEPT] == kept


def test_padding_ids_without_a_mask_are_a_fault(device) -> None:
    shown = torch.tensor([[5, PAD, 4]], device=device)
    mine, other = begin_both(twin(device, [Tokens()]), (1, 3), "padded", shown=shown)
    agree(mine, other)
    assert mine.header[Header.ERRORS] == Fault.PADDING
    mask = torch.tensor([[1, 0, 1]], device=device)
    mine, _ = begin_both(twin(device, [Tokens()]), (1, 3), "padded", shown=shown, mask=mask)
    assert mine.header[Header.ERRORS] == 0


@pytest.mark.parametrize("bounds", [[0, 4, 4, 9], [0, 1100], [0, 0], [0, 3]])
def test_packed(device, bounds: list[int]) -> None:
    plans = twin(device, [Tokens(), Tokens(skip=2)])
    n = bounds[-1] + 3  # three positions of padding behind the last sequence
    for memory in plans:
        memory.fit(len(bounds) - 1, n, "packed")
        memory.set_bounds(torch.tensor(bounds))
    mine, other = begin_both(plans, (len(bounds) - 1, n), "packed")
    # the reference gives a place to padding behind the last sequence, which is never kept
    assert torch.equal(mine.dest, other.dest)
    assert torch.equal(mine.rank[: bounds[-1]], other.rank[: bounds[-1]])
    for name in ("kept", "first", "shown", "tally", "header"):
        assert torch.equal(getattr(mine, name), getattr(other, name)), name


def test_plain_rows_have_no_rank(device) -> None:
    mine, other = begin_both(twin(device, [Tokens()]), (5, 5), "plain")
    agree(mine, other)
    assert mine.dest[0].tolist() == [0, 1, 2, 3, 4]


def test_a_forward_left_open_is_rolled_back(device) -> None:
    plans = twin(device, [Tokens(), Tokens(skip=1)])
    begin_both(plans, (2, 3), "padded")
    for memory in plans:
        memory.stations[:2, Station.FIRES] = 1
        memory.stations[0, Station.BAD] = 2
    for memory in plans:  # the old tally must still be there when the next forward begins
        memory.tally.copy_(torch.tensor([[6, 6, 0, 0, 0], [6, 4, 0, 2, 0]]))
    for memory, name in zip(plans, ("triton", "reference"), strict=True):
        plan = memory.fit(1, 5, "padded")
        with ops.use(name):
            ops.step("begin", device)(plan, None, None, 0, -1)
        assert plan.stations[:, Station.ROLLED_BACK].tolist() == [6, 6, 0, 0]
        assert plan.stations[:, Station.OFFERED].tolist() == [6, 6, 0, 0]
        assert not plan.stations[:, : Station.MISSED].any()
        assert plan.tally[0, Tally.OFFERED] == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [1, 3, 17, 65, 384, 8200])
def test_stage_rows(device, dim: int, dtype) -> None:
    n, capacity = 33, 64
    g = torch.Generator().manual_seed(dim)
    x = torch.randn(n, dim + 3, generator=g).to(dtype).to(device)[:, 1 : dim + 1]
    x[3, dim - 1], x[7, 0], x[8, 0] = torch.nan, torch.inf, -torch.inf
    dest = torch.full((n,), -1, dtype=torch.int32, device=device)
    kept = torch.tensor([0, 3, 5, 7, 8, 20, 32])
    dest[kept] = torch.arange(len(kept), dtype=torch.int32, device=device)
    rank = torch.arange(n, dtype=torch.int32, device=device)
    found = []
    for name in ("triton", "reference"):
        rings = (
            torch.full((capacity, dim), 9.0, dtype=dtype, device=device),
            torch.full((capacity,), 9, dtype=torch.int8, device=device),
            torch.full((capacity,), 9.0, device=device),
        )
        cursor, station = (
            torch.tensor([capacity - 3, 0], device=device),
            torch.zeros(16, dtype=torch.int64, device=device),
        )
        with ops.use(name):
            ops.step("stage_rows", device)(x, dest, rank, True, cursor, station, *rings)
        found.append((*rings, station))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=0)
    rows, marks, _, station = found[0]
    # the ring wraps after three rows; the fourth kept row holds an infinity
    assert torch.equal(rows[capacity - 3], x[0]), "bitwise"
    assert torch.equal(rows[0], torch.zeros(dim, dtype=dtype, device=device))
    assert marks[[capacity - 3, capacity - 2, capacity - 1, 0, 1, 2, 3, 4]].tolist() == [1, 0, 2, 0, 0, 2, 2, 9]
    assert (rows[4] == 9).all()
    assert station[Station.FIRES] == 1
    assert station[Station.BAD] == 3


def test_squares_do_not_overflow(device) -> None:
    x = torch.tensor([[3e38, 0.0], [1e-30, 0.0]], device=device)
    rings = (
        torch.zeros(4, 2, device=device),
        torch.zeros(4, dtype=torch.int8, device=device),
        torch.zeros(4, device=device),
    )
    zero = torch.zeros(2, dtype=torch.int32, device=device)
    dest = torch.tensor([0, 1], dtype=torch.int32, device=device)
    control = torch.zeros(2, 16, dtype=torch.int64, device=device)
    ops.step("stage_rows", device)(x, dest, zero, False, control[0], control[1], *rings)
    torch.testing.assert_close(rings[2][:2], torch.tensor([3e38, 1e-30], device=device))
    assert rings[1].tolist() == [2, 2, 0, 0]


@pytest.mark.parametrize("source", list(Source))
def test_place_labels(device, source: Source) -> None:
    dest = torch.tensor([0, -1, 1, 2, -1, 3], dtype=torch.int32, device=device)
    sequence = torch.tensor([0, 0, 0, 1, 1, 1], dtype=torch.int32, device=device)
    given = torch.tensor([7, 8, 3, 4, 5, 6] if source == Source.POSITION else [7, 8], dtype=torch.int32, device=device)
    found = []
    for name in ("triton", "reference"):
        header = torch.zeros(16, dtype=torch.int64, device=device)
        header[Header.LABELS] = source
        labels = torch.full((5,), -9, dtype=torch.int32, device=device)
        cursor = torch.tensor([3, 0], device=device)
        with ops.use(name):
            ops.step("place_labels", device)(header, given, header[Header.LABELS], dest, sequence, cursor, labels)
        found.append((labels.tolist(), header.tolist()))
    assert found[0] == found[1]
    expected = {
        Source.NONE: [-1, -1, -9, -1, -1],
        Source.SEQUENCE: [8, 8, -9, 7, 7],
        Source.POSITION: [4, 6, -9, 7, 3],
    }
    assert found[0][0] == expected[source]
    assert found[0][1][Header.ERRORS] == (Fault.UNLABELLED if source == Source.NONE else 0)


@pytest.mark.parametrize("fetched", [1, 2])
@pytest.mark.parametrize("source", list(Source))
@pytest.mark.parametrize("labelled", [False, True])
def test_place_rows(device, source: Source, labelled: bool, fetched: int) -> None:
    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    dest, sequence, rank = ints(0, -1, 1, 2, -1, 3), ints(0, 0, 0, 1, 1, 1), ints(4, 5, 6, 0, 1, 2)
    given = ints(7, 8, 3, 4, 5, 6) if source == Source.POSITION else ints(7, 8)
    found = []
    for name in ("triton", "reference"):
        header = torch.zeros(16, dtype=torch.int64, device=device)
        header[Header.LABELS], header[Header.BATCH], header[Header.FORWARDS] = source, 6, 11
        places = torch.full((5, 8), -9, dtype=torch.int32, device=device)
        cursor = torch.tensor([3, fetched], device=device)
        with ops.use(name):
            args = (header, given, labelled, dest, rank, sequence, rank + 100, 2, cursor, places)
            ops.step("place_rows", device)(*args)
        found.append((places.tolist(), header.tolist()))
    assert found[0] == found[1]
    places, header = found[0]
    expected = {Source.NONE: [-1] * 4, Source.SEQUENCE: [7, 7, 8, 8], Source.POSITION: [7, 3, 4, 6]}
    labels = expected[source] if labelled else [-1] * 4
    at = [(0, 4), (0, 6), (1, 0), (1, 2)]  # the kept positions: sequence and rank
    for i, (b, r) in enumerate(at):  # from place 3 of 5 on
        assert places[(3 + i) % 5] == [6, 11, 2, b, r, 100 + r, labels[i], -9]
    assert places[2] == [-9] * 8
    faults = Fault.UNLABELLED if labelled and source == Source.NONE else 0
    # rows 3 to 6 in a ring of 5: row 1 has been fetched where it is overwritten, or not
    assert header[Header.ERRORS] == faults | (Fault.OVERRUN if fetched == 1 else 0)


@pytest.mark.parametrize("fires", [[1, 1, 1, 1], [1, 0, 1, 1], [1, 2, 1, 1]])
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("opened", [0, 1])
def test_commit(device, fires: list[int], optional: bool, opened: int) -> None:
    found = []
    for name, memory in zip(("triton", "reference"), twin(device, [Tokens(), Tokens(skip=1)], optional), strict=True):
        plan = memory.fit(3, 4, "padded")
        plan.tally.copy_(torch.tensor([[12, 10, 2, 0, 0], [12, 7, 2, 3, 0]]))
        plan.shown.copy_(torch.tensor([4, 3, 3]))
        plan.header[Header.OPEN], plan.header[Header.GOES_ON], plan.header[Header.UNMASKED] = opened, 1, 1
        plan.stations[:, Station.FIRES] = torch.tensor(fires, device=device)
        plan.stations[2, Station.BAD] = 4
        cursors = torch.tensor([[5, 1], [9, 2], [0, 0]], device=device)
        with ops.use(name):
            ops.step("commit", device)(plan, torch.tensor([0, 1], device=device), cursors)
        found.append([plan.header, plan.stations, plan.seen, cursors])
    for mine, other in zip(*found, strict=True):
        assert torch.equal(mine, other)
    header, stations, seen, cursors = found[0]
    whole = opened and (fires[1] == 1 or (optional and fires[1] == 0))
    assert header[Header.FORWARDS] == whole
    assert cursors[:, 0].tolist() == ([15, 9 + 7 * fires[1], 0] if whole else [5, 9, 0])
    assert seen.tolist() == ([4, 3, 3] if whole else [0, 0, 0])
    assert stations[2, Station.NONFINITE] == (4 if whole else 0)
    assert stations[2, Station.SELECTED] == (6 if whole else 0)
    assert bool(header[Header.ERRORS] & Fault.MISSED) == (fires[1] == 2 or (fires[1] == 0 and not optional))
    tokens = stations[:, Station.OFFERED : Station.ROLLED_BACK + 1]
    assert torch.equal(tokens[:, 0], tokens[:, 1:].sum(1)), "the ledger adds up"


def test_plans_are_views_of_memory_that_stays(device) -> None:
    plans, _ = twin(device)
    small, large = plans.fit(2, 3, "padded"), plans.fit(2, 2, "padded")
    assert small.rank.data_ptr() == large.rank.data_ptr()
    assert plans.fit(2, 3, "padded") is small
    assert {f.name for f in dataclasses.fields(Plan)} >= set(OUTPUTS)
