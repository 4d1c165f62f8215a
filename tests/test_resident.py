"""Captures that stay on the device say what captures on the host say: on the CPU, by the reference of every step."""

import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import emocore
from emocore import Moments, Tokens, capture, ops
from emocore.errors import ArgumentError, CaptureError, LabelError, ShapeError, TokenError
from emocore.hookpoints import block_names

PAD, EOS, VOCAB = 0, 1, 64


def same(mine: Moments, other: Moments, tolerance: float = 1e-12) -> None:
    """Counts alike to the last one, sums to rounding."""
    assert mine.count == other.count
    assert torch.equal(mine.label_count, other.label_count)
    torch.testing.assert_close(mine.mean, other.mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(mine.label_mean, other.label_mean, rtol=tolerance, atol=tolerance, equal_nan=True)
    if mine.keeps_covariance:
        torch.testing.assert_close(mine.covariance(), other.covariance(), rtol=1e-5, atol=1e-6)
    # norms wait as float32
    assert mine.mean_norm == pytest.approx(other.mean_norm, rel=1e-6)


def both(model: nn.Module, points: object, sink, run, **options) -> tuple[emocore.Tap, emocore.Tap]:
    """The same forwards captured on the device and on the host; their sinks and ledgers must agree."""
    taps = []
    for resident in (True, False):
        with torch.no_grad(), capture(model, points, sink, resident=resident, **options) as tap:
            run(tap)
        assert tap.resident == resident
        taps.append(tap)
    mine, other = taps
    assert mine.committed == other.committed
    for name in mine.sinks:
        same(mine.sinks[name], other.sinks[name])
        assert mine.ledger[name] == other.ledger[name]
    return mine, other


def labelled() -> Moments:
    return Moments(labels=["calm", "tense"], covariance=True)


def ids(b: int, t: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (b, t), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("skip", [0, 2])
def test_padding_on_either_side(tokenwise, side: str, skip: int) -> None:
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1, : 4 if side == "left" else 6] = 0
    mask[2, slice(0, 2) if side == "left" else slice(4, 6)] = 0
    shown = ids(3, 6) * mask

    def run(tap) -> None:
        for labels in (["calm", None, "tense"], ["tense", "tense", "calm"]):
            with tap.batch(labels=labels):
                tap.model(shown, attention_mask=mask)

    both(tokenwise(), "layers.*", labelled, run, tokens=Tokens(skip=skip))


def test_labels_by_position_and_several_sinks_of_a_hook_point(tokenwise) -> None:
    where = torch.tensor([[0, 1, -1, 0], [1, 1, 0, -1]])

    def run(tap) -> None:
        with tap.batch(labels=where):
            tap.model(ids(2, 4))

    sinks = {"layers.0": lambda: [labelled(), (Moments(), Tokens(skip=1))], "layers.1": labelled}
    found = []
    for resident in (True, False):
        with capture(tokenwise(), sinks, resident=resident) as tap:
            run(tap)
        found.append(tap)
    mine, other = found
    for a, b in zip(mine.sinks["layers.0"], other.sinks["layers.0"], strict=True):
        same(a, b)
    assert mine.ledger == other.ledger
    assert mine.sinks["layers.0"][1].count == 6


def test_packed_batches(tokenwise) -> None:
    bounds = torch.tensor([0, 3, 3, 8])

    def run(tap) -> None:
        for labels in (["calm", "tense", "tense"], [0, 1, 0, -1, 1, 0, 0, 1, -1, 0]):
            with tap.batch(cu_seqlens=bounds, labels=labels):
                tap.model(ids(1, 10))

    both(tokenwise(), "layers.1", labelled, run, tokens=Tokens(skip=1))


def test_spans(tokenwise) -> None:
    def run(tap) -> None:
        for spans in ([{"said": [(0, 2), (3, 4)]}, {}], [{}, {"said": [(1, 5)]}]):
            with tap.batch(spans=spans):
                tap.model(ids(2, 5))

    both(tokenwise(), "layers.0", Moments, run, tokens=Tokens(span="said"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "mixtral"])
def test_generation(tiny, family: str) -> None:
    model = tiny(family)
    prompt = ids(3, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])

    def run(tap) -> None:
        with tap.batch():
            torch.manual_seed(0)
            model.generate(input_ids=prompt * mask, attention_mask=mask, max_new_tokens=6, do_sample=True)

    both(model, block_names(model), lambda: Moments(covariance=True), run)


