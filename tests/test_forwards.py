"""Forwards: what runs other than declared is an error or is counted, never a silence."""

import pytest
import torch
from torch import Tensor, nn

from emocore import Moments, Rows, capture
from emocore.errors import ArgumentError, CaptureError

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])


def settle(tap, offered: int, selected: int, forwards: int = 1) -> None:
    """Every ledger adds up to what was fed."""
    for found in tap.ledger.values():
        for ledger in found if isinstance(found, tuple) else (found,):
            ledger.check()
            assert (ledger.tokens.offered, ledger.tokens.selected) == (offered, selected)
            assert ledger.forwards == forwards


def test_a_model_that_is_never_called_is_an_error(tokenwise) -> None:
    error = pytest.raises(CaptureError, match=r"no forward of the model was seen.*Call the Tokenwise inside")
    with error, capture(tokenwise(), {"layers.0": Moments()}):
        pass


def test_an_error_of_the_body_is_not_hidden_by_the_check(tokenwise) -> None:
    with pytest.raises(ZeroDivisionError), capture(tokenwise(), {"layers.0": Moments()}):
        raise ZeroDivisionError


def test_a_module_called_around_the_root_is_an_error_and_counted(tiny) -> None:
    model, rows = tiny("llama"), Rows()
    with torch.no_grad(), capture(model, {1: rows}) as tap:
        with pytest.raises(
            CaptureError, match=r"'model.layers.1': ran outside a forward.*a call of LlamaForCausalLM itself"
        ):
            model.model(IDS)
        model(IDS)
    ledger = tap.ledger["model.layers.1"]
    ledger.check()
    assert (ledger.tokens.offered, ledger.tokens.orphan, len(rows)) == (24, 12, 12)


def test_a_module_that_runs_twice_is_declared(tiny) -> None:
    shared = nn.Linear(3, 3)
    model, x = nn.Sequential(shared, nn.Tanh(), shared), torch.randn(4, 3)
    error = pytest.raises(CaptureError, match=r"'0': did not run as declared.*expected 1 time\(s\); got 2.*fires")
    with error, capture(model, {"0": Rows()}) as tap:
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
    with capture(model, ["always", "sometimes"], Rows):
        model(x)
        with pytest.raises(CaptureError, match=r"'sometimes'.*got 0.*optional=True"):
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
    with pytest.raises(ArgumentError, match=r"two token streams.*the encoder or the decoder"):
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
