"""Monitoring: running statistics per sequence, whatever the batches, and the memory they take."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emocore.calibration import STATISTICS, Calibration, StreamReference
from emocore.directions import Directions
from emocore.errors import ArgumentError, CalibrationError, HookPointError
from emocore.moments import Moments
from emocore.monitoring import Monitor, monitor
from emocore.tokens import Tokens
from emocore.tracking import CHUNK

K = 2
ROUNDING = 1e-12  # a few hundred float64 sums of order 1


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Cache:
    """What a model of this file takes for a KV cache: a length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def get_seq_length(self) -> int:
        return self.length


class Toy(nn.Module):
    """Its hidden state is its input: z scores can be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, past_key_values: Cache | None = None) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x


def vectors(tokens: Tokens | None = None, hook_point: str | None = "layers.0", k: int = K) -> Directions:
    """Directions along the axes with z = x."""
    eye, zero, one = torch.eye(k).double(), torch.zeros(k).double(), torch.ones(k).double()
    scale = Calibration(zero, one, 1000, tokens)
    return Directions(tuple("abcd"[:k]), eye, eye.float(), zero, 1.0, one, hook_point, calibration=scale)


def plain(z: Tensor, alpha: float, window: int) -> Tensor:
    """Every statistic of one sequence z [n, K] by its definition, token by token."""
    ema, out = torch.zeros(z.shape[1], dtype=torch.float64), []
    for t in range(len(z)):
        ema = (1 - alpha) * ema + alpha * z[t]
        out.append(torch.stack([z[t], ema, z[max(0, t - window + 1) : t + 1].mean(0)]))
    return torch.stack(out, 1)


def traced(watch: Monitor, sequence: str) -> Tensor:
    return torch.stack([watch.trace(sequence, on) for on in STATISTICS])


def check(watch: Monitor, tokens: int, **counts: int) -> None:
    ledger = watch.ledger["layers.0"]
    ledger.check()
    found = ledger.tokens.as_dict()
    assert found["selected"] == ledger.rows.accumulated == tokens
    assert {name: found[name] for name in counts} == counts


# --- the statistics


def test_ema_and_window_by_hand() -> None:
    x = torch.tensor([[[8.0, 0.0], [0.0, 4.0], [4.0, 4.0]]]).double()
    with monitor(Toy(), vectors(), alpha=0.5, window=2, history=9) as watch:
        watch._tap.model(x)
    assert watch.trace("#0", "ema").tolist() == [[4.0, 0.0], [2.0, 2.0], [3.0, 3.0]]
    assert watch.trace("#0", "window").tolist() == [[8.0, 0.0], [4.0, 2.0], [2.0, 4.0]]
    assert watch.scores["#0"].tolist() == [3.0, 3.0]
    assert watch.peaks["#0"].tolist() == [4.0, 3.0]
    check(watch, 3)


@pytest.mark.parametrize("pieces", [[200], [1] * 200, [CHUNK, CHUNK, 72], [3, 190, 7], [199, 1]])
def test_forwards_may_cut_a_sequence_anywhere(pieces: list[int]) -> None:
    z, model = randn(200, K), Toy()
    with monitor(model, vectors(), history=200) as watch:
        for part in z.split(pieces):
            with watch.batch(requests=["r"]):
                model(part[None])
    torch.testing.assert_close(traced(watch, "r"), plain(z, 1 / 8, 16), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(watch.peaks["r"], plain(z, 1 / 8, 16)[1].amax(0), rtol=0, atol=ROUNDING)
    check(watch, 200)


def padded(rows: Sequence[Tensor], left: bool) -> tuple[Tensor, Tensor]:
    """Rows [n, K] of several sequences as a batch with its mask; pads are NaN."""
    longest = max(len(r) for r in rows)
    x = torch.full((len(rows), longest, K), torch.nan, dtype=torch.float64)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, r in enumerate(rows):
        where = slice(longest - len(r), None) if left else slice(len(r))
        x[i, where], mask[i, where] = r, 1
    return x, mask


@pytest.mark.parametrize("left", [False, True])
def test_requests_keep_their_state_over_interleaved_and_reordered_batches(left: bool) -> None:
    streams = {name: randn(n, K, seed=n) for name, n in (("a", 90), ("b", 31), ("c", 150), ("d", 7))}
    rest = dict(streams)
    draw = torch.Generator().manual_seed(5)
    model = Toy()
    with monitor(model, vectors(), history=200) as watch:
        while rest:
            names = [list(rest)[i] for i in torch.randperm(len(rest), generator=draw)[:3].tolist()]
            sizes = torch.randint(1, 20, (len(names),), generator=draw).tolist()
            parts = [rest[name][:size] for name, size in zip(names, sizes, strict=True)]
            x, mask = padded(parts, left)
            with watch.batch(requests=names):
                model(x, attention_mask=mask)
            rest = {n: z[dict(zip(names, sizes, strict=True)).get(n, 0) :] for n, z in rest.items()}
            rest = {n: z for n, z in rest.items() if len(z)}
    for name, z in streams.items():
        torch.testing.assert_close(traced(watch, name), plain(z, 1 / 8, 16), rtol=0, atol=ROUNDING)
        torch.testing.assert_close(watch.scores[name], plain(z, 1 / 8, 16)[1, -1], rtol=0, atol=ROUNDING)
    check(watch, sum(map(len, streams.values())))


def test_packed_sequences_of_named_requests() -> None:
    a, b, model = randn(5, K, seed=1), randn(9, K, seed=2), Toy()
    with monitor(model, vectors(), history=20) as watch:
        with watch.batch(requests=["a", "b"], cu_seqlens=torch.tensor([0, 2, 8])):
            model(torch.cat([a[:2], b[:6]]))
        with watch.batch(requests=["b", "a"], cu_seqlens=torch.tensor([0, 3, 6])):
            model(torch.cat([b[6:], a[2:]]))
    for name, z in (("a", a), ("b", b)):
        torch.testing.assert_close(traced(watch, name), plain(z, 1 / 8, 16), rtol=0, atol=ROUNDING)
    check(watch, 14)


# --- sequences without names


def test_a_cache_continues_a_row_and_a_fresh_prompt_begins_anew() -> None:
    z, model = randn(2, 9, K), Toy()
    with monitor(model, vectors(), history=20) as watch:
        model(z[:, :5])
        for t in range(5, 9):
            model(z[:, t : t + 1], past_key_values=Cache(t))
        assert list(watch.scores) == ["#0", "#1"]
        model(z[:1, :3])
    assert list(watch.scores) == ["#0", "#1", "#2"]
    for name, part in (("#0", z[0]), ("#1", z[1]), ("#2", z[0, :3])):
        torch.testing.assert_close(traced(watch, name), plain(part, 1 / 8, 16), rtol=0, atol=ROUNDING)
    check(watch, 2 * 9 + 3)


def test_a_left_padded_cache_goes_on_by_ranks_not_positions() -> None:
    rows = [randn(2, K, seed=1), randn(5, K, seed=2)]
    x, mask = padded(rows, left=True)
    more, model = randn(2, 1, K, seed=3), Toy()
    with monitor(model, vectors(), history=20) as watch:
        model(x, attention_mask=mask)
        model(more, attention_mask=torch.cat([mask, torch.ones(2, 1).long()], 1), past_key_values=Cache(5))
    for i, name in enumerate(("#0", "#1")):
        expected = plain(torch.cat([rows[i], more[i]]), 1 / 8, 16)
        torch.testing.assert_close(traced(watch, name), expected, rtol=0, atol=ROUNDING)
    check(watch, 9, masked=3)


def test_a_fresh_prompt_whose_first_row_is_not_finite_still_begins_anew() -> None:
    model, bad = Toy(), randn(1, 4, K, seed=1)
    bad[0, 0, 0] = torch.nan
    with monitor(model, vectors(), history=20) as watch:
        model(randn(1, 4, K))
        model(bad)
    assert list(watch.scores) == ["#0", "#1"]
    torch.testing.assert_close(traced(watch, "#1"), plain(bad[0, 1:], 1 / 8, 16), rtol=0, atol=ROUNDING)
    check(watch, 7, nonfinite=1)


def test_a_monitor_watches_the_tokens_that_the_vectors_are_calibrated_on() -> None:
    z, model = randn(2, 6, K), Toy()
    with monitor(model, vectors(Tokens(skip=2)), history=20) as watch:
        model(z)
        model(z)  # ranks start at 2 again: new sequences
    assert list(watch.scores) == ["#0", "#1", "#2", "#3"]
    torch.testing.assert_close(traced(watch, "#3"), plain(z[1, 2:], 1 / 8, 16), rtol=0, atol=ROUNDING)
    check(watch, 16, skipped=8)


def test_decoding_a_real_model_is_one_pass_over_the_same_tokens(tiny: Any) -> None:
    model = tiny("llama")
    hidden = 16
    eye, zero, one = torch.eye(hidden).double(), torch.zeros(hidden).double(), torch.ones(hidden).double()
    names = tuple(map(str, range(hidden)))
    watched = Directions(
        names, eye, eye.float(), zero, 1.0, one, "model.layers.1", calibration=Calibration(zero, one, 9, None)
    )
    ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    with torch.inference_mode(), monitor(model, watched, history=50) as decoding:
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=[]
        )
    shown = out[:, :-1]  # the last token is never fed back
    with torch.inference_mode(), monitor(model, watched, history=50) as whole:
        model(shown, attention_mask=torch.ones_like(shown))
    for name in ("#0", "#1"):
        # one float32 forward against many: 16 wide, 3 blocks
        torch.testing.assert_close(traced(decoding, name), traced(whole, name), rtol=0, atol=1e-5)
    decoding.ledger["model.layers.1"].check()
    assert decoding.ledger["model.layers.1"].rows.accumulated == shown.numel()


# --- memory


def test_memory_is_bounded_over_many_sequences_and_wide_batches() -> None:
    model = Toy()
    with monitor(model, vectors(), max_sequences=20, history=3) as watch:
        for _ in range(10):
            model(randn(50, 2, K))  # wider than the table
    tracks = watch.watchers["layers.0"].tracks
    assert tracks is not None
    assert len(tracks.tokens) == len(tracks.slots) == len(tracks.kept) == 20
    assert tracks.evicted == 480
    assert len(watch.watchers["layers.0"]._rows) == 50
    check(watch, 1000)
    with pytest.raises(CalibrationError, match="480 sequences were forgotten"):
        watch.reference()


# --- several hook points, references, requests without a meaning


def test_several_hook_points_answer_by_name() -> None:
    model, z = Toy(), randn(1, 4, K)
    with monitor(model, {"layers.*": vectors(hook_point=None)}, history=9) as watch:
        model(z)
    assert list(watch.scores) == list(watch.peaks) == list(watch.reference()) == ["layers.0", "layers.1"]
    assert torch.equal(watch.scores["layers.0"]["#0"], watch.scores["layers.1"]["#0"])
    assert torch.equal(watch.trace("#0"), watch.trace("#0", hook_point="layers.1"))


def test_a_reference_is_what_the_statistics_did() -> None:
    a, b, model = randn(40, K), randn(25, K, seed=1), Toy()
    with monitor(model, vectors()) as watch:
        model(*padded([a, b], left=False))
    found = watch.reference()
    parts = [plain(z, 1 / 8, 16) for z in (a, b)]
    every = torch.cat(parts, 1)
    assert isinstance(found, StreamReference)
    assert (found.alpha, found.window, found.count, found.sequences) == (1 / 8, 16, 65, 2)
    torch.testing.assert_close(found.mean, every.mean(1), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(found.std, every.std(1, correction=0), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(found.largest, torch.stack([p.amax(1) for p in parts], 1), rtol=0, atol=ROUNDING)
    assert vectors().calibrate(found).scale().stream is found


def test_a_monitor_may_be_made_in_inference_mode_and_used_outside() -> None:
    model = Toy()
    with torch.inference_mode():
        watch = monitor(model, vectors())
        watch.__enter__()
        model(randn(1, 3, K))
    model(randn(1, 3, K))
    watch.__exit__(None, None, None)
    assert watch.reference().sequences == 2
    check(watch, 6)


def test_a_failed_forward_moves_nothing() -> None:
    model, z = Toy(), randn(1, 4, K)
    handle = model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with monitor(model, vectors()) as watch:
        with pytest.raises(ZeroDivisionError), watch.batch(requests=["r"]):
            model(z)
        handle.remove()
        with watch.batch(requests=["r"]):
            model(z)
    torch.testing.assert_close(watch.scores["r"], plain(z[0], 1 / 8, 16)[1, -1], rtol=0, atol=ROUNDING)
    check(watch, 4, rolled_back=4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": 0.0}, "alpha in"),
        ({"alpha": 1.1}, "alpha in"),
        ({"window": 0}, "window >= 1"),
        ({"history": -1}, "history >= 0"),
        ({"max_sequences": 0}, "max_sequences >= 1"),
    ],
)
def test_options_without_a_meaning_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        monitor(Toy(), vectors(), **options)


def test_vectors_that_cannot_watch_are_refused() -> None:
    with pytest.raises(CalibrationError, match="pooled rows, which vary less"):
        monitor(Toy(), vectors(Tokens(pool="mean")))
    with pytest.raises(HookPointError, match=r"layers\.7"):
        monitor(Toy(), vectors(hook_point="layers.7"))
    with pytest.raises(ArgumentError, match="name no hook point"):
        monitor(Toy(), vectors(hook_point=None))
    uncalibrated = Directions(
        ("a",), *[torch.eye(1).double()] * 2, torch.zeros(1).double(), 1.0, torch.ones(1).double()
    )
    with pytest.raises(CalibrationError, match="not calibrated"):
        monitor(Toy(), {"layers.0": uncalibrated})


def test_requests_must_fit_the_batch() -> None:
    with monitor(model := Toy(), vectors()) as watch:
        with pytest.raises(ArgumentError, match="named twice"), watch.batch(requests=["r", "r"]):
            pass
        with pytest.raises(ArgumentError, match="requests; expected 2 ids"), watch.batch(requests=["r"]):
            model(randn(2, 3, K))
        with pytest.raises(CalibrationError, match="no token was watched"):
            watch.reference()
        model(randn(1, 3, K))
        with pytest.raises(ArgumentError, match="nothing kept"):
            watch.trace("#0")
        with pytest.raises(ArgumentError, match="'token' or 'ema' or 'window'"):
            watch.trace("#0", on="mean")
    check(watch, 3)


def test_moments_of_other_tokens_scale_the_watch_they_are_for() -> None:
    """Calibrated on a capture's own token statistics, and scored on the same tokens: mean 0, std 1."""
    from emocore.capturing import capture

    model, z = Toy(), randn(20, 30, K) * 5 + 2
    moments = Moments(covariance=True)
    with capture(model, {"layers.0": moments}) as tap:
        model(z)
    tap.ledger["layers.0"].check()
    with monitor(model, vectors().calibrate(moments)) as watch:
        model(z)
    found = watch.reference()
    assert found.mean[0].tolist() == pytest.approx([0.0] * K, abs=1e-12)
    assert found.std[0].tolist() == pytest.approx([(599 / 600) ** 0.5] * K)
    check(watch, 600)
