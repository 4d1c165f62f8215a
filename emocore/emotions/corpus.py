"""The default corpus: one story per emotion and topic, neutral passages, and the rules they keep.

A topic file holds one JSON object a line, {"emotion", "text"}; all its stories are by one hand, so that style cancels
in the mean over labels. The word, its inflections and its close synonyms (`data/banned.txt`) never occur in a story.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..errors import CorpusError, near
from .words import WORDS

DATA = Path(__file__).parent / "data"
SHORTEST, LONGEST = 80, 130  # words of a story or passage
KINDS = ("dialogue", "exposition", "narration")


@dataclass(frozen=True)
class Story:
    """One story: its topic, the emotion it is about without naming it, and the text."""

    topic: str
    emotion: str
    text: str


@dataclass(frozen=True)
class Passage:
    """One neutral passage: dialogue, exposition or narration."""

    kind: str
    text: str


def topics(folder: Path = DATA / "stories") -> list[str]:
    """Names of the topic files in `folder`, sorted."""
    return sorted(path.stem for path in folder.glob("*.jsonl"))


def stories(names: Sequence[str] | None = None, folder: Path = DATA / "stories") -> list[Story]:
    """Stories of the named topics (default: all), topic by topic; raises CorpusError naming file, line and rule."""
    known = topics(folder)
    found: list[Story] = []
    for name in known if names is None else names:
        if name not in known:
            raise CorpusError(f"topic {name!r}: no such file in {folder}", way_out=near(name, known))
        found += read_topic(folder / f"{name}.jsonl")
    if not found:
        raise CorpusError(f"{folder}: holds no stories", way_out="Reinstall the package, or give texts and labels.")
    return found


def read_topic(path: Path) -> list[Story]:
    """Stories of one topic file in the order of WORDS; raises CorpusError for a broken line, a missing or doubled
    emotion.
    """
    found: dict[str, Story] = {}
    for number, entry in _entries(path, ("emotion", "text")):
        emotion = entry["emotion"]
        if emotion not in WORDS:
            raise CorpusError(f"{path}:{number}: unknown emotion {emotion!r}", way_out=near(emotion, WORDS))
        if emotion in found:
            raise CorpusError(f"{path}:{number}: a second story for {emotion!r}", way_out="Keep one.")
        found[emotion] = Story(path.stem, emotion, entry["text"])
    missing = [word for word in WORDS if word not in found]
    if missing:
        raise CorpusError(f"{path}: {len(missing)} emotions have no story", got=missing[:8])
    return [found[word] for word in WORDS]


def read_stories(path: Path) -> list[Story]:
    """Every story of a file that `emotions.generate` wrote, any number an emotion; raises CorpusError for a broken
    line.
    """
    return [Story(path.stem, entry["emotion"], entry["text"]) for _, entry in _entries(path, ("emotion", "text"))]


def neutral(part: str | None = None, path: Path = DATA / "neutral.jsonl") -> list[Passage]:
    """Neutral passages: all, or the halves "fit" and "calibration", each balanced over the three kinds."""
    found = [Passage(entry["kind"], entry["text"]) for _, entry in _entries(path, ("kind", "text"))]
    if part is None:
        return found
    if part not in ("fit", "calibration"):
        raise CorpusError("part", expected="None, 'fit' or 'calibration'", got=repr(part))
    odd = part == "calibration"
    return [p for i, p in enumerate(found) if (i // len(KINDS)) % 2 == odd]


def _entries(path: Path, keys: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read", got=error.strerror) from error
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise CorpusError(f"{path}:{number}: broken JSON", got=str(error)) from error
        if (
            not isinstance(entry, dict)
            or set(entry) != set(keys)
            or not all(isinstance(v, str) for v in entry.values())
        ):
            raise CorpusError(f"{path}:{number}: keys", expected=keys, got=line[:60])
        yield number, entry


# --- the rules of a story


@cache
def banned_forms() -> dict[str, tuple[str, ...]]:
    """Forms that a story about each emotion must not hold; a trailing * stands for any ending."""
    forms: dict[str, tuple[str, ...]] = {}
    for line in (DATA / "banned.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            emotion, _, listed = line.partition(":")
            forms[emotion] = tuple(form.strip() for form in listed.split(","))
    return forms


@cache
def _pattern(emotion: str) -> re.Pattern[str]:
    forms = (*banned_forms().get(emotion, ()), emotion)
    choices = (re.escape(f[:-1]) + r"\w*" if f.endswith("*") else re.escape(f) for f in forms)
    return re.compile(r"(?<![\w-])(?:" + "|".join(choices) + r")(?!\w)", re.IGNORECASE)


def banned_words(emotion: str, text: str) -> list[str]:
    """Words of `text` that name `emotion`, in order.

    >>> banned_words("calm", "She stayed calm, even placidly so.")
    ['calm', 'placidly']
    """
    return _pattern(emotion).findall(text)


def faults(story: Story, words: tuple[int, int] = (SHORTEST, LONGEST)) -> list[str]:
    """What is wrong with a story: its length in words, or words that name its emotion; empty when nothing is."""
    found = []
    length = len(story.text.split())
    if not words[0] <= length <= words[1]:
        found.append(f"{length} words, not {words[0]}-{words[1]}")
    if named := banned_words(story.emotion, story.text):
        found.append(f"names the emotion: {', '.join(named)}")
    return found


def shingles(text: str, n: int = 8) -> set[tuple[str, ...]]:
    """Every run of `n` words of a text, lower case: two texts that share one are near-duplicates."""
    words = re.findall(r"[\w']+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
