"""The typed errors: each names the argument, what was expected, what came, and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EmocoreError(Exception):
    """Base of every error that emocore raises on purpose."""

    def __init__(self, what: str, *, expected: object = None, got: object = None, way_out: str = "") -> None:
        parts = [what]
        if expected is not None:
            parts.append(f"expected {expected}")
        if got is not None:
            parts.append(f"got {got}")
        text = "; ".join(parts)
        super().__init__(f"{text}. {way_out}" if way_out else text)


class ArgumentError(EmocoreError, ValueError):
    """An argument of the wrong kind, range or combination."""


class ShapeError(EmocoreError, ValueError):
    """A tensor whose shape or width does not fit."""


class LabelError(EmocoreError, ValueError):
    """A label that is unknown, out of range, missing, or given where none is kept."""


class HookPointError(EmocoreError, LookupError):
    """A hook point that the model does not have, or that cannot be read."""


class CaptureError(EmocoreError, RuntimeError):
    """A forward pass that could not be captured as declared."""


class TokenError(EmocoreError, ValueError):
    """Tokens that cannot be told apart: no mask where padding is seen, or rules that do not apply."""


class LedgerError(EmocoreError, RuntimeError):
    """Counts that do not add up: something offered is neither used nor accounted for."""


class PrecisionError(EmocoreError, ArithmeticError):
    """A result beyond the numerical contract."""


class PrecisionWarning(UserWarning):
    """A read-out whose error bound exceeds the numerical contract; nothing accumulated is withheld."""


class FitError(EmocoreError, ValueError):
    """Statistics that cannot carry the asked-for directions."""


class CalibrationError(EmocoreError, ValueError):
    """A score or threshold without a reference of its own kind, or with too small a one."""


class StoreError(EmocoreError, OSError):
    """A file that could not be written, or is not what it claims to be."""


class BackpressureError(EmocoreError, TimeoutError):
    """Rows come faster than they can be written, for longer than was allowed."""


class NativeMissingError(EmocoreError, ImportError):
    """The compiled extension is not there."""


class DeviceError(EmocoreError, RuntimeError):
    """A GPU, its driver, or a kernel on it that did not do what was asked."""


class CorpusError(EmocoreError, ValueError):
    """A story file that breaks the corpus rules; names file, line and rule."""


def said(error: OSError) -> str:
    """What the system said.

    >>> said(OSError(28, "No space left on device"))
    'No space left on device (errno 28)'
    """
    return f"{error.strerror or error} (errno {error.errno})"


def near(name: str, known: Iterable[str]) -> str:
    """The way out of an unknown name: near matches first, else the whole list.

    >>> near("clam", ["calm", "happy"])
    "Did you mean 'calm'?"
    """
    known = [str(k) for k in known]
    close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.6)
    if close:
        return "Did you mean " + " or ".join(repr(c) for c in close) + "?"
    shown = ", ".join(repr(k) for k in known[:12])
    return f"Known: {shown}{', ...' if len(known) > 12 else ''}."
