"""Capture: the rows that sinks get are the model's own, with the right labels, and its output is untouched."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from emocore import Moments, Rows, Tokens, capture
from emocore.errors import ArgumentError, CaptureError, HookPointError, LabelError, ShapeError, TokenError

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])


def settle(tap, offered: int, selected: int, forwards: int = 1) -> None:
    """Every ledger adds up to what was fed."""
    for found in tap.ledger.values():
        for ledger in found if isinstance(found, tuple) else (found,):
            ledger.check()
            assert (ledger.tokens.offered, ledger.tokens.selected) == (offered, selected)
            assert ledger.forwards == forwards


# --- rows are the model's own


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "mixtral"])
def test_rows_of_every_block_are_the_hidden_states(tiny, family) -> None:
    model = tiny(family)
    with torch.no_grad(), capture(model, [0, 1], Rows) as tap:
        hidden = model(IDS, output_hidden_states=True).hidden_states
    assert all(torch.equal(tap.sinks[n].rows, hidden[i + 1].reshape(-1, 16)) for i, n in enumerate(tap.sinks))
    settle(tap, 12, 12)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "mixtral"])
def test_outputs_are_bitwise_pristine_while_capturing(tiny, family) -> None:
    model = tiny(family)
    with torch.no_grad():
        alone = model(IDS, output_hidden_states=True)
        with capture(model, "**", Rows, optional=True):
            captured = model(IDS, output_hidden_states=True)
    assert torch.equal(captured.logits, alone.logits)
    for one, other in zip(captured.hidden_states, alone.hidden_states, strict=True):
        assert torch.equal(one, other)


@dataclass
class Held:
    extra: None
    hidden: Tensor


class Wrapping(nn.Module):
    """A block that returns its hidden state the way `wrap` says."""

    def __init__(self, wrap, unwrap) -> None:
        super().__init__()
        self.block, self.wrap, self.unwrap = Wrapped(wrap), wrap, unwrap

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.unwrap(self.block(torch.nn.functional.one_hot(input_ids, 20).float()))


class Wrapped(nn.Module):
    def __init__(self, wrap) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Tensor):
        return self.wrap(x)


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda x: x, lambda y: y),
        (lambda x: (x, None), lambda y: y[0]),
        (lambda x: [None, x], lambda y: y[1]),
        (lambda x: {"hidden_states": x}, lambda y: y["hidden_states"]),
        (lambda x: Held(None, x), lambda y: y.hidden),
    ],
    ids=["tensor", "tuple", "list", "dict", "dataclass"],
)
def test_any_container_is_read_and_passed_on_as_it_is(wrap, unwrap) -> None:
    model, returned = Wrapping(wrap, unwrap), []
    model.block.register_forward_hook(lambda *_: None)
    with capture(model, {"block": Rows()}) as tap:
        model.block.register_forward_hook(lambda module, args, output: returned.append(output))
        out = model(IDS)
    assert torch.equal(tap.sinks["block"].rows, out.reshape(-1, 20))
    assert type(returned[0]) is type(wrap(torch.zeros(1, 1)))
    settle(tap, 12, 12)


def test_the_root_itself_can_be_a_hook_point(tokenwise) -> None:
    model = tokenwise()
    with torch.no_grad(), capture(model, {"": Rows()}) as tap:
        out = model(IDS)
    assert torch.equal(tap.sinks[""].rows, out.reshape(-1, 5))
    settle(tap, 12, 12)


def test_an_output_without_a_hidden_state_is_an_error_at_its_forward() -> None:
    model = Wrapping(lambda x: (None,), lambda y: y)
    with pytest.raises(HookPointError, match="no hidden state"), capture(model, {"block": Rows()}):
        model(IDS)


def test_attention_heads_apart_are_refused(tokenwise) -> None:
    model = Wrapping(lambda x: x.unsqueeze(1), lambda y: y)
    with pytest.raises(ShapeError, match=r"'block': output; expected \[B, T, D\] or \[N, D\]"), capture(model, {"block": Rows()}):
        model(IDS)


def test_rows_of_plain_inputs_are_all_taken() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.randn(5, 4)
    with capture(model, {"0": Rows(labels=["a", "b"])}) as tap, tap.batch(labels=["a", "b", None, "b", "a"]):
        model(x)
    assert tap.sinks["0"].ids.tolist() == [0, 1, -1, 1, 0]


def test_flattened_tokens_keep_their_masks_and_ranks(tiny) -> None:
    """A mixture's router sees [B * T, D]."""
    model, mask = tiny("mixtral"), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]])
    with torch.no_grad(), capture(model, {"model.layers.0.mlp.gate": Rows(), 0: Rows()}, tokens=Tokens(skip=1)) as tap:
        model(IDS, attention_mask=mask)
    for ledger in tap.ledger.values():
        assert (ledger.tokens.offered, ledger.tokens.masked, ledger.tokens.skipped) == (12, 4, 3)
    settle(tap, 12, 5)


