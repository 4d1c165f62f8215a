"""In a training loop: rows counted are rows fed, recomputation is told apart, and gradients are untouched."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from emocore import Moments, Rows, Tokens, capture
from emocore.errors import CaptureError

BATCHES = [
    (torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])),
    (torch.tensor([[0, 11, 12], [13, 14, 15]]), torch.tensor([[0, 1, 1], [1, 1, 1]])),
    (torch.tensor([[16, 17, 18, 19, 20]]), torch.tensor([[1, 1, 1, 1, 1]])),
    (torch.tensor([[21, 0], [22, 23]]), torch.tensor([[1, 0], [1, 1]])),
]
REAL = sum(int(mask.sum()) for _, mask in BATCHES)
FED = sum(mask.numel() for _, mask in BATCHES)
KINDS = [None, "reentrant", "non-reentrant"]


def checkpointed(model, kind):
    if kind:
        model.activation_checkpointing_enable({"use_reentrant": kind == "reentrant"})
    return model.train()


def train(model, tap=None, accumulate=2):
    """Two epochs of a raw loop with gradient accumulation; the losses and the last gradients."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for epoch in range(2):
        for i, (ids, mask) in enumerate(BATCHES):
            loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
            losses.append(loss.item())
            (loss / accumulate).backward()
            if i % accumulate == accumulate - 1 and (epoch, i) != (1, len(BATCHES) - 1):
                optimizer.step()
                optimizer.zero_grad()
    return losses, [p.grad.clone() for p in model.parameters()]


def assert_counts(ledger, epochs) -> None:
    ledger.check()
    tokens = ledger.tokens
    assert (tokens.selected, tokens.masked) == (epochs * REAL, epochs * (FED - REAL))
    assert tokens.offered == tokens.selected + tokens.masked + tokens.recomputed
    assert ledger.rows.accumulated == epochs * REAL
    assert ledger.forwards == ledger.fires.seen == epochs * len(BATCHES)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_counted_are_rows_fed(tiny, family, kind) -> None:
    model = checkpointed(tiny(family), kind)
    with capture(model, [0, 2], lambda: Moments(covariance=True)) as tap:
        train(model)
    for ledger in tap.ledger.values():
        assert_counts(ledger, epochs=2)
    assert [stats.count for stats in tap.sinks.values()] == [2 * REAL] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_hook_points_inside_and_outside_of_a_checkpoint_agree(tiny, kind) -> None:
    """Hooks inside run twice, and outside once: a count of fires would have them disagree."""
    model = checkpointed(tiny("llama"), kind)
    inside, outside = "model.layers.1.post_attention_layernorm", ["model.embed_tokens", "model.norm"]
    with capture(model, [inside, *outside], Rows) as tap:
        train(model)
    for ledger in tap.ledger.values():
        assert_counts(ledger, epochs=2)
    assert tap.ledger[inside].tokens.recomputed == (2 * FED if kind else 0)
    assert [tap.ledger[name].tokens.recomputed for name in outside] == [0, 0]


class Checkpointing(nn.Module):
    """Linear blocks, each checkpointed around its call: hooks on it fire in the forward and in the recomputation."""

    def __init__(self, kind) -> None:
        super().__init__()
        self.kind = kind
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.kind == "reentrant") if self.kind else layer(x)
        return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_block_checkpointed_around_its_call_is_counted_once(kind, accumulate) -> None:
    model, x = Checkpointing(kind), torch.randn(2, 5, 4, requires_grad=True)
    with capture(model, ["layers.0", "layers.1.0", "layers.2"], Rows) as tap:
        sum(model(x).sum() for _ in range(accumulate)).backward()
    assert [len(rows) for rows in tap.sinks.values()] == [10 * accumulate] * 3
    for ledger in tap.ledger.values():
        ledger.check()
    assert tap.ledger["layers.1.0"].tokens.recomputed == (10 * accumulate if kind else 0)
    # a recomputation that stops early never reaches the end of the block
    at_the_end = 10 * accumulate if kind == "reentrant" else 0
    assert [tap.ledger[name].tokens.recomputed for name in ("layers.0", "layers.2")] == [at_the_end] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_the_same_bits_with_and_without_capture(tiny, kind) -> None:
    alone, watched = checkpointed(tiny("llama"), kind), checkpointed(tiny("llama"), kind)
    losses, gradients = train(alone)
    with capture(watched, "model.layers.*", lambda: [Moments(), (Rows(), Tokens(pool="mean"))]):
        watched_losses, watched_gradients = train(watched)
    assert watched_losses == losses
    for one, other in zip(watched_gradients, gradients, strict=True):
        assert torch.equal(one, other)


