"""Generate: stories by any causal model, kept to the corpus's rules and resumable at the story."""

from __future__ import annotations

import collections
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import ArgumentError, CorpusError
from .corpus import LONGEST, SHORTEST, Story, faults, read_stories
from .prompts import prompt
from .texts import Progress, batches, encode, longest
from .words import WORDS


class Job(NamedTuple):
    """One text that is wanted."""

    topic: str
    emotion: str


@dataclass
class Generated:
    """What came of a run: texts `kept` (those found on disk included), and how often each rule `rejected` one."""

    kept: int = 0
    rejected: collections.Counter[str] = field(default_factory=collections.Counter)

    def __str__(self) -> str:
        rules = ", ".join(f"{rule} {n}" for rule, n in self.rejected.most_common())
        return f"kept {self.kept}, rejected {sum(self.rejected.values())}" + (f" ({rules})" if rules else "")


def generate(
    model: nn.Module,
    tokenizer: Any,
    topics: Sequence[str],
    out: str | os.PathLike[str],
    *,
    emotions: Sequence[str] = WORDS,
    per_topic: int = 12,
    kind: str = "story",
    words: tuple[int, int] = (SHORTEST, LONGEST),
    batch_size: int = 8,
    tries: int = 8,
    seed: int = 0,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    progress: bool | None = None,
) -> Generated:
    """Have a causal model write `per_topic` texts per emotion and topic into `out`/<topic>.jsonl, and keep those
    within the rules.

    A text that names its emotion or has not `words` words is sampled again, at most `tries` times; a run that is
    interrupted goes on where it stopped. kind "story", "dialogue" or "neutral" (which takes no emotion). The
    tokenizer's chat template is used where it has one. Raises ArgumentError, and CorpusError with the counts when a
    text keeps failing; all that was good is on disk then.
    """
    if not topics or per_topic < 1 or tries < 1:
        raise ArgumentError("topics, per_topic, tries", expected="at least one", got=(len(topics), per_topic, tries))
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    feelings = ["neutral"] if kind == "neutral" else list(emotions)
    result = Generated()
    jobs: list[Job] = []
    for topic in topics:
        path = _path(folder, topic)
        _mend(path)
        there = collections.Counter(story.emotion for story in read_stories(path)) if path.exists() else {}
        jobs += [Job(topic, e) for e in feelings for _ in range(per_topic - there.get(e, 0))]
        result.kept += sum(there.values())
    writer = _Writer(model, tokenizer, kind, seed, temperature, max_new_tokens)
    bar = Progress("texts", len(jobs), progress, unit="texts")
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(jobs), batch_size):
            waiting = jobs[start : start + batch_size]
            for turn in range(tries):
                waiting = _turn(writer, waiting, start, turn, folder, words, result)
                if not waiting:
                    break
            bar.step(min(batch_size, len(jobs) - start) - len(waiting))
            if waiting:
                raise CorpusError(
                    f"generate: {waiting[0].emotion!r} on {waiting[0].topic!r} broke the rules {tries} times",
                    got=result,
                    way_out=f"What was good is in {folder}; give more tries, or another model, and run again.",
                )
    finally:
        model.train(was_training)
        bar.close()
    return result


def _turn(
    writer: _Writer,
    waiting: Sequence[Job],
    start: int,
    turn: int,
    folder: Path,
    words: tuple[int, int],
    result: Generated,
) -> list[Job]:
    """Sample every waiting text once; keep what is good, return the rest."""
    again: list[Job] = []
    for job, text in zip(waiting, writer.write(waiting, start, turn), strict=True):
        broken = faults(Story(job.topic, job.emotion, text), words)
        if broken:
            result.rejected.update(re.sub(r"[:,].*", "", rule).lstrip("0123456789 ") for rule in broken)
            again.append(job)
            continue
        _append(_path(folder, job.topic), {"emotion": job.emotion, "text": text})
        result.kept += 1
    return again


class _Writer:
    """Samples texts in batches from a seed that depends on nothing but the place of the batch and the turn."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, kind: str, seed: int, temperature: float, max_new_tokens: int
    ) -> None:
        self.model, self.tokenizer, self.kind, self.seed = model, tokenizer, kind, seed
        self.options = {"do_sample": True, "temperature": temperature, "max_new_tokens": max_new_tokens, "top_p": 0.95}
        self.limit = max_new_tokens
        self._chat = bool(getattr(tokenizer, "chat_template", None))

    def write(self, jobs: Sequence[Job], start: int, turn: int) -> Iterator[str]:
        """One text a job."""
        prompts = [self._asked(prompt(self.kind, job.topic, job.emotion)) for job in jobs]
        # a chat template has written its special tokens itself
        encoded = encode(self.model, self.tokenizer, prompts, special=not self._chat)
        room = longest(self.model, self.tokenizer) - max(len(e.ids) for e in encoded)
        if room < self.limit:
            raise ArgumentError("max_new_tokens", expected=f"at most {room} after the prompt", got=self.limit)
        texts = [""] * len(jobs)
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(hash((self.seed, start, turn)) & 0x7FFFFFFF)
            for batch in batches(self.tokenizer, encoded, len(jobs), left=True):
                device = next(self.model.parameters()).device
                made = self.model.generate(  # type: ignore[operator]
                    input_ids=batch.input_ids.to(device),
                    attention_mask=batch.attention_mask.to(device),
                    pad_token_id=batch.pad,
                    **self.options,
                )
                new = made[:, batch.input_ids.shape[1] :].tolist()
                for place, ids in zip(batch.places, new, strict=True):
                    texts[place] = _paragraph(self.tokenizer.decode(ids, skip_special_tokens=True))
        yield from texts

    def _asked(self, text: str) -> str:
        if self._chat:
            turn = [{"role": "user", "content": text}]
            return str(self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
        return text + "\n\n"


def _paragraph(text: str) -> str:
    """The first paragraph with words in it, on one line, without quotation marks around it all."""
    for part in re.split(r"\n\s*\n", text.strip()):
        line = " ".join(part.split())
        if re.search(r"\w", line):
            return line
    return ""


def _path(folder: Path, topic: str) -> Path:
    return folder / (re.sub(r"[^\w-]+", "_", topic.strip().lower()) + ".jsonl")


def _append(path: Path, entry: dict[str, str]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _mend(path: Path) -> None:
    """Cut off a last line that a crash left without its end."""
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        path.write_bytes(data[: data.rfind(b"\n") + 1])
