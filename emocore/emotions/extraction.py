"""Extract: from a model and texts to moments at every layer, in one pass, and to directions from those."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..capturing import Tap, capture
from ..directions import Directions
from ..errors import ArgumentError, CorpusError
from ..hookpoints import block_names, model_id, resolve
from ..ledger import Ledger
from ..moments import Moments
from ..monitoring import monitor
from ..rows import Rows
from ..tokens import Tokens
from . import corpus
from .texts import Progress, batches, encode, run

SKIP = 49  # the recipe reads a story from its 50th token on
ByPoint = dict[str, Moments]


class Extraction(Mapping[str, Directions]):
    """What `extract` found: moments by hook point, and as a mapping {hook point: Directions}, the paper's recipe on
    them.

    stories, story_tokens: labelled Moments, one row a story or a token; neutral, neutral_tokens the same without
    labels. groups: {group: stories of that group}, by topic for the default corpus. rows: {hook point: [N, D]} of
    pooled stories, with the place of their text in `places`, where `keep_rows` was asked for. seconds, tokens: how
    long the pass took.
    """

    def __init__(
        self, groups: dict[str, ByPoint], story_tokens: ByPoint, neutral: ByPoint, neutral_tokens: ByPoint, model: str
    ) -> None:
        self.groups = groups
        self.story_tokens, self.neutral, self.neutral_tokens = story_tokens, neutral, neutral_tokens
        self.model = model
        self.rows: dict[str, Tensor] = {}
        self.places: list[int] = []
        self.tokens, self.seconds = 0, 0.0
        self._stories: ByPoint | None = None
        self._fitted: dict[str, Directions] | None = None

    @property
    def stories(self) -> ByPoint:
        """Moments of the pooled stories of all groups together."""
        if self._stories is None:
            self._stories = merged(list(self.groups.values()))
        return self._stories

    @property
    def ledger(self) -> dict[str, dict[str, Ledger]]:
        """{hook point: {"stories", "story_tokens", "neutral", "neutral_tokens": Ledger}}."""
        kinds = ("stories", "story_tokens", "neutral", "neutral_tokens")
        return {
            name: {kind: getattr(self, kind)[name].ledger for kind in kinds if name in getattr(self, kind)}
            for name in self.stories
        }

    def only(self, groups: Sequence[str]) -> Extraction:
        """The extraction of some groups alone: what leaving others out, or a half, would have given."""
        unknown = [g for g in groups if g not in self.groups]
        if unknown or not groups:
            raise ArgumentError("groups", expected=list(self.groups), got=list(groups))
        return Extraction(
            {g: self.groups[g] for g in groups}, self.story_tokens, self.neutral, self.neutral_tokens, self.model
        )

    def fit(self, **options: Any) -> dict[str, Directions]:
        """Directions at every hook point; options are those of `Directions.fit`. The model is recorded in each."""
        neutral = self.neutral or None
        return Directions.fit(self.stories, neutral, provenance={"model": self.model}, **options)

    def _recipe(self) -> dict[str, Directions]:
        if self._fitted is None:
            self._fitted = self.fit()
        return self._fitted

    def __getitem__(self, hook_point: str) -> Directions:
        return self._recipe()[hook_point]

    def __iter__(self) -> Iterator[str]:
        return iter(self.stories)

    def __len__(self) -> int:
        return len(self.stories)


def merged(parts: Sequence[ByPoint]) -> ByPoint:
    """Moments of all parts together, hook point by hook point; the parts stay as they are."""
    whole = {name: m.copy() for name, m in parts[0].items()}
    for part in parts[1:]:
        for name, moments in part.items():
            whole[name].merge(moments)
    return whole


def extract(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    neutral: Sequence[str] | None = None,
    *,
    groups: Sequence[str] | None = None,
    layers: str | int | Sequence[str | int] | None = None,
    skip: int = SKIP,
    batch_size: int = 32,
    max_length: int | None = None,
    keep_rows: bool = False,
    progress: bool | None = None,
) -> Extraction:
    """Read labelled texts and neutral ones through `model`, accumulating moments at every chosen layer in one pass.

    Without `texts` it reads the stories that ship with emocore, grouped by topic, and the neutral half meant for
    fits. `layers`: None is the block at 2/3 of the depth, "all" every block, else numbers, names or globs. `skip`
    real tokens at the start of each text are left out. `groups`, one a text, keep apart what is later left out.
    `tokenizer` is a Hugging Face tokenizer, padding on either side. Raises ArgumentError, CorpusError,
    HookPointError, CaptureError.
    """
    if texts is None:
        found = corpus.stories()
        texts, labels = [s.text for s in found], [s.emotion for s in found]
        groups = [s.topic for s in found]
        neutral = [p.text for p in corpus.neutral("fit")] if neutral is None else neutral
    if not texts:
        raise CorpusError("texts: an empty corpus", way_out="Give texts with labels, or none for the default stories.")
    if labels is None or len(labels) != len(texts) or (groups is not None and len(groups) != len(texts)):
        raise ArgumentError(
            "labels, groups", expected=f"{len(texts)}, one a text", got=(len(labels or ()), len(groups or ()))
        )
    names = _layers(model, layers)
    words = tuple(dict.fromkeys(labels))
    groups = ["all"] * len(texts) if groups is None else list(groups)
    reader = _Reader(model, tokenizer, names, skip, batch_size, max_length, keep_rows, progress)
    by_group: dict[str, ByPoint] = {}
    token_parts: list[ByPoint] = []
    for group in dict.fromkeys(groups):
        places = [i for i, g in enumerate(groups) if g == group]
        by_group[group], tokens = reader.read(group, texts, places, words, labels)
        token_parts.append(tokens)
    empty: tuple[ByPoint, ByPoint] = ({}, {})
    plain = reader.read("neutral", neutral, list(range(len(neutral))), None, None) if neutral else empty
    run_ = Extraction(by_group, merged(token_parts), *plain, model=model_id(model))
    run_.rows = {name: torch.cat(parts) for name, parts in reader.rows.items()}
    run_.places, run_.tokens, run_.seconds = reader.places, reader.tokens, reader.seconds
    return run_


def _layers(model: nn.Module, layers: str | int | Sequence[str | int] | None) -> list[str]:
    blocks = block_names(model) if layers is None or layers == "all" else []
    if layers is None:
        return [blocks[two_thirds(len(blocks))]]
    return list(resolve(model, blocks if layers == "all" else layers))


def two_thirds(blocks: int) -> int:
    """Number of the block at two thirds of a model's depth, where its output has passed 2/3 of the blocks."""
    return max(round(blocks * 2 / 3) - 1, 0)