def test_reshown_tokens_count_once_without_a_cache(tiny) -> None:
    def run(tap) -> None:
        with tap.batch():
            tap.model.generate(
                input_ids=ids(2, 4),
                attention_mask=torch.ones(2, 4, dtype=torch.long),
                max_new_tokens=4,
                use_cache=False,
            )

    mine, _ = both(tiny("llama"), "model.layers.1", Moments, run)
    assert mine.ledger["model.layers.1"].tokens.reseen > 0


def test_plain_rows() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    mine, _ = both(model, {"0": lambda: Moments(covariance=True)}, None, lambda tap: tap.model(x))
    assert mine.sinks["0"].count == 7


@pytest.mark.parametrize("pool", ["mean", "last", "max"])
@pytest.mark.parametrize("batched", [True, False])
def test_pooled_rows(tokenwise, pool: str, batched: bool) -> None:
    model = tokenwise()
    with torch.no_grad():
        model.embed.weight[9] = torch.inf
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 0]])
    shown = torch.tensor([[0, 4, 5, 6], [4, 9, 7, 8], [0, 0, 0, 5], [11, 12, 13, 0]])

    def run(tap) -> None:
        for seed in range(3):
            if batched:
                with tap.batch(labels=["calm", "tense", None, "tense"]):
                    model(shown, attention_mask=mask)
            else:
                model(shown.roll(seed, 0), attention_mask=mask.roll(seed, 0))

    def sink() -> Moments:
        return Moments(labels=["calm", "tense"] if batched else None)

    mine, _ = both(model, "layers.*", sink, run, tokens=Tokens(skip=1, pool=pool))
    rows = mine.ledger["layers.0"].rows
    assert (rows.accumulated, rows.nonfinite, rows.too_short) == (6, 3, 3)


def test_pooled_over_the_forwards_of_a_generation(tiny) -> None:
    def run(tap) -> None:
        for seed in range(2):
            with tap.batch(labels=["calm", "tense"]):
                tap.model.generate(
                    input_ids=ids(2, 4, seed), attention_mask=torch.ones(2, 4, dtype=torch.long), max_new_tokens=5
                )

    for pool in ("mean", "last", "max"):
        both(tiny("llama"), "model.layers.1", labelled, run, tokens=Tokens(pool=pool))


def test_pooled_rows_of_a_forward_that_failed_are_not_formed() -> None:
    model, x = Breaks(), torch.randn(2, 5, 3)
    with capture(model, ["first", "second"], Moments, tokens=Tokens(pool="mean"), resident=True) as tap:
        with tap.batch():
            model(x)
        with pytest.raises(KeyError), tap.batch():
            model(x, fail=True)
        with tap.batch():
            pass
        with pytest.raises(ZeroDivisionError), tap.batch():  # noqa: PT012
            model(x)
            raise ZeroDivisionError
    assert tap.sinks["first"].count == tap.sinks["second"].count == 2
    assert tap.ledger["first"].rows.dropped == 2
    assert tap.ledger["first"].tokens.rolled_back == 10


def test_rows_with_nan_are_quarantined(tokenwise) -> None:
    model = tokenwise()
    with torch.no_grad():
        model.embed.weight[9] = torch.inf
    shown = torch.tensor([[9, 4, 5], [6, 9, 9]])
    mine, _ = both(model, "layers.*", Moments, lambda tap: tap.model(shown, attention_mask=torch.ones(2, 3)))
    assert mine.ledger["layers.0"].tokens.nonfinite == 3
    assert mine.sinks["layers.0"].count == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("labels", [None, ["calm", "tense"]])
def test_whole_blocks_are_summed_on_the_device(tokenwise, dtype: torch.dtype, labels) -> None:
    """Blocks of 512 rows, forwards of 150: blocks begin and end inside forwards, and the ring goes round."""
    model = tokenwise(dim=20).to(dtype)
    batches = [ids(3, 50, seed) for seed in range(12)]

    def run(tap) -> None:
        for i, shown in enumerate(batches):
            with tap.batch(labels=None if labels is None else [labels[i % 2], None, labels[1]]):
                tap.model(shown)

    def sink() -> Moments:
        return Moments(labels=labels, covariance=True, block_rows=512)

    with torch.no_grad(), capture(model, "layers.*", sink, resident=True) as tap:
        run(tap)
    (group,) = tap._way.seats.groups
    assert group.capacity == 1024
    for name, block in zip(tap.sinks, (0, 1), strict=True):
        mine = tap.sinks[name]
        with torch.no_grad():
            rows = [model.layers[0](model.embed(shown)) for shown in batches]
            rows = [model.layers[1](r) for r in rows] if block else rows
        x = torch.cat([r.reshape(-1, 20) for r in rows]).double()
        assert mine.count == len(x) == 1800
        torch.testing.assert_close(mine.mean, x.mean(0), rtol=1e-12, atol=1e-12)
        exact = torch.cov(x.T)
        std = exact.diag().sqrt()
        assert ((mine.covariance() - exact).abs() / torch.outer(std, std)).max() < 5e-6
        assert mine.ledger.rows.formed == mine.ledger.rows.accumulated == 1800
        if labels:
            for k, name_k in enumerate(labels):
                at = torch.cat(
                    [torch.tensor([i % 2 == k, False, k == 1]).repeat_interleave(50) for i in range(len(batches))]
                )
                torch.testing.assert_close(mine.label_mean[k], x[at].mean(0), rtol=1e-12, atol=1e-12)
                assert mine.label_count[k] == at.sum(), name_k