EXPERTS = "model.layers.0.mlp.experts.act_fn"  # sees every token twice, in the experts' order


def test_rows_of_experts_are_taken_where_nothing_is_padding(tiny) -> None:
    model = tiny("mixtral")
    with torch.no_grad(), capture(model, {EXPERTS: Rows()}) as tap:
        model(IDS)
        model(IDS, attention_mask=torch.ones_like(IDS))
    settle(tap, 48, 48, forwards=2)


def test_rows_of_experts_that_may_be_padding_are_refused(tiny) -> None:
    model, mask = tiny("mixtral"), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]])
    with torch.no_grad(), pytest.raises(ShapeError, match=r"rows that cannot be told from padding; expected 12, .*; got 24"):
        with capture(model, {EXPERTS: Rows()}):
            model(IDS, attention_mask=mask)


def test_a_module_that_sees_only_the_last_token_ranks_it_last(tiny) -> None:
    model = tiny("llama")
    with torch.no_grad(), capture(model, {"lm_head": (Rows(), Tokens(skip=3)), 0: (Rows(), Tokens(skip=3))}) as tap:
        model(IDS, logits_to_keep=1)
    assert [len(rows) for rows in tap.sinks.values()] == [3, 3]


def test_16_bit_rows_stay_16_bit(tiny) -> None:
    model = tiny("llama").bfloat16()
    with torch.no_grad(), capture(model, {1: Rows()}) as tap:
        hidden = model(IDS, output_hidden_states=True).hidden_states[2]
    assert tap.sinks["model.layers.1"].rows.dtype == torch.bfloat16
    assert torch.equal(tap.sinks["model.layers.1"].rows, hidden.reshape(-1, 16))


def test_statistics_of_inference_mode_can_be_updated_outside(tokenwise) -> None:
    model, stats, whole = tokenwise(), Moments(covariance=True), Moments(covariance=True)
    with torch.inference_mode(), capture(model, {"layers.0": stats}):
        out = model(IDS)
    hidden = (out.clone() - 0.25) / 2.5
    stats.update(hidden)
    with torch.no_grad(), capture(model, {"layers.0": whole}):
        model(IDS)
    whole.update(hidden)
    assert stats.count == 24
    assert torch.equal(stats.covariance(), whole.covariance())


def test_kept_rows_do_not_change_with_the_model(tokenwise) -> None:
    """A module that works in place afterwards must not reach what was captured."""
    model = tokenwise()
    model.layers[1].forward = lambda x: x.mul_(0.0)
    with torch.no_grad(), capture(model, {"layers.0": Rows()}) as tap:
        model(IDS)
    assert tap.sinks["layers.0"].rows.abs().min() > 0


# --- sinks


def test_a_spec_of_many_modules_takes_a_factory(tiny) -> None:
    with torch.no_grad(), capture(model := tiny("gpt2"), "transformer.h.*", lambda: Moments(covariance=True)) as tap:
        model(IDS)
    assert list(tap.sinks) == [f"transformer.h.{i}" for i in range(3)]
    assert [m.count for m in tap.sinks.values()] == [12] * 3
    settle(tap, 12, 12)