class _Reader:
    """Runs groups of texts under a tap, with sequence and token statistics side by side."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        names: Sequence[str],
        skip: int,
        batch_size: int,
        max_length: int | None,
        keep_rows: bool,
        progress: bool | None,
    ) -> None:
        self.model, self.tokenizer, self.names = model, tokenizer, names
        self.pooled, self.single = Tokens(skip=skip, pool="mean"), Tokens(skip=skip)
        self.batch_size, self.max_length, self.progress = batch_size, max_length, progress
        self.keep_rows = keep_rows
        self.rows: dict[str, list[Tensor]] = {name: [] for name in names} if keep_rows else {}
        self.places: list[int] = []
        self.tokens, self.seconds = 0, 0.0

    def read(
        self,
        what: str,
        texts: Sequence[str],
        places: Sequence[int],
        words: tuple[str, ...] | None,
        labels: Sequence[str] | None,
    ) -> tuple[ByPoint, ByPoint]:
        """Moments of one group: (one row a text, one row a token), by hook point."""
        kept = self.keep_rows and labels is not None

        def sinks() -> list[Any]:
            pooled, single = Moments(words, covariance=True), Moments(words, covariance=True)
            return [(pooled, self.pooled), (single, self.single), *([(Rows(), self.pooled)] if kept else [])]

        encoded = encode(self.model, self.tokenizer, [texts[i] for i in places], self.max_length)
        bar = Progress(what, sum(len(e.ids) for e in encoded), self.progress)
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode(), capture(self.model, self.names, sinks) as tap:
                for batch in batches(self.tokenizer, encoded, self.batch_size):
                    there = [places[i] for i in batch.places]
                    with tap.batch(labels=[labels[i] for i in there] if labels is not None else None):
                        run(self.model, batch)
                    bar.step(sum(len(encoded[i].ids) for i in batch.places))
                    if kept:
                        self.places += [
                            p
                            for p, i in zip(there, batch.places, strict=True)
                            if len(encoded[i].ids) > self.pooled.skip
                        ]
        finally:
            self.model.train(was_training)
        self.seconds += bar.close()
        self.tokens += bar.done
        return self._collect(tap, kept)

    def _collect(self, tap: Tap, kept: bool) -> tuple[ByPoint, ByPoint]:
        if kept:
            for name in self.names:
                self.rows[name].append(tap.sinks[name][2].rows)
        return {n: tap.sinks[n][0] for n in self.names}, {n: tap.sinks[n][1] for n in self.names}


def calibrate(
    model: nn.Module,
    tokenizer: Any,
    vectors: Mapping[str, Directions],
    texts: Sequence[str] | None = None,
    *,
    streams: Sequence[Sequence[str]] | None = None,
    batch_size: int = 32,
) -> dict[str, Directions]:
    """Calibrate directions on neutral text for monitoring: their scale from all its tokens, then EMAs and largest
    values.

    `texts` default to the neutral half that fits leave alone; each is one sequence. `streams` gives sequences in pieces
    instead, such as sentences, each encoded alone and fed in order, as a bidirectional encoder needs.
    """
    if texts is None and streams is None:
        texts = [p.text for p in corpus.neutral("calibration")]
    streams = [[text] for text in texts or ()] if streams is None else streams
    pieces = [(f"{i}", piece) for i, stream in enumerate(streams) for piece in stream]
    encoded = encode(model, tokenizer, [text for _, text in pieces])
    model.eval()
    with torch.inference_mode(), capture(model, list(vectors), lambda: Moments(covariance=True)) as tap:
        for batch in batches(tokenizer, encoded, batch_size):
            run(model, batch)
    scaled = {name: directions.calibrate(tap.sinks[name]) for name, directions in vectors.items()}
    with torch.inference_mode(), monitor(model, scaled) as watch:
        for turn in _turns(streams, batch_size):
            some = [encode(model, tokenizer, [text])[0] for _, text in turn]
            for batch in batches(tokenizer, some, batch_size):
                with watch.batch(requests=[str(turn[i][0]) for i in batch.places]):
                    run(model, batch)
    reference = watch.reference()
    return {name: directions.calibrate(reference[name]) for name, directions in scaled.items()}


def _turns(streams: Sequence[Sequence[str]], size: int) -> Iterator[list[tuple[int, str]]]:
    """Pieces to run together: of each stream its first, then of each its second, `size` streams at a time."""
    for start in range(0, len(streams), size):
        some = range(start, min(start + size, len(streams)))
        for turn in range(max(len(streams[i]) for i in some)):
            yield [(i, streams[i][turn]) for i in some if turn < len(streams[i])]