def test_batch_boundaries_and_padding_do_not_change_a_bit(tokenwise) -> None:
    """Means, counts and covariances are the same bits whether rows come in forwards of 40 or of 200 beside padding."""
    model, stream = tokenwise(dim=7), ids(40, 30)
    found = []
    for rows, padding in ((2, 0), (10, 4)):
        with (
            torch.no_grad(),
            capture(model, "layers.1", lambda: Moments(covariance=True, block_rows=512), resident=True) as tap,
        ):
            for part in stream.split(rows):
                shown = torch.cat([part, part.new_zeros(rows, padding)], 1)
                model(shown, attention_mask=(shown != PAD).long())
        found.append(tap.sinks["layers.1"])
    assert torch.equal(found[0].mean, found[1].mean)
    assert torch.equal(found[0].covariance(), found[1].covariance())
    assert found[0].mean_norm == found[1].mean_norm


def test_reading_while_open_loses_nothing(tokenwise) -> None:
    model, moments = tokenwise(), Moments(covariance=True, block_rows=512)
    with torch.no_grad(), capture(model, {"layers.0": moments}, resident=True) as tap:
        for i in range(1, 9):
            model(ids(4, 25, i))
            assert moments.count == 100 * i
            assert tap.ledger["layers.0"].tokens.selected == 100 * i
            assert moments.copy().count == 100 * i
    with torch.no_grad(), capture(model, {"layers.0": moments}, resident=False):
        model(ids(4, 25, 9))
    assert moments.count == 900
    whole = Moments(covariance=True)
    with torch.no_grad():
        for i in range(1, 10):
            whole.update(model.layers[0](model.embed(ids(4, 25, i))))
    torch.testing.assert_close(moments.covariance(), whole.covariance(), rtol=1e-6, atol=1e-7)


def test_update_and_merge_while_open(tokenwise) -> None:
    model, moments, other = tokenwise(), Moments(), Moments()
    other.update(torch.ones(3, 5))
    other.tokens = Tokens()
    with torch.no_grad(), capture(model, {"layers.0": moments}, resident=True):
        model(ids(1, 4))
        moments.merge(other)
        moments.update(torch.zeros(2, 5))
        model(ids(1, 4))
    assert moments.count == 4 + 3 + 2 + 4


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, fail: bool = False, skip: bool = False) -> Tensor:
        x = self.first(x)
        if fail:
            raise KeyError("no")
        return x if skip else self.second(x)


def test_a_forward_that_fails_leaves_nothing(tokenwise) -> None:
    model, x = Breaks(), torch.randn(2, 5, 3)
    with capture(model, ["first", "second"], Moments, resident=True) as tap:
        model(x)
        with pytest.raises(KeyError):
            model(x, fail=True)
        model(x)
        with pytest.raises(KeyError):
            model(x, fail=True)
    for name in ("first", "second"):
        assert tap.sinks[name].count == 20
    assert tap.ledger["first"].tokens.rolled_back == 20
    assert tap.ledger["second"].tokens.rolled_back == 0


def test_a_module_that_does_not_fire_is_an_error_and_nothing_is_committed() -> None:
    model, x = Breaks(), torch.randn(2, 5, 3)
    tap = capture(model, ["first", "second"], Moments, resident=True)
    with pytest.raises(CaptureError, match="did not run once in 1 forward"), tap:  # noqa: PT012
        model(x)
        model(x, skip=True)
    assert tap.sinks["first"].count == tap.sinks["second"].count == 10
    # and is heard of at the next forward at the latest
    with capture(model, ["first", "second"], Moments, resident=True) as tap:
        model(x)
        model(x, skip=True)
        with pytest.raises(CaptureError, match="second"):
            model(x)