def test_captured_rows_hold_no_graph(tiny) -> None:
    model = tiny("llama").train()
    with capture(model, {1: Rows()}) as tap:
        model(BATCHES[0][0], attention_mask=BATCHES[0][1])
    rows = tap.sinks["model.layers.1"].rows
    assert not rows.requires_grad
    assert rows.grad_fn is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_whole_model_that_is_recomputed_is_counted_once(tiny, reentrant) -> None:
    """Its batch is closed by then, and nothing is left open by it."""
    model, (ids, mask) = tiny("llama").train(), BATCHES[0]
    hold = torch.ones(1, requires_grad=True)  # reentrant checkpointing needs an input with a gradient

    def loss(hold):
        return model(ids, attention_mask=mask, labels=ids).loss * hold

    with capture(model, {1: Rows(labels=["a", "b"])}) as tap:
        for _ in range(2):
            with tap.batch(labels=["a", "b"]):
                out = checkpoint(loss, hold, use_reentrant=reentrant)
            out.backward()
        with pytest.raises(CaptureError, match="ran outside a forward"):
            model.model(ids, attention_mask=mask)
    ledger = tap.ledger["model.layers.1"]
    ledger.check()
    tokens = ledger.tokens
    assert (len(tap.sinks["model.layers.1"]), ledger.forwards) == (12, 2)
    assert (tokens.recomputed, tokens.orphan, tokens.rolled_back) == (16, 8, 0)


def test_recomputation_after_a_failed_forward_is_still_recomputation(tiny) -> None:
    model = checkpointed(tiny("llama"), "reentrant")
    (ids, mask), fail = BATCHES[0], []

    def maybe(*rest) -> None:
        if fail:
            raise KeyboardInterrupt

    model.model.layers[2].register_forward_hook(maybe)
    with capture(model, {"model.layers.1.mlp": Rows()}) as tap:
        loss = model(ids, attention_mask=mask, labels=ids).loss
        fail.append(1)
        with pytest.raises(KeyboardInterrupt):
            model(ids, attention_mask=mask)
        fail.clear()
        loss.backward()
        model(ids, attention_mask=mask)
    ledger = tap.ledger["model.layers.1.mlp"]
    ledger.check()
    tokens = ledger.tokens
    assert (tokens.selected, tokens.masked, tokens.recomputed, tokens.rolled_back) == (12, 4, 8, 8)


def test_pooled_rows_of_accumulated_batches_keep_their_labels(tiny) -> None:
    model, labels = checkpointed(tiny("llama"), "non-reentrant"), [["a", "b"], ["b", None], ["a"], [None, "a"]]
    with capture(model, {1: Rows(labels=["a", "b"])}, tokens=Tokens(pool="mean")) as tap:
        for (ids, mask), words in zip(BATCHES, labels, strict=True):
            with tap.batch(labels=words):
                model(ids, attention_mask=mask, labels=ids).loss.backward()
    assert tap.sinks["model.layers.1"].ids.tolist() == [0, 1, 1, -1, 0, -1, 0]
    tap.ledger["model.layers.1"].check()


def test_a_loop_that_evaluates_in_between_can_leave_that_out(tiny) -> None:
    model = tiny("llama").train()
    with capture(model, {1: Rows()}, training=True) as tap:
        for ids, mask in BATCHES:
            model(ids, attention_mask=mask, labels=ids).loss.backward()
            with torch.no_grad():
                model.eval()(ids)
            model.train()
    assert_counts(tap.ledger["model.layers.1"], epochs=1)


# --- hooks that a compiled model would pass by


def test_hooks_added_after_compilation_are_an_error_not_a_silence(tiny) -> None:
    torch.compiler.reset()
    model, (ids, mask) = tiny("llama"), BATCHES[0]
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(ids, attention_mask=mask)
        error = pytest.raises(CaptureError, match=r"did not run as declared.*compiled before never run")
        with error, capture(compiled, {1: Rows()}):
            compiled(ids, attention_mask=mask)