@pytest.mark.parametrize("bind", [lambda m: (["0", "1"], m), lambda m: ({"0": m, "1": m}, None), lambda m: ({"0": [m, m]}, None)])
def test_one_moments_bound_twice_is_an_error(bind) -> None:
    with pytest.raises(ArgumentError, match=r"one Moments is bound twice.*factory"):
        capture(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), *bind(Moments()))


def test_a_hook_point_named_twice_is_an_error(tiny) -> None:
    with pytest.raises(ArgumentError, match=r"'model.layers.2' is named twice.*list of sinks"):
        capture(tiny("llama"), {-1: Moments(), "model.layers.2": Moments()})


def test_no_hook_point_is_an_error(tiny) -> None:
    with pytest.raises(ArgumentError, match="hook_points: none given"):
        capture(tiny("llama"), {})


@pytest.mark.parametrize("sink", [None, 3, [None], (object(), Tokens())])
def test_what_cannot_take_rows_is_no_sink(tiny, sink) -> None:
    with pytest.raises(ArgumentError, match=r"sink at 'model.layers.0'; expected an object with update"):
        capture(tiny("llama"), {0: sink})


def test_several_sinks_at_one_hook_point_follow_their_own_rules(tokenwise) -> None:
    model, mask = tokenwise(), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    sinks = [(Rows(), Tokens(skip=2, pool="mean")), (Rows(), Tokens(skip=1)), Rows()]
    with torch.no_grad(), capture(model, {"layers.0": sinks}, tokens=Tokens(pool="last")) as tap:
        model(IDS, mask)
    assert [len(rows) for rows in tap.sinks["layers.0"]] == [2, 6, 3]
    assert [ledger.tokens.skipped for ledger in tap.ledger["layers.0"]] == [6, 3, 0]
    assert [ledger.rows.too_short for ledger in tap.ledger["layers.0"]] == [1, 0, 0]


def test_a_factory_may_give_several_sinks_with_rules(tokenwise) -> None:
    model = tokenwise()
    with torch.no_grad(), capture(model, "layers.*", lambda: [(Rows, Tokens(skip=1)), Rows]) as tap:
        model(IDS)
    assert [[len(rows) for rows in pair] for pair in tap.sinks.values()] == [[9, 12]] * 2


def test_a_sink_that_holds_other_rows_is_refused(tokenwise) -> None:
    model, stats = tokenwise(), Moments()
    with torch.no_grad(), capture(model, {"layers.0": stats}, tokens=Tokens(pool="mean")):
        model(IDS)
    with pytest.raises(ArgumentError, match=r"already holds other rows; expected Tokens\(skip=0, pool='mean'.*got Tokens"):
        capture(model, {"layers.0": stats})
    with torch.no_grad(), capture(model, {"layers.0": stats}, tokens=Tokens(pool="mean")):
        model(IDS)
    assert stats.count == 6
    assert stats.ledger.forwards == 2


def test_a_refused_capture_leaves_its_sinks_as_they_were(tokenwise) -> None:
    stats, used = Moments(), Moments()
    used.tokens = Tokens(skip=3)
    with pytest.raises(ArgumentError):
        capture(tokenwise(), {"layers.0": (stats, Tokens(skip=1)), "layers.1": used})
    assert stats.tokens is None


class Watching:
    """A sink that follows sequences."""

    def __init__(self) -> None:
        self.seen = []

    def observe(self, observed) -> None:
        self.seen.append(observed)


def test_a_sink_that_follows_sequences_gets_their_ranks_and_requests(tokenwise) -> None:
    model, mask = tokenwise(), torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]])
    watching = Watching()
    with torch.no_grad(), capture(model, {"layers.0": (watching, Tokens(skip=1))}) as tap, tap.batch(requests=["x", "y"]):
        model(IDS[:2], mask)
    (seen,) = watching.seen
    assert (seen.hook_point, seen.sequences, seen.requests) == ("layers.0", 2, ["x", "y"])
    assert (seen.sequence.tolist(), seen.rank.tolist()) == ([0, 0], [1, 2])
    assert seen.rows.shape == (2, 5)
    settle(tap, 8, 2)
    assert tap.ledger["layers.0"].rows.accumulated == 2


