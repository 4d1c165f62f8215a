"""Figures of the default corpus: AUROC by block, method and number of topics, on a topic held back; what is confused.

Run it with `make corpus`. The held-back topic stands in tests/data and is used for evaluation alone.
"""

from __future__ import annotations

import collections
import random
import re
from pathlib import Path

import torch

from emocore import emotions
from emocore.demo import load_model, table, title
from emocore.emotions import corpus, evaluation, geometry
from emocore.emotions.extraction import Extraction, two_thirds
from emocore.emotions.templates import template_texts
from emocore.hookpoints import block_names

HELD_BACK = Path(__file__).parent.parent / "tests" / "data" / "stories"
METHODS = ("difference", "whitened")


class Report:
    """One pass over the corpus and the held-back topic, and the tables made from it."""

    def __init__(self) -> None:
        self.model, self.tokenizer, _ = load_model(None)
        self.blocks = block_names(self.model)
        self.lexical = next(n for n, m in self.model.named_modules() if m is self.model.get_input_embeddings())
        self.main = self.blocks[two_thirds(len(self.blocks))]
        self.held = corpus.stories(folder=HELD_BACK)
        told = corpus.stories()
        self.labels, self.groups = [s.emotion for s in told], [s.topic for s in told]
        self.found = self._extract([s.text for s in told], self.labels, self.groups, skip=49)
        self.unseen = self._extract([s.text for s in self.held], [s.emotion for s in self.held], None, skip=49)

    def _extract(self, texts: list[str], labels: list[str], groups: list[str] | None, skip: int) -> Extraction:
        neutral = [p.text for p in corpus.neutral("fit")] if groups else None
        layers = [self.lexical, *self.blocks]
        return emotions.extract(
            self.model, self.tokenizer, texts, labels, neutral, groups=groups, layers=layers, skip=skip, keep_rows=True
        )

    def judge(self, run: Extraction, name: str, **options: object) -> evaluation.Identification:
        """Directions fitted on `run`, judged on the held-back topic at one hook point."""
        vectors = run.fit(**options)[name].calibrate(run.stories[name])
        truth = vectors.index([self.held[i].emotion for i in self.unseen.places])
        return evaluation.identify(vectors.score(self.unseen.rows[name], kind="z"), truth)

    def by_block(self) -> None:
        """AUROC on the held-back topic by block and method, beside templates that name the word."""
        title(f"Held-back topic, fitted on all {len(self.found.groups)} topics: mean AUROC (top ten)")
        texts, named = template_texts(tuple(dict.fromkeys(self.labels)))
        control = self._extract(texts, named, None, skip=0)
        rows = []
        for name in self.found:
            judged = [self.judge(self.found, name, method=m) for m in METHODS]
            rows.append(
                [
                    "words alone" if name == self.lexical else name,
                    *(f"{j.auroc:.3f} ({j.top10:.2f})" for j in judged),
                    f"{self.judge(control, name).auroc:.3f}",
                ]
            )
        table(["block", *METHODS, "named"], rows)

    def by_topics(self, draws: int = 6) -> None:
        """AUROC on the held-back topic by number of topics fitted on, averaged over random draws."""
        title(f"Held-back topic by number of topics, at {self.main}: mean AUROC")
        names, rng, rows = list(self.found.groups), random.Random(0), []
        for count in (1, 2, 4, 8, len(names)):
            if count > len(names):
                continue
            drawn = [rng.sample(names, count) for _ in range(1 if count == len(names) else draws)]
            cells = []
            for method in METHODS:
                if method == "whitened" and count == 1:
                    cells.append("-")
                    continue
                areas = [self.judge(self.found.only(some), self.main, method=method).auroc for some in drawn]
                cells.append(f"{sum(areas) / len(areas):.3f}")
            rows.append([str(count), *cells])
        table(["topics", *METHODS], rows)

    def geometry(self) -> None:
        """Shares of the first components, and how well each tells positive from negative clusters."""
        title(f"Geometry at {self.main}, difference of means")
        vectors = self.found[self.main]
        scores, shares = geometry.components(vectors, 4)
        signs = torch.tensor([emotions.valence(w) for w in vectors.names])
        rows = []
        for i in range(4):
            area = geometry.auroc(scores[signs != 0, i], signs[signs != 0] > 0)
            order = scores[:, i].argsort()
            low, high = (", ".join(vectors.names[j] for j in at) for at in (order[:4], order.flip(0)[:4]))
            rows.append([f"PC{i + 1}", f"{shares[i]:.0%}", f"{max(area, 1 - area):.2f}", f"{low} ... {high}"])
        table(["", "share", "valence AUC", "ends"], rows)

    def confusions(self, k: int = 15) -> None:
        """Pairs most often mistaken: the label that scores highest instead of the right one, over topics left out."""
        title(f"Most confused, leaving one topic out, whitened at {self.main}")
        wrong: collections.Counter[tuple[str, str]] = collections.Counter()
        for group in self.found.groups:
            rest = self.found.only([g for g in self.found.groups if g != group])
            vectors = rest.fit(method="whitened")[self.main].calibrate(rest.stories[self.main])
            rows, truth = evaluation.group_rows(self.found, self.main, vectors, self.labels, self.groups, group)
            for right, best in zip(truth, vectors.score(rows, kind="z").argmax(1).tolist(), strict=True):
                if right != best:
                    wrong[vectors.names[right], vectors.names[best]] += 1
        for (right, best), n in wrong.most_common(k):
            print(f"{n:>3} of {len(self.found.groups)}  {right} read as {best}")

    def vocabulary(self) -> None:
        """Sizes, lengths and voices of the corpus."""
        title("The corpus")
        told = corpus.stories()
        lengths = [len(s.text.split()) for s in told]
        words = collections.Counter(w for s in told for w in re.findall(r"[a-z']+", s.text.lower()))
        first = sum(bool(re.search(r"\b(I|my|me)\b", re.sub(r'"[^"]*"', "", s.text))) for s in told)
        print(f"{len(told)} stories, {sum(lengths):,} words, {len(words):,} distinct")
        print(f"{min(lengths)}-{max(lengths)} words a story")
        print(f"first person {first / len(told):.0%}; {len(corpus.neutral())} neutral passages")


if __name__ == "__main__":
    report = Report()
    report.vocabulary()
    report.by_block()
    report.by_topics()
    report.geometry()
    report.confusions()
