"""Decoding: every token of a generation is counted once, with or without a cache, whoever stands beside it."""

from types import SimpleNamespace

import pytest
import torch

from emocore import Moments, Rows, Tokens, capture
from emocore.batches import CACHES, Batch, Call
from emocore.errors import ShapeError, TokenError

PROMPT = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
MASK = (PROMPT != 0).long()


def generated(model, tap, ids=PROMPT, mask=MASK, **options):
    """A greedy generation inside one tap.batch."""
    with torch.no_grad(), tap.batch():
        return model.generate(ids, attention_mask=mask, do_sample=False, **{"max_new_tokens": 5} | options)


def hidden_of(model, ids, mask, block):
    """Output of a block at the real tokens of whole texts, from one plain forward."""
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    out = model(ids, attention_mask=mask, position_ids=positions, output_hidden_states=True, use_cache=False)
    return out.hidden_states[block + 1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "mixtral"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_generation_shows_every_token_once(tiny, family, cached) -> None:
    """The last token written is never fed back; without a cache every step shows all tokens before it again."""
    model, rows = tiny(family, eos_token_id=None, pad_token_id=None), Rows()
    with capture(model, {1: rows}) as tap:
        out = generated(model, tap, use_cache=cached)
    ledger = next(iter(tap.ledger.values()))
    ledger.check()
    assert (out.shape, len(rows)) == ((2, 9), 6 + 2 * 4)
    assert (ledger.forwards, ledger.tokens.masked, ledger.unmasked) == (5, 2 if cached else 10, 0)
    assert ledger.tokens.reseen == (0 if cached else 6 + 8 + 10 + 12)
    assert ledger.tokens.offered == (8 + 8 if cached else 2 * (4 + 5 + 6 + 7 + 8))


@pytest.mark.parametrize("cached", [True, False])
def test_rows_of_a_generation_are_those_of_its_whole_text(tiny, cached) -> None:
    model, rows = tiny("llama", eos_token_id=None), Rows(labels=["a", "b"])
    with torch.no_grad(), capture(model, {1: rows}) as tap, tap.batch(labels=["a", "b"]):
        out = model.generate(PROMPT, attention_mask=MASK, do_sample=False, max_new_tokens=5, use_cache=cached)
    whole = torch.cat([MASK, torch.ones(2, 4, dtype=torch.long)], 1)
    with torch.no_grad():
        hidden = hidden_of(model, out[:, :-1], whole, 1)
    for label in (0, 1):
        # attention over other shapes rounds otherwise: a few float32 units in the last place of values around 1
        torch.testing.assert_close(rows.rows[rows.ids == label], hidden[label][whole[label] == 1], rtol=1e-5, atol=1e-5)


def test_skip_and_pool_go_on_through_a_generation(tiny) -> None:
    model, rows = tiny("llama", eos_token_id=None), [(Rows(), Tokens(skip=4)), (Rows(), Tokens(skip=5, pool="last"))]
    with capture(model, {1: rows}) as tap:
        generated(model, tap)
    single, last = tap.sinks["model.layers.1"]
    assert (len(single), len(last)) == (2 + 4, 2)
    assert torch.equal(last.rows, single.rows[-2:])  # the last step's
    skipped = [ledger.tokens.skipped for ledger in tap.ledger["model.layers.1"]]
    assert skipped == [8, 10]


def test_without_a_batch_a_cached_generation_still_knows_its_ranks(tiny) -> None:
    model, rows = tiny("llama", eos_token_id=None), Rows()
    with torch.no_grad(), capture(model, {1: rows}, tokens=Tokens(skip=3)) as tap:
        model.generate(PROMPT, attention_mask=MASK, do_sample=False, max_new_tokens=5)
    tokens = tap.ledger["model.layers.1"].tokens
    assert (len(rows), tokens.skipped, tokens.reseen) == (1 + 7, 6, 0)


def test_chunks_of_a_prompt_with_a_cache_and_no_mask_count_once(tiny) -> None:
    model, ids, rows = tiny("llama"), torch.arange(5, 17).reshape(2, 6), Rows()
    with torch.no_grad(), capture(model, {1: rows}, tokens=Tokens(skip=1)) as tap, tap.batch():
        cache = model(ids[:, :3], use_cache=True).past_key_values
        model(ids[:, 3:], past_key_values=cache)
    ledger = tap.ledger["model.layers.1"]
    ledger.check()
    assert (len(rows), ledger.tokens.skipped, ledger.tokens.reseen, ledger.unmasked) == (10, 2, 0, 2)


# --- rows that end before the others


def ending(model, text, after):
    """Make token `text` follow the model's `after`-th token, in whatever row."""
    step = iter(range(100))

    def write(module, args, output):
        if next(step) == after:
            output[0, -1] = 0
            output[0, -1, text] = 1e4
        return output

    model.lm_head.register_forward_hook(write)
    return model


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("pad", [0, 1], ids=["own padding id", "padded with the end id"])
def test_a_row_that_has_ended_adds_no_tokens(tiny, cached, pad) -> None:
    """generate() feeds it end and padding ids, unmasked, until the last row ends."""
    model, rows = ending(tiny("llama"), 1, after=1), Rows(labels=["ended", "other"])
    prompt = torch.tensor([[4, 4, 5, 6], [7, 8, 9, 10]])
    with torch.no_grad(), capture(model, {1: rows}) as tap, tap.batch(labels=["ended", "other"]):
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=6,
            use_cache=cached,
            pad_token_id=pad,
            eos_token_id=1,
        )
    assert out[0, 4:].tolist()[1:] == [1] + [pad] * 4
    assert 1 not in out[1]
    assert rows.ids.bincount().tolist() == [4 + 1, 4 + 5]
    ledger = tap.ledger["model.layers.1"]
    ledger.check()
    assert ledger.tokens.masked == (4 if cached else 1 + 2 + 3 + 4)


