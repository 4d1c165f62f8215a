"""Stories by a model: rules kept, counts exact, resumable. The model is tiny and random: its words mean nothing."""

import collections
import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from emocore import cli
from emocore.emotions import WORDS, corpus, generate
from emocore.emotions.prompts import prompt
from emocore.errors import ArgumentError, CorpusError

VOCABULARY = ["<unk>", "</s>", "calm", "calmly", "tea", "rain", "walks", "she", "he", "door", "and", "the"]
ANY = (1, 400)


@pytest.fixture(scope="module")
def writer():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config), tokenizer


def test_texts_keep_the_rules_and_are_counted(writer, tmp_path) -> None:
    made = generate(
        *writer, ["a letter"], tmp_path, emotions=["calm", "sad"], per_topic=3, words=ANY, max_new_tokens=6, tries=60
    )
    told = corpus.read_stories(tmp_path / "a_letter.jsonl")
    assert made.kept == 6
    assert collections.Counter(s.emotion for s in told) == {"calm": 3, "sad": 3}
    assert not any(corpus.faults(s, ANY) for s in told)
    # of 12 equally likely words two are banned for "calm", so some text must have been rejected for it
    assert made.rejected["names the emotion"] > 0
    assert "kept 6" in str(made)


def test_the_same_seed_writes_the_same_texts(writer, tmp_path) -> None:
    texts = []
    for folder in ("one", "two"):
        generate(
            *writer,
            ["tea"],
            tmp_path / folder,
            emotions=["sad"],
            per_topic=4,
            words=ANY,
            max_new_tokens=5,
            tries=60,
            seed=3,
        )
        texts.append((tmp_path / folder / "tea.jsonl").read_text())
    assert texts[0] == texts[1]


def test_a_run_goes_on_where_it_stopped(writer, tmp_path) -> None:
    options = {"emotions": ["sad", "mad"], "per_topic": 2, "words": ANY, "max_new_tokens": 5, "tries": 60}
    path = tmp_path / "rain.jsonl"
    path.write_text(json.dumps({"emotion": "mad", "text": "he walks and walks"}) + '\n{"emotion": "sa')
    made = generate(*writer, ["rain"], tmp_path, **options)
    told = corpus.read_stories(path)
    assert told[0].text == "he walks and walks"
    assert collections.Counter(s.emotion for s in told) == {"sad": 2, "mad": 2}
    assert made.kept == 4
    before = path.read_text()
    assert generate(*writer, ["rain"], tmp_path, **options).kept == 4
    assert path.read_text() == before


def test_a_text_that_keeps_failing_stops_with_the_counts_and_keeps_the_good(writer, tmp_path) -> None:
    (tmp_path / "door.jsonl").write_text('{"emotion": "sad", "text": "the door"}\n')
    with pytest.raises(CorpusError, match=r"kept 1, rejected 3 \(words"):
        generate(
            *writer, ["door"], tmp_path, emotions=["sad"], per_topic=2, words=(300, 400), max_new_tokens=4, tries=3
        )
    assert len(corpus.read_stories(tmp_path / "door.jsonl")) == 1


def test_neutral_texts_have_no_emotion(writer, tmp_path) -> None:
    generate(*writer, ["tea"], tmp_path, kind="neutral", per_topic=2, words=ANY, max_new_tokens=4, tries=60)
    assert {s.emotion for s in corpus.read_stories(tmp_path / "tea.jsonl")} == {"neutral"}


def test_a_chat_template_is_used(writer, tmp_path) -> None:
    model, tokenizer = writer
    tokenizer.chat_template = "{% for m in messages %}she {{ m['content'] }} he{% endfor %}"
    try:
        made = generate(
            model, tokenizer, ["tea"], tmp_path, emotions=["sad"], per_topic=1, words=ANY, max_new_tokens=4, tries=60
        )
    finally:
        tokenizer.chat_template = None
    assert made.kept == 1


def test_sampling_leaves_the_random_state_and_the_mode_alone(writer, tmp_path) -> None:
    model, tokenizer = writer
    model.train()
    before = torch.random.get_rng_state()
    generate(model, tokenizer, ["tea"], tmp_path, emotions=["sad"], per_topic=1, words=ANY, max_new_tokens=4, tries=60)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
    model.eval()


def test_bad_arguments(writer, tmp_path) -> None:
    with pytest.raises(ArgumentError, match="at least one"):
        generate(*writer, [], tmp_path)
    with pytest.raises(ArgumentError, match="'story'"):
        generate(*writer, ["tea"], tmp_path, kind="poem", emotions=["sad"])
    with pytest.raises(ArgumentError, match="max_new_tokens"):
        generate(*writer, ["tea"], tmp_path, emotions=["sad"], max_new_tokens=500)


def test_prompts_forbid_the_word_and_its_synonyms() -> None:
    for word in WORDS:
        asked = prompt("story", "a letter", word)
        assert f"Never write '{word}'" in asked
        assert corpus.banned_forms()[word][0].rstrip("*") in asked
    assert "Nothing is felt" in prompt("neutral", "a letter", "neutral")


def test_command(writer, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = writer
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    capsys.readouterr()
    arguments = ["stories", "--model", str(tmp_path / "model"), "--topics", "tea", "--per-topic", "1"]
    # twelve-word babble is never 80-130 words: the command ends with the counts and status 1
    assert cli.main([*arguments, "--kind", "neutral", "--out", str(tmp_path / "out")]) == 1
    assert "rejected 8" in capsys.readouterr().err
