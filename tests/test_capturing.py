"""Capture: the rows that sinks get are the model's own, with the right labels, and its output is untouched."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from emocore import Moments, Rows, Tokens, capture
from emocore.errors import CaptureError, HookPointError, ShapeError, TokenError

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
    with (
        pytest.raises(ShapeError, match=r"'block': output; expected \[B, T, D\] or \[N, D\]"),
        capture(model, {"block": Rows()}),
    ):
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
    error = pytest.raises(ShapeError, match=r"rows that cannot be told from padding; expected 12, .*; got 24")
    with torch.no_grad(), error, capture(model, {EXPERTS: Rows()}):
        model(IDS, attention_mask=mask)


def test_a_module_that_sees_only_the_last_token_ranks_it_last(tiny) -> None:
    model = tiny("llama")
    with torch.no_grad(), capture(model, {"lm_head": (Rows(), Tokens(skip=3)), 0: (Rows(), Tokens(skip=3))}) as tap:
        model(IDS, logits_to_keep=1)
    assert [len(rows) for rows in tap.sinks.values()] == [3, 3]


def test_a_data_parallel_wrapper_hides_neither_mask_nor_padding(tiny) -> None:
    model = nn.DataParallel(tiny("llama"), device_ids=[])
    ids = torch.tensor([[5, 6, 0], [7, 8, 9]])
    with torch.no_grad(), capture(model, {1: Rows()}) as tap:
        with pytest.raises(TokenError, match="padding id 0"):
            model(ids)
        model(ids, (ids != 0).long())
    assert list(tap.sinks) == ["module.model.layers.1"]
    settle(tap, 6, 5)


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


@pytest.mark.parametrize("pool", [None, "mean", "last", "max"])
def test_sinks_get_ordinary_tensors_in_inference_mode(tokenwise, pool) -> None:
    class Kinds:
        def update(self, x, labels=None) -> None:
            assert not x.is_inference()
            assert not x.requires_grad

    model = tokenwise()
    with torch.inference_mode(), capture(model, {"layers.0": Kinds()}, tokens=Tokens(pool=pool)) as tap:
        model(IDS)
    settle(tap, 12, 12)
    assert tap.ledger["layers.0"].rows.accumulated == (12 if pool is None else 3)


def test_kept_rows_do_not_change_with_the_model(tokenwise) -> None:
    """A module that works in place afterwards must not reach what was captured."""
    model = tokenwise()
    model.layers[1].forward = lambda x: x.mul_(0.0)
    with torch.no_grad(), capture(model, {"layers.0": Rows()}) as tap:
        model(IDS)
    assert tap.sinks["layers.0"].rows.abs().min() > 0


# --- opening and closing


def test_a_tap_is_opened_one_time_at_a_time(tokenwise) -> None:
    model = tokenwise()
    tap = capture(model, {"layers.0": Rows()})
    with pytest.raises(CaptureError, match=r"tap.batch: the capture is not open"), tap.batch():
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
    tap = capture(model, {"layers.0": rows}, tokens=Tokens(pool="mean")).__enter__()
    batch = tap.batch()
    batch.__enter__()
    model(IDS)
    with pytest.raises(CaptureError, match=r"tap.batch: still open"):
        tap.__exit__(None, None, None)
    tap.ledger["layers.0"].check()
    assert tap.ledger["layers.0"].rows.dropped == 3
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