def test_optional_modules_may_be_skipped() -> None:
    model, x = Breaks(), torch.randn(2, 5, 3)
    both(model, ["first", "second"], Moments, lambda tap: (model(x), model(x, skip=True)), optional=True)


def test_a_module_called_around_the_model_is_an_error(tokenwise) -> None:
    model = tokenwise()
    with pytest.raises(CaptureError, match="outside a forward"), capture(model, "layers.0", Moments, resident=True):
        model.layers[0](torch.zeros(1, 2, 5))


def test_bad_input_is_named(tokenwise, tiny) -> None:
    model = tokenwise()
    with capture(model, "layers.0", labelled, resident=True) as tap:
        with pytest.raises(LabelError, match="without labels"):
            model(ids(1, 2))
        with pytest.raises(ShapeError, match="labels"), tap.batch(labels=["calm"] * 3):
            model(ids(2, 4))
        with tap.batch(labels=0 * ids(2, 4)):
            model(ids(2, 4))
            with pytest.raises(ShapeError, match="different numbers of sequences"):
                model(ids(4, 2))
        with pytest.raises(ShapeError, match="attention_mask"), tap.batch(labels=["calm"] * 2):
            model(ids(2, 4), attention_mask=torch.ones(1, 2, 4, 4))
        with pytest.raises(ShapeError, match="cu_seqlens"), tap.batch(labels=["calm"], cu_seqlens=torch.tensor([1, 4])):
            model(ids(1, 4))
        with tap.batch(labels=["calm"]):
            model(ids(1, 2))
    with capture(model, "layers.0", Moments, tokens=Tokens(span="said"), resident=True) as tap:
        with pytest.raises(TokenError, match="names no spans"):
            model(ids(1, 2))
        with pytest.raises(ShapeError, match="spans"), tap.batch(spans=[{}]):
            model(ids(2, 2))
        with tap.batch(spans=[{}]):
            model(ids(1, 2))
    with capture(model, "layers.0", Moments, resident=True):
        model(ids(1, 2))
        model.half()
        with pytest.raises(ArgumentError, match="like the first ones"):
            model(ids(1, 2))
    model.float()


def test_rows_that_a_sink_cannot_take_are_refused_before_they_are_staged(tokenwise) -> None:
    model, other = tokenwise(dim=5), Moments()
    other.update(torch.zeros(2, 4))
    other.tokens = Tokens()
    for sink, reason in ((Moments(dtype=torch.bfloat16), "narrower"), (other, "width")):
        before = sink.count
        tap = capture(model, {"layers.0": sink}, resident=True)
        with pytest.raises((ArgumentError, ShapeError), match=reason), tap:
            model(ids(1, 2))
        assert sink.count == before


def test_padding_without_a_mask_is_found_on_the_device(tokenwise) -> None:
    model = tokenwise()
    with pytest.raises(TokenError, match="padding id"), capture(model, "layers.0", Moments, resident=True):
        model(torch.tensor([[4, 5, PAD]]))


def test_what_cannot_stay_on_the_device_says_so(tokenwise) -> None:
    for options, reason in (({"fires": 2}, "more than once"),):
        with pytest.raises(ArgumentError, match=reason):
            capture(tokenwise(), "layers.0", Moments, resident=True, **options)
    with pytest.raises(ArgumentError, match="float64 rows"):
        capture(tokenwise(), {"layers.0": Moments(dtype=torch.float64)}, resident=True)
    with pytest.raises(ArgumentError, match=r"no Moments, monitor.s or ActivationStore.s"):
        capture(tokenwise(), "layers.0", emocore.Rows, resident=True)
    with pytest.raises(ArgumentError, match="float64"):
        capture(tokenwise().double(), "layers.0", Moments, resident=True)


def test_nothing_grows_while_a_graph_is_recorded(tokenwise, monkeypatch) -> None:
    """Rows, sequences, labels and spans are refused before anything is launched; what fits goes on."""
    model, during = tokenwise(), {"emocore.plans.recording": True, "emocore.lanes.recording": True}
    rules = {"layers.0": labelled, "layers.1": (Moments(), Tokens(span="said"))}
    with capture(model, rules, resident=True) as tap:

        def run(b: int, t: int, **given: object) -> None:
            with tap.batch(labels=[0] * b, spans=[{"said": [(0, 1)]}] * b, **given):
                model(ids(b, t))

        run(2, 3)
        for name, value in during.items():
            monkeypatch.setattr(name, lambda device, value=value: value)
        run(2, 3)
        for b, t in ((2, 400), (3, 2)):
            with pytest.raises(CaptureError, match="graph is being recorded"):
                run(b, t)
        with pytest.raises(CaptureError, match="spans"), tap.batch(labels=[0, 0], spans=[{"said": [(0, 1)] * 3}] * 2):
            model(ids(2, 3))
        run(2, 3)
    assert tap.sinks["layers.0"].count == 18
    fresh = capture(model, "layers.0", Moments, resident=True)
    with pytest.raises(CaptureError, match="graph is being recorded"), fresh:
        model(ids(1, 1))


