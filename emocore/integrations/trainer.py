"""A callback for transformers' Trainer: the rows of every training forward are captured, in somebody else's loop."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from transformers import TrainerCallback

from ..capturing import Tap, capture
from ..errors import CaptureError
from ..sinks import Bound


class CaptureCallback(TrainerCallback):  # type: ignore[misc]
    """Captures while a Trainer trains; takes what `capture` takes after the model.

    Evaluation in between is left out, unless training=None. `tap` is the capture of the last training, with its `sinks`
    and `ledger`. The hooks go when training ends; as a context manager, also when it fails:

        with CaptureCallback({20: moments}) as watching:
            Trainer(model, ..., callbacks=[watching]).train()
    """

    def __init__(self, hook_points: Any, sink: Bound = None, *, training: bool | None = True, **options: Any) -> None:
        self._arguments = (hook_points, sink)
        self._options = {"training": training, **options}
        self._open = False
        self._tap: Tap | None = None

    @property
    def tap(self) -> Tap:
        """The capture of the last training; raises CaptureError before the first."""
        if self._tap is None:
            raise CaptureError("tap: no training has begun", way_out="Give this callback to a Trainer and train.")
        return self._tap

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        """Open the capture on the Trainer's model."""
        self.close()
        self._tap = capture(model, *self._arguments, **self._options).__enter__()
        self._open = True

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Remove the hooks and check the ledger; raises CaptureError or LedgerError."""
        self._open = False
        self.tap.__exit__(None, None, None)

    def close(self) -> None:
        """Remove the hooks of a training that did not end; what was open of it is rolled back."""
        if self._open:
            self._open = False
            self.tap.__exit__(CaptureError, None, None)

    def __enter__(self) -> CaptureCallback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
