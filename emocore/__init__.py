"""emocore: the engine that watches, measures and steers a language model's activations.

Names are imported when they are first used, so that `import emocore` is light and starts no device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import emotions, errors, ops, store
    from .capturing import Tap, capture
    from .directions import Calibration, Directions, StreamReference
    from .ledger import Ledger
    from .moments import Moments
    from .monitoring import Alarm, Monitor, Threshold, monitor
    from .recording import ActivationStore
    from .replaying import Activations, activations
    from .rows import Rows
    from .steering import Steering, steer
    from .store import load, save
    from .tokens import Tokens
    from .verifying import verify

__version__ = "0.1.0"

_HOME = {
    "ActivationStore": "recording",
    "Activations": "replaying",
    "Alarm": "monitoring",
    "Calibration": "directions",
    "Directions": "directions",
    "Ledger": "ledger",
    "Moments": "moments",
    "Monitor": "monitoring",
    "Rows": "rows",
    "Steering": "steering",
    "StreamReference": "directions",
    "Tap": "capturing",
    "Threshold": "monitoring",
    "Tokens": "tokens",
    "activations": "replaying",
    "capture": "capturing",
    "load": "store",
    "monitor": "monitoring",
    "save": "store",
    "steer": "steering",
    "verify": "verifying",
}
_MODULES = ("emotions", "errors", "ops", "store")

__all__ = [
    "ActivationStore",
    "Activations",
    "Alarm",
    "Calibration",
    "Directions",
    "Ledger",
    "Moments",
    "Monitor",
    "Rows",
    "Steering",
    "StreamReference",
    "Tap",
    "Threshold",
    "Tokens",
    "activations",
    "capture",
    "emotions",
    "errors",
    "load",
    "monitor",
    "ops",
    "save",
    "steer",
    "store",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'emocore' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
