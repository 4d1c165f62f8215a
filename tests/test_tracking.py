"""Tracking: closed forms against the plain loop, and slots that are forgotten, reused and grown."""

import pytest
import torch
from torch import Tensor

from emocore.tracking import CHUNK, Tracks

K = 3
ROUNDING = 1e-12  # a few hundred float64 sums of order 1


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(z: Tensor, alpha: float = 1 / 8, window: int = 16) -> Tensor:
    """Every statistic of one sequence z [n, K] by its definition, token by token."""
    ema, out = torch.zeros(z.shape[1], dtype=torch.float64), []
    for t in range(len(z)):
        ema = (1 - alpha) * ema + alpha * z[t]
        out.append(torch.stack([z[t], ema, z[max(0, t - window + 1) : t + 1].mean(0)]))
    return torch.stack(out, 1)


def advance(tracks: Tracks, parts: dict[str, Tensor]) -> Tensor:
    """One step over the next scores of several sequences."""
    at = torch.tensor([tracks.slot(name) for name in parts])
    n = torch.tensor([len(z) for z in parts.values()])
    padded = torch.zeros(len(parts), int(n.max()), K, dtype=torch.float64)
    for i, z in enumerate(parts.values()):
        padded[i, : len(z)] = z
    return tracks.step(at, padded, n)


def tracks_of(alpha: float = 1 / 8, window: int = 16, history: int = 0, limit: int = 100) -> Tracks:
    return Tracks(K, 1, alpha, window, history, limit)


@pytest.mark.parametrize("n", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
@pytest.mark.parametrize(("alpha", "window"), [(1 / 8, 16), (1.0, 1), (0.001, 2), (0.5, 1000)])
def test_closed_forms_are_the_plain_loop(n: int, alpha: float, window: int) -> None:
    z, tracks = randn(n, K), tracks_of(alpha, window)
    expected = plain(z, alpha, window)
    torch.testing.assert_close(advance(tracks, {"r": z})[:, 0], expected, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(tracks.ema[0], expected[1, -1], rtol=0, atol=ROUNDING)
    torch.testing.assert_close(tracks.largest[:, 0], expected.amax(1), rtol=0, atol=ROUNDING)
    assert tracks.tokens[0] == n


@pytest.mark.parametrize("window", [1, 2, 16, 100])
def test_unequal_sequences_advance_together_as_alone(window: int) -> None:
    streams = {name: randn(n, K, seed=n) for name, n in (("a", 200), ("b", 70), ("c", 64), ("d", 2))}
    steps = {"a": [1, 3, 150, 46], "b": [0, 65, 1, 4], "c": [60, 1, 1, 2], "d": [0, 1, 0, 1]}
    tracks, found = tracks_of(window=window), {name: [] for name in streams}
    rest = {name: iter(z.split(steps[name])) for name, z in streams.items()}
    for _ in range(4):
        parts = {name: z for name, cut in rest.items() if len(z := next(cut))}
        values = advance(tracks, parts)
        for i, (name, z) in enumerate(parts.items()):
            found[name].append(values[:, i, : len(z)])
            assert values[:, i, len(z) :].isnan().all()
    for name, z in streams.items():
        expected, slot = plain(z, window=window), tracks.slots[name]
        torch.testing.assert_close(torch.cat(found[name], 1), expected, rtol=0, atol=ROUNDING)
        torch.testing.assert_close(tracks.ema[slot], expected[1, -1], rtol=0, atol=ROUNDING)
        torch.testing.assert_close(tracks.largest[:, slot], expected.amax(1), rtol=0, atol=ROUNDING)


def test_a_reused_slot_starts_from_nothing() -> None:
    tracks = tracks_of(history=9, limit=1)
    advance(tracks, {"a": 100 * randn(30, K)})
    tracks.active[0] = True
    z = randn(5, K, seed=1)
    torch.testing.assert_close(advance(tracks, {"b": z})[:, 0], plain(z), rtol=0, atol=ROUNDING)
    assert list(tracks.slots) == ["b"]
    assert not tracks.active.any()
    assert tracks.evicted == 1
    assert tracks.trace("a") is None
    torch.testing.assert_close(tracks.trace("b"), plain(z), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(tracks.largest[:, 0], plain(z).amax(1), rtol=0, atol=ROUNDING)


def test_growing_keeps_what_is_there_and_stops_at_the_limit() -> None:
    tracks = tracks_of(limit=70)
    for i in range(70):
        advance(tracks, {str(i): torch.full((1, K), float(i))})
    assert tracks.ema[:, 0].tolist() == [i / 8 for i in range(70)]
    assert tracks.evicted == 0
    advance(tracks, {"70": torch.ones(1, K)})
    assert len(tracks.tokens) == len(tracks.slots) == 70
    assert "0" not in tracks.slots


def test_the_longest_unseen_is_forgotten_not_the_oldest() -> None:
    tracks = tracks_of(limit=2)
    for name in ("a", "b", "a", "c"):
        advance(tracks, {name: torch.ones(1, K)})
    assert sorted(tracks.slots) == ["a", "c"]


@pytest.mark.parametrize("pieces", [[30], [10, 1, 1, 1, 12, 5], [1] * 30])
def test_a_trace_is_the_last_tokens_whatever_the_steps(pieces: list[int]) -> None:
    z, tracks = randn(30, K), tracks_of(history=7)
    for part in z.split(pieces):
        advance(tracks, {"r": part})
        assert sum(kept.shape[1] for kept in tracks.kept[0]) < 2 * 7
    torch.testing.assert_close(tracks.trace("r"), plain(z)[:, -7:], rtol=0, atol=ROUNDING)
    assert tracks.trace("s") is None


def test_nothing_is_traced_unless_asked() -> None:
    tracks = tracks_of()
    advance(tracks, {"r": randn(3, K)})
    assert tracks.trace("r") is None
