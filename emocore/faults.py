"""Faults: what the device found wrong in forwards that nobody waited for, as the errors that the host raises later."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .control import Fault, Station
from .errors import CaptureError, EmocoreError, LabelError, TokenError


def error_of(word: int, points: Sequence[str], stations: Tensor) -> EmocoreError:
    """What the bits of Fault in a word say, of `stations` [S, 16] at hook points [S]; the gravest of several."""
    if word & Fault.OVERRUN:
        return overrun()
    if word & Fault.PADDING:
        return TokenError(
            "attention_mask: none was given, yet a batch held the padding id",
            way_out="Pass the tokenizer's attention_mask to the model, or tap.batch(mask=...).",
        )
    if word & Fault.UNLABELLED:
        return LabelError("labels: a labelled sink saw a forward outside tap.batch", way_out="Open tap.batch.")
    return _missed(points, stations[:, Station.MISSED].tolist())


def _missed(points: Sequence[str], times: Sequence[int]) -> CaptureError:
    """The first hook point that did not run as declared, and in how many forwards."""
    name, several = next((name, n) for name, n in zip(points, times, strict=True) if n)
    return CaptureError(
        f"hook point {name!r}: did not run once in {several} forward(s), which were not committed",
        expected="1 time",
        way_out="Give optional=True for a module that may be skipped, capture(fires=...) for one that is shared; "
        "hooks on a model that was compiled before never run.",
    )


def overrun() -> CaptureError:
    """A graph was replayed where there was no room for its rows."""
    return CaptureError(
        "capture: a replay has written over rows that were not yet copied to the store; those are dropped",
        way_out="Call tap.gate() before every replay of a graph that was recorded inside the capture.",
    )
