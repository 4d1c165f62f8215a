"""The default corpus keeps its own rules."""

import collections
import json
import re
from pathlib import Path

import pytest

from emocore.emotions import CLUSTERS, WORDS, cluster_of, corpus, valence
from emocore.errors import CorpusError

HELD_BACK = Path(__file__).parent / "data"
STORIES = corpus.stories()
HELD_STORIES = corpus.stories(["library"], HELD_BACK / "stories")
HELD_PASSAGES = corpus.neutral(path=HELD_BACK / "neutral_heldout.jsonl")


def test_words_are_the_171_of_the_study() -> None:
    assert len(WORDS) == len(set(WORDS)) == 171
    assert len(CLUSTERS) == 10
    assert cluster_of("on edge") == "Fear and Overwhelm"
    assert (valence("blissful"), valence("worthless"), valence("sleepy")) == (1, -1, 0)


def test_one_story_per_emotion_and_topic() -> None:
    topics = corpus.topics()
    assert len(topics) >= 4
    assert len(STORIES) == 171 * len(topics)
    assert set(collections.Counter((s.topic, s.emotion) for s in STORIES).values()) == {1}


@pytest.mark.parametrize("topic", corpus.topics())
def test_stories_keep_length_and_never_name_their_emotion(topic: str) -> None:
    broken = {s.emotion: faults for s in STORIES if s.topic == topic and (faults := corpus.faults(s))}
    assert not broken


def test_banned_forms_cover_every_word_and_catch_the_word_itself() -> None:
    assert list(corpus.banned_forms()) == list(WORDS)
    for word in WORDS:
        assert corpus.banned_words(word, f"They were {word}, all of them.")
    assert corpus.banned_words("kind", "It was kindly meant, kindness itself.") == ["kindly", "kindness"]
    assert not corpus.banned_words("mad", "She made a nomad's tent.")


def test_what_is_held_back_keeps_the_rules_too() -> None:
    assert len(HELD_STORIES) == 171
    assert not {s.emotion: faults for s in HELD_STORIES if (faults := corpus.faults(s))}
    assert collections.Counter(p.kind for p in HELD_PASSAGES) == dict.fromkeys(corpus.KINDS, 20)
    assert "library" not in corpus.topics()


def test_no_near_duplicates() -> None:
    texts = [(s.topic, s.emotion, s.text) for s in STORIES + HELD_STORIES]
    texts += [("neutral", str(i), p.text) for i, p in enumerate(corpus.neutral() + HELD_PASSAGES)]
    owner: dict[tuple[str, ...], tuple[str, str]] = {}
    shared = []
    for topic, emotion, text in texts:
        for shingle in corpus.shingles(text):
            before = owner.setdefault(shingle, (topic, emotion))
            if before != (topic, emotion):
                shared.append((before, (topic, emotion), " ".join(shingle)))
    assert not shared


def test_no_two_stories_of_a_topic_open_alike() -> None:
    opened = collections.Counter((s.topic, tuple(s.text.lower().split()[:4])) for s in STORIES)
    assert opened.most_common(1)[0][1] == 1


def test_length_does_not_tell_the_emotion() -> None:
    """Mean length per emotion stays within a quarter of the mean over all."""
    lengths: dict[str, list[int]] = collections.defaultdict(list)
    for s in STORIES:
        lengths[s.emotion].append(len(s.text.split()))
    means = [sum(v) / len(v) for v in lengths.values()]
    overall = sum(means) / len(means)
    assert max(abs(m - overall) for m in means) < overall / 4


def test_the_voice_does_not_lean_one_way() -> None:
    """Between a third and two thirds of the stories are told in the first person, in every topic."""
    spoken = re.compile(r'"[^"]*"')
    for topic in corpus.topics():
        texts = [spoken.sub("", s.text) for s in STORIES if s.topic == topic]
        share = sum(bool(re.search(r"\b(I|my|me)\b", text)) for text in texts) / len(texts)
        assert 1 / 3 <= share <= 2 / 3, topic


def test_vocabulary_is_wide_and_no_word_carries_an_emotion_alone() -> None:
    """Some 200,000 words hold many thousand distinct ones; one in most of an emotion's stories is common."""
    counts: collections.Counter[str] = collections.Counter()
    holding: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for s in STORIES:
        words = re.findall(r"[a-z']+", s.text.lower())
        counts.update(words)
        holding[s.emotion].update(set(words))
    assert len(counts) > 8_000
    common = {word for word, _ in counts.most_common(1_000)}
    topics = len(corpus.topics())
    telling = {
        (e, w): n for e, found in holding.items() for w, n in found.items() if n > 3 / 4 * topics and w not in common
    }
    assert not telling


def test_neutral_is_balanced_and_its_halves_are_apart() -> None:
    passages = corpus.neutral()
    assert len(passages) >= 100
    counts = collections.Counter(p.kind for p in passages)
    assert set(counts) == set(corpus.KINDS)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert all(corpus.SHORTEST <= len(p.text.split()) <= corpus.LONGEST for p in passages)
    fit, calibration = corpus.neutral("fit"), corpus.neutral("calibration")
    assert len(fit) + len(calibration) == len(passages)
    assert not {p.text for p in fit} & {p.text for p in calibration}
    for half in (fit, calibration):
        kinds = collections.Counter(p.kind for p in half)
        assert max(kinds.values()) - min(kinds.values()) <= 1


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("{broken", "broken JSON"),
        ('{"emotion": "calm"}', "keys"),
        ('{"emotion": "clam", "text": "x"}', "Did you mean 'calm'"),
        ('{"emotion": "calm", "text": "x"}\n{"emotion": "calm", "text": "y"}', "second story"),
        ('{"emotion": "calm", "text": "x"}', "170 emotions have no story"),
    ],
)
def test_broken_files_name_file_line_and_rule(tmp_path, line: str, rule: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(CorpusError, match=rule) as raised:
        corpus.read_topic(path)
    assert "bad.jsonl" in str(raised.value)


def test_faults_name_what_is_wrong() -> None:
    text = " ".join(["word"] * 79)
    assert corpus.faults(corpus.Story("t", "calm", text)) == ["79 words, not 80-130"]
    assert corpus.faults(corpus.Story("t", "calm", text + " serenely")) == ["names the emotion: serenely"]


def test_unknown_topics_and_missing_folders(tmp_path) -> None:
    with pytest.raises(CorpusError, match="no such file"):
        corpus.stories(["lettre"])
    with pytest.raises(CorpusError, match="holds no stories"):
        corpus.stories(folder=tmp_path)


def test_files_are_one_json_object_a_line() -> None:
    for path in (corpus.DATA / "stories").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            assert json.loads(line).keys() == {"emotion", "text"}
            assert line.isascii(), path