def test_a_sink_that_follows_sequences_takes_no_pool(tokenwise) -> None:
    with pytest.raises(ArgumentError, match="pool: the sink at 'layers.0' follows tokens"):
        capture(tokenwise(), {"layers.0": Watching()}, tokens=Tokens(pool="mean"))


def test_requests_come_one_a_sequence(tokenwise) -> None:
    model = tokenwise()
    with capture(model, {"layers.0": Rows()}) as tap:
        with pytest.raises(ArgumentError, match="requests; expected 3 ids, one a sequence; got 2"), tap.batch(requests=["x", "y"]):
            model(IDS)
        model(IDS)
    assert len(tap.sinks["layers.0"]) == 12


# --- labels


def labelled(model, labels, tokens=None):
    with torch.no_grad(), capture(model, {"layers.0": Rows(labels=["calm", "at ease", "sad"])}, tokens=tokens) as tap:
        with tap.batch(labels=labels):
            model(IDS)
    settle(tap, 12, 12)
    return tap.sinks["layers.0"].ids.tolist()


@pytest.mark.parametrize(
    "labels", [["sad", None, "at ease"], [2, -1, 1], torch.tensor([2, -1, 1]), ("sad", -1, 1)],
    ids=["names", "ids", "tensor", "mixed"],
)
def test_labels_one_a_sequence(tokenwise, labels) -> None:
    assert labelled(tokenwise(), labels) == [2] * 4 + [-1] * 4 + [1] * 4
    assert labelled(tokenwise(), labels, Tokens(pool="mean")) == [2, -1, 1]


def test_labels_one_a_position(tokenwise) -> None:
    labels = [["calm", "calm", None, "sad"], [None] * 4, ["sad", 1, 0, -1]]
    assert labelled(tokenwise(), labels) == [0, 0, -1, 2, -1, -1, -1, -1, 2, 1, 0, -1]


def test_unlabelled_rows_count_overall_and_not_as_bad_labels(tokenwise) -> None:
    model, stats = tokenwise(), Moments(labels=["a", "b"])
    with torch.no_grad(), capture(model, {"layers.0": stats}) as tap, tap.batch(labels=["a", None, None]):
        model(IDS)
    assert (stats.count, stats.label_count.tolist(), stats.ledger.rows.bad_label) == (12, [4, 0], 0)


def test_labels_of_the_transposed_shape_are_refused(tokenwise) -> None:
    model, labels = tokenwise(), torch.zeros(4, 3, dtype=torch.long)
    with pytest.raises(ShapeError, match=r"labels; expected \[3\], one a sequence, or \[3, 4\]; got \[4, 3\]"):
        labelled(model, labels)


@pytest.mark.parametrize("labels", [[0], [0, 0], [0, 0, 0, 0], [0] * 12])
@pytest.mark.parametrize("pool", [None, "mean"])
def test_too_many_or_too_few_labels_are_refused(tokenwise, labels, pool) -> None:
    with pytest.raises(ShapeError, match="labels"):
        labelled(tokenwise(), labels, Tokens(pool=pool))


def test_pooled_rows_take_one_label_a_sequence(tokenwise) -> None:
    with pytest.raises(ShapeError, match=r"labels: of pooled rows; expected \[3\], one a sequence; got \[3, 4\]"):
        labelled(tokenwise(), [[0] * 4] * 3, Tokens(pool="mean"))


