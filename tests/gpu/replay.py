"""A stand-in for a recorded CUDA graph, on any device: every kernel and every torch op of a forward, with its tensors
and its numbers as they were, to be run again without the Python around them.

It also refuses what a graph refuses: to ask the device for a value.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from emocore import ops
from emocore.kernels import _launch

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2", "bincount"}
ALLOCATES = {"empty", "empty_strided", "new_empty", "zeros", "full", "clone", "_to_copy", "cat", "stack"}


class Recorder(TorchDispatchMode):
    """Everything that ran in its `with` block; `replay` runs it again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []
        self.ours: list[str] = []  # torch ops that the lane itself has called
        self._inside = 0
        launch = _launch.launch

        def record(*args: Any, **kwargs: Any) -> None:
            with _disable_current_modes():  # the interpreter moves memory by torch ops of its own
                launch(*args, **kwargs)
            if self._open:
                self.calls.append(lambda: launch(*args, **kwargs))

        self._open = False
        for module in list(_kernel_modules()):
            monkeypatch.setattr(module, "launch", record)

    def __enter__(self) -> Recorder:
        self._open = True
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._open = self._inside > 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if func.namespace == "emocore":
            return self._step_into(name, args)
        assert name not in WAITS, f"{func} waits for the device"
        if name in ("index", "index_put_"):
            assert not any(t is not None and t.dtype == torch.bool for t in args[1]), f"{func} by a mask waits"
        with _launches_ignored(self):
            out = func(*args, **kwargs)
        if self._inside:
            self.ours.append(name)
        before = [t for t in tree_leaves(out) if isinstance(t, Tensor)]

        def again() -> None:
            after = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
            for old, new in zip(before, after, strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)

        self.calls.append(again)
        return out

    def _step_into(self, name: str, args: Any) -> Any:
        """Record what an op of ours does, and not the op: at a replay no Python runs."""
        lane = {"lane_begin": ops._lane_begin, "lane_stage": ops._lane_stage, "lane_commit": ops._lane_commit}
        self._inside += 1
        try:
            with self:
                return lane[name](*args) if name in lane else ops._cpu(name)(*args)
        finally:
            self._inside -= 1

    def replay(self) -> None:
        """Run everything again, in order."""
        for call in self.calls:
            call()


@contextmanager
def _launches_ignored(recorder: Recorder) -> Iterator[None]:
    opened, recorder._open = recorder._open, False
    yield
    recorder._open = opened


def _kernel_modules() -> Iterator[Any]:
    for path in sorted(Path(_launch.__file__).parent.glob("*.py")):
        module = importlib.import_module(f"emocore.kernels.{path.stem}")
        if hasattr(module, "launch") and module is not _launch:
            yield module