def test_end_ids_inside_a_prompt_are_real_tokens(tiny) -> None:
    model, rows = tiny("llama"), Rows()
    ids = torch.tensor([[5, 1, 6, 1], [7, 8, 1, 1]])
    with torch.no_grad(), capture(model, {1: rows}) as tap, tap.batch():
        model(ids)
    assert len(rows) == 8


def test_a_single_stream_fed_token_by_token_keeps_its_end_ids(tiny) -> None:
    model, rows, cache = tiny("llama"), Rows(), None
    with torch.no_grad(), capture(model, {1: rows}) as tap, tap.batch():
        for token in (5, 1, 6, 1):
            cache = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).past_key_values
    assert len(rows) == 4
    assert tap.ledger["model.layers.1"].tokens.masked == 0


# --- masks that decoding cannot be read from


def test_a_static_cache_needs_the_prompts_own_mask(tiny) -> None:
    """It turns the mask into an attention bias; the batch's mask covers the prompt, and what follows is real."""
    model, rows = tiny("llama", eos_token_id=None), Rows()
    options = {"attention_mask": MASK, "do_sample": False, "max_new_tokens": 5, "cache_implementation": "static"}
    with torch.no_grad(), capture(model, {1: rows}) as tap:
        with pytest.raises(ShapeError, match=r"attention_mask; .*tap.batch\(mask=...\)"):
            model.generate(PROMPT, **options)
        with tap.batch(mask=MASK):
            out = model.generate(PROMPT, **options)
    ledger = tap.ledger["model.layers.1"]
    ledger.check()
    assert (out.shape, len(rows), ledger.tokens.masked, ledger.tokens.reseen) == ((2, 9), 14, 2, 0)


def test_a_mask_without_the_past_is_refused_while_decoding(tiny) -> None:
    model, ids = tiny("llama"), torch.arange(5, 11).reshape(2, 3)
    with torch.no_grad(), capture(model, {1: Moments()}) as tap, tap.batch():
        cache = model(ids, use_cache=True).past_key_values
        with pytest.raises(ShapeError, match=r"attention_mask; expected \[2, 6\]; got \[2, 3\]"):
            model(ids, past_key_values=cache, attention_mask=torch.ones(2, 3))
    assert tap.ledger["model.layers.1"].tokens.offered == 6


def test_another_number_of_sequences_in_one_batch_is_refused(tiny) -> None:
    model, ids = tiny("llama"), torch.arange(5, 11).reshape(2, 3)
    with torch.no_grad(), capture(model, {1: Moments()}) as tap, tap.batch():
        cache = model(ids[:1], use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        with pytest.raises(ShapeError, match=r"different numbers of sequences; expected 1; got 2"):
            model(ids, past_key_values=cache)
        with pytest.raises(TokenError, match="different sequences"):
            model(ids)
    tokens = tap.ledger["model.layers.1"].tokens
    assert (tokens.selected, tokens.rolled_back) == (3, 0)


@pytest.mark.parametrize("name", CACHES)
def test_the_cache_is_found_under_either_name(name: str) -> None:
    cache = SimpleNamespace(get_seq_length=lambda: 3)
    assert Call.of({"input_ids": torch.zeros(1, 2), name: cache}, Batch()).past == 3