@pytest.mark.parametrize(("labels", "message"), [([0, 3, 0], "row 1.*-1 .. 2; got 3"), ([0, 0, -2], "row 2"), (["calm", "calmm", 0], "row 1.*'calm'")])
def test_a_label_out_of_range_or_unknown_is_an_error_before_the_forward(tokenwise, labels, message) -> None:
    model, rows = tokenwise(), Rows(labels=["calm", "at ease", "sad"])
    with capture(model, {"layers.0": rows}) as tap:
        with pytest.raises(LabelError, match=message), tap.batch(labels=labels):
            raise AssertionError("the batch must not open")
        with tap.batch(labels=[0, 1, 2]):
            model(IDS)
    settle(tap, 12, 12)


def test_a_labelled_sink_outside_a_batch_is_an_error(tokenwise) -> None:
    model, rows = tokenwise(), Rows(labels=["calm"])
    with capture(model, {"layers.0": rows}) as tap:
        with pytest.raises(LabelError, match=r"captured without labels.*tap.batch\(labels=...\)"):
            model(IDS)
        with pytest.raises(LabelError, match="captured without labels"), tap.batch():
            raise AssertionError("the batch must not open")
        with tap.batch(labels=[0, 0, 0]):
            model(IDS)
    settle(tap, 12, 12)


def test_sinks_with_other_names_read_the_same_labels(tokenwise) -> None:
    model = tokenwise()
    with torch.no_grad(), capture(model, {"layers.0": Rows(labels=["a", "b"]), "layers.1": Rows(labels=["b", "c", "a"])}) as tap:
        with tap.batch(labels=["a", "b", None]):
            model(IDS)
    assert [rows.ids.tolist()[::4] for rows in tap.sinks.values()] == [[0, 1, -1], [2, 0, -1]]


# --- calls that cannot be captured as declared


def test_a_model_that_is_never_called_is_an_error(tokenwise) -> None:
    with pytest.raises(CaptureError, match=r"no forward of the model was seen.*Call the Tokenwise inside"):
        with capture(tokenwise(), {"layers.0": Moments()}):
            pass


def test_an_error_of_the_body_is_not_hidden_by_the_check(tokenwise) -> None:
    with pytest.raises(ZeroDivisionError), capture(tokenwise(), {"layers.0": Moments()}):
        raise ZeroDivisionError


def test_a_module_called_around_the_root_is_an_error_and_counted(tiny) -> None:
    model, rows = tiny("llama"), Rows()
    with torch.no_grad(), capture(model, {1: rows}) as tap:
        with pytest.raises(CaptureError, match=r"'model.layers.1': ran outside a forward.*a call of LlamaForCausalLM itself"):
            model.model(IDS)
        model(IDS)
    ledger = tap.ledger["model.layers.1"]
    ledger.check()
    assert (ledger.tokens.offered, ledger.tokens.orphan, len(rows)) == (24, 12, 12)


def test_a_module_that_runs_twice_is_declared(tiny) -> None:
    shared = nn.Linear(3, 3)
    model, x = nn.Sequential(shared, nn.Tanh(), shared), torch.randn(4, 3)
    with pytest.raises(CaptureError, match=r"'0': did not run as declared.*expected 1 time\(s\); got 2.*fires"):
        with capture(model, {"0": Rows()}) as tap:
            model(x)
    assert tap.ledger["0"].tokens.rolled_back == 8
    with torch.no_grad(), capture(model, {"0": Rows()}, fires=2) as tap:
        out = model(x)
    assert torch.equal(tap.sinks["0"].rows, torch.cat([shared(x), out]))
    settle(tap, 8, 8)
    assert (tap.ledger["0"].fires.expected, tap.ledger["0"].fires.seen) == (2, 2)


