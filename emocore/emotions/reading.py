"""Read: score texts token by token, and show what they carry."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..capturing import capture
from ..directions import Directions
from ..errors import ArgumentError
from ..sinks import Observed
from .texts import Encoded, batches, encode, run
from .words import CLUSTERS


@dataclass(frozen=True)
class Reading:
    """Scores of texts at one hook point: per token [T, K] and per text [N, K] (the mean over its tokens from `skip`
    on).

    Scores are z where the directions are calibrated, else centered.
    """

    names: tuple[str, ...]
    pieces: tuple[tuple[str, ...], ...]
    tokens: tuple[Tensor, ...]
    scores: Tensor
    hook_point: str

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """The k highest names of every text, with their scores."""
        values, at = self.scores.topk(min(k, len(self.names)), dim=1)
        return [
            [(self.names[j], float(v)) for v, j in zip(row, where, strict=True)]
            for row, where in zip(values, at.tolist(), strict=True)
        ]

    def families(self, text: int = 0) -> list[tuple[str, float]]:
        """Clusters of the emotion words by their members' mean score, highest first; for names that are such words."""
        known = {n: i for i, n in enumerate(self.names)}
        means = {
            family: float(self.scores[text, [known[w] for w in words if w in known]].mean())
            for family, words in CLUSTERS.items()
            if any(w in known for w in words)
        }
        if not means:
            raise ArgumentError("families: none of the names is one of the 171 words", got=self.names[:4])
        return sorted(means.items(), key=lambda item: -item[1])

    def rank(self, name: str, text: int = 0) -> int:
        """Place of `name` among all names for one text; 1 is the highest."""
        if name not in self.names:
            raise ArgumentError("name", expected="one of the directions", got=repr(name))
        return int((self.scores[text] > self.scores[text, self.names.index(name)]).sum()) + 1

    def line(self, name: str, text: int = 0, colour: bool | None = None) -> str:
        """One text with every token shaded by its score for `name`: red above the neutral mean, blue below."""
        at = self.names.index(name)
        if colour is None:
            colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        values = self.tokens[text][:, at].tolist()
        spread = max(max(map(abs, values), default=1.0), 1e-9)
        out = ""
        for piece, value in zip(self.pieces[text], values, strict=True):
            out += _shade(piece, value / spread) if colour else _mark(piece, value / spread)
        return out.strip()

    def show(self, k: int = 5, file: Any = None) -> None:
        """Print every text's highest names and its tokens shaded by the first."""
        out = file or sys.stdout
        for i, best in enumerate(self.top(k)):
            print("  ".join(f"{name} {value:+.2f}" for name, value in best), file=out)
            print(f"  {self.line(best[0][0], i)}", file=out)


def _shade(piece: str, share: float) -> str:
    """ANSI background from white to red (above) or blue (below)."""
    fade = 255 - int(170 * math.sqrt(min(abs(share), 1.0)))
    r, g, b = (255, fade, fade) if share > 0 else (fade, fade, 255)
    return f"\x1b[38;2;0;0;0;48;2;{r};{g};{b}m{piece}\x1b[0m"


def _mark(piece: str, share: float) -> str:
    """Plain-text shading: strong tokens stand in brackets."""
    return f"{piece[: len(piece) - len(piece.lstrip())]}[{piece.lstrip()}]" if share > 0.6 else piece


class _TokenRows:
    """Sink that keeps every sequence's token rows and ranks of one forward."""

    def __init__(self) -> None:
        self.seen: Observed | None = None

    def observe(self, observed: Observed) -> None:
        self.seen = observed


def read(
    model: nn.Module,
    tokenizer: Any,
    texts: str | Sequence[str],
    vectors: Directions | Mapping[str, Directions],
    *,
    skip: int = 0,
    batch_size: int = 32,
    max_length: int | None = None,
) -> Any:
    """Read texts through `model` and score every token: a Reading, or {hook point: Reading} for a mapping of vectors.

    A text's score is the mean over its tokens from rank `skip` on (all of them where it is shorter). Raises
    ArgumentError, HookPointError, ShapeError.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    several = {vectors.hook_point or "": vectors} if isinstance(vectors, Directions) else dict(vectors)
    sinks = {name: _TokenRows() for name in several}
    encoded = encode(model, tokenizer, texts, max_length)
    found: dict[str, list[Tensor]] = {name: [torch.empty(0)] * len(texts) for name in several}
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), capture(model, sinks) as tap:
            for batch in batches(tokenizer, encoded, batch_size):
                with tap.batch():
                    run(model, batch)
                for name, directions in several.items():
                    seen = sinks[name].seen
                    assert seen is not None
                    kind = "z" if directions.calibration else "centered"
                    scores = directions.score(seen.rows, kind=kind).cpu()
                    for row, place in enumerate(batch.places):
                        found[name][place] = scores[seen.whose.sequence == row]
    finally:
        model.train(was_training)
    pieces = tuple(tuple(_pieces(text, one)) for text, one in zip(texts, encoded, strict=True))
    readings = {
        name: Reading(
            directions.names,
            pieces,
            tuple(found[name]),
            torch.stack([s[skip if len(s) > skip else 0 :].mean(0) for s in found[name]]),
            name,
        )
        for name, directions in several.items()
    }
    return next(iter(readings.values())) if isinstance(vectors, Directions) else readings


def _pieces(text: str, encoded: Encoded) -> Iterator[str]:
    """The text cut into one piece a token, the space before a word with the word; special tokens get nothing."""
    done = 0
    for start, stop in encoded.spans:
        yield text[done:stop] if stop > start else ""
        done = max(done, stop)