def test_two_threads_in_one_capture_are_told(tokenwise) -> None:
    model = Breaks()
    inside, go_on = threading.Event(), threading.Event()
    handle = model.first.register_forward_hook(lambda *_: (inside.set(), go_on.wait(10))[0])
    with capture(model, "second", Moments, resident=True) as tap:
        worker = threading.Thread(target=lambda: model(torch.zeros(1, 2, 3)))
        worker.start()
        inside.wait(10)
        handle.remove()
        with pytest.raises(CaptureError, match="two forwards at once"):
            model(torch.zeros(1, 2, 3))
        go_on.set()
        worker.join()
    assert tap.sinks["second"].count == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_in_the_backward_is_counted_as_such(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            with set_checkpoint_early_stop(False):  # else torch may stop before the hook, when it has what it needs
                return self.second(checkpoint(self.first, x, use_reentrant=reentrant))

    model, x = Checkpointed(), torch.randn(2, 5, 3, requires_grad=True)
    for pool in (None, "mean"):
        tokens = Tokens(pool=pool)
        with capture(model, ["first", "second"], Moments, tokens=tokens, resident=True) as tap:
            model(x).sum().backward()
        assert tap.ledger["first"].tokens.recomputed == 10
        assert tap.ledger["second"].tokens.recomputed == 0
        for name in ("first", "second"):
            assert tap.sinks[name].count == (10 if pool is None else 2)


def test_inference_mode_first_and_training_after(tokenwise) -> None:
    """Memory made while inference mode is on is written to when it is off."""
    model = tokenwise()
    for options in ({}, {"tokens": Tokens(pool="mean")}):
        with capture(model, "layers.*", lambda: Moments(covariance=True), resident=True, **options) as tap:
            with torch.inference_mode():
                model(ids(2, 3))
            model(ids(4, 5)).sum().backward()
            with torch.inference_mode():
                model(ids(4, 5))
        assert tap.sinks["layers.1"].count == (46 if not options else 10)


def test_only_forwards_in_the_asked_mode(tokenwise) -> None:
    model = tokenwise()

    def run(tap) -> None:
        for training in (True, False, True):
            model.train(training)
            model(ids(1, 3))

    mine, _ = both(model, "layers.0", Moments, run, training=True)
    assert mine.sinks["layers.0"].count == 6


def test_memory_is_let_go_and_no_hook_stays(tokenwise) -> None:
    model = tokenwise()
    with torch.no_grad(), capture(model, "layers.*", Moments, resident=True) as tap:
        model(ids(1, 3))
    sinks, lane = tap.sinks, weakref.ref(tap._way)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    del tap
    gc.collect()
    assert lane() is None
    assert sinks["layers.0"].count == 3
    assert not list(ops.LANES)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, in its compiler
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_whole(tokenwise, backend: str) -> None:
    """Hooks are in the one graph; counts and sums are those of eager code."""
    model = tokenwise(dim=6)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    shown = ids(2, 4) * mask
    counts = []
    for compiled in (False, True):
        torch._dynamo.reset()
        with torch.no_grad(), capture(model, "layers.*", labelled, tokens=Tokens(skip=1), resident=True) as tap:
            call = torch.compile(model, fullgraph=True, backend=backend) if compiled else model
            for _ in range(3):
                with tap.batch(labels=["calm", "tense"]):
                    call(shown, attention_mask=mask)
        counts.append(tap)
    for name in counts[0].sinks:
        same(counts[1].sinks[name], counts[0].sinks[name], 1e-6)
        assert counts[1].ledger[name] == counts[0].ledger[name]


def test_a_model_compiled_before_is_refused(tokenwise) -> None:
    model = tokenwise()
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(CaptureError, match="compiled already"):
        capture(compiled, "_orig_mod.layers.0", Moments, resident=True)
    model.compile(backend="eager")
    with pytest.raises(CaptureError, match="compile that inside"):
        capture(model, "layers.0", Moments, resident=True)