class Skipping(nn.Module):
    """A block that only every other forward runs."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes, self.calls = nn.Linear(3, 3), nn.Linear(3, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.always(x)
        return self.sometimes(x) if self.calls % 2 else x


def test_a_module_that_is_skipped_is_declared() -> None:
    x = torch.randn(4, 3)
    model = Skipping()
    with pytest.raises(CaptureError, match=r"'sometimes'.*got 0.*optional=True"), capture(model, ["always", "sometimes"], Rows):
        model(x)
        model(x)
    model = Skipping()
    with capture(model, ["always", "sometimes"], Rows, optional=True) as tap:
        for _ in range(4):
            model(x)
    assert [len(rows) for rows in tap.sinks.values()] == [16, 8]
    assert tap.ledger["sometimes"].fires.seen == 2
    assert tap.ledger["sometimes"].forwards == 4


def test_fires_is_a_count(tokenwise) -> None:
    with pytest.raises(ArgumentError, match="fires; expected at least 1; got 0"):
        capture(tokenwise(), {"layers.0": Rows()}, fires=0)


def test_a_model_of_two_token_streams_is_captured_by_its_parts() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, pad_token_id=0, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    with pytest.raises(ArgumentError, match="two token streams.*the encoder or the decoder"):
        capture(model, {"encoder.block.0": Rows()})
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad(), capture(model.encoder, {"block.0": Rows()}) as tap:
        model(input_ids=IDS[:2], attention_mask=mask, decoder_input_ids=IDS[:2, :1])
    settle(tap, 8, 6)


def test_forwards_can_be_chosen_by_mode(tokenwise) -> None:
    model, rows = tokenwise(), Rows()
    with torch.no_grad(), capture(model, {"layers.0": rows}, training=True) as tap:
        model.train()(IDS[:1])
        model.eval()(IDS)
        model.train()(IDS[:2])
    assert len(rows) == 12
    settle(tap, 12, 12, forwards=2)
    with pytest.raises(CaptureError, match="no forward"), capture(model, {"layers.0": Rows()}, training=False):
        model(IDS)


# --- opening and closing


def test_a_tap_is_opened_one_time_at_a_time(tokenwise) -> None:
    model = tokenwise()
    tap = capture(model, {"layers.0": Rows()})
    with pytest.raises(CaptureError, match="tap.batch: the capture is not open"), tap.batch():
        pass
    for n in (12, 24):
        with tap:
            model(IDS)
            with pytest.raises(CaptureError, match="open already"):
                tap.__enter__()
        assert len(tap.sinks["layers.0"]) == n


def test_two_captures_of_one_model_do_not_know_each_other(tokenwise) -> None:
    model = tokenwise()
    with torch.no_grad(), capture(model, {"layers.0": Rows()}) as outer:
        model(IDS)
        with capture(model, {"layers.0": Rows()}) as inner, inner.batch():
            model(IDS[:1])
    settle(outer, 16, 16, forwards=2)
    settle(inner, 4, 4)


def test_a_batch_left_open_is_an_error_and_its_pooled_rows_are_counted(tokenwise) -> None:
    model, rows = tokenwise(), Rows()
    with pytest.raises(CaptureError, match="tap.batch: still open"):
        with capture(model, {"layers.0": rows}, tokens=Tokens(pool="mean")) as tap:
            batch = tap.batch()
            batch.__enter__()
            model(IDS)
    assert tap.ledger["layers.0"].rows.dropped == 3
    tap.ledger["layers.0"].check()
    batch.__exit__(None, None, None)
    assert len(rows) == 0


def test_one_batch_shows_one_set_of_sequences(tokenwise) -> None:
    model, rows = tokenwise(), Rows()
    with torch.no_grad(), capture(model, {"layers.0": rows}) as tap:
        with tap.batch():
            model(IDS[:2])
            with pytest.raises(TokenError, match=r"its forwards show different sequences.*one tap.batch for each"):
                model(IDS[1:])
            with pytest.raises(TokenError, match="different sequences"):
                model(IDS)
        with tap.batch():
            model(IDS)
    settle(tap, 20, 20, forwards=2)


# --- the plainest sink


def test_rows_takes_one_label_a_row() -> None:
    rows = Rows(labels=["a"])
    with pytest.raises(ShapeError, match="labels; expected 3, one a row; got .2."):
        rows.update(torch.ones(3, 2), [0, 0])
    assert len(rows) == 0
    assert rows.ids.tolist() == []
