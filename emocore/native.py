"""The compiled extension's functions for torch tensors, one an op; strided rows are read in place."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from . import reference
from .errors import NativeMissingError

DTYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
_NAMES = {**DTYPES, torch.int64: "int64", torch.int32: "int32", torch.bool: "uint8"}

_module: ModuleType | None = None


def extension() -> ModuleType:
    """The compiled extension; raises NativeMissingError, saying how to build it, where it is not there."""
    global _module
    if _module is None:
        try:
            _module = importlib.import_module("emocore._C")
        except ImportError as error:
            raise NativeMissingError(
                "emocore._C: the compiled extension is not built",
                got=str(error),
                way_out="Run `make` in the checkout (it needs g++ and the Python headers), or "
                "`emocore.ops.use('reference')` to compute slowly without it.",
            ) from error
    return _module


def _view(t: Tensor) -> tuple[int, str, int, int, int]:
    """(address, dtype, rows, cols, row stride in elements); one axis is a single row."""
    name = _NAMES[t.dtype]
    if t.dim() == 1:
        return t.data_ptr(), name, 1, t.shape[0], t.shape[0]
    if t.dim() == 3:  # packed tiles
        return t.data_ptr(), name, t.shape[0], t.shape[1] * t.shape[2], t.stride(0)
    return t.data_ptr(), name, t.shape[0], t.shape[1], t.stride(0)


def _rows(x: Tensor) -> Tensor:
    x = x if x.dtype in DTYPES else x.float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def stage(x: Tensor, index: Tensor | None, rows: Tensor, norms: Tensor, finite: Tensor) -> None:
    if x.dtype not in DTYPES or x.dtype != rows.dtype:
        reference.stage_ref(x, index, rows, norms, finite)
        return
    x = _rows(x)
    at = None if index is None else index.to(torch.int64).contiguous()
    extension().stage(
        _view(x),
        None if at is None else _view(at),
        _view(rows),
        _view(norms),
        _view(finite),
        torch.get_num_threads(),
    )


def label_sums(
    rows: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    shift: Tensor,
    sums: Tensor,
    squares: Tensor | None,
) -> None:
    rows = _rows(rows)
    k = None if labels is None else labels.to(torch.int32).contiguous()
    extension().label_sums(
        _view(rows),
        None if k is None else _view(k),
        None if weights is None else _view(weights),
        _view(shift),
        _view(sums),
        None if squares is None else _view(squares),
        torch.get_num_threads(),
    )


def gram(rows: Tensor, weights: Tensor | None, shift: Tensor, tiles: Tensor) -> None:
    rows = _rows(rows)
    extension().gram(
        _view(rows),
        None if weights is None else _view(weights),
        _view(shift),
        _view(tiles),
        torch.get_num_threads(),
    )


def project(rows: Tensor, readers: Tensor, centre: Tensor | None, normalise: bool) -> Tensor:
    rows, readers = _rows(rows), readers.contiguous()
    out = rows.new_empty(len(rows), len(readers), dtype=reference.score_dtype(rows, readers))
    c = None if centre is None else centre.to(torch.float64).contiguous()
    extension().project(
        _view(rows),
        _view(readers),
        None if c is None else _view(c),
        normalise,
        _view(out),
        torch.get_num_threads(),
    )
    return out


def steer_add(x: Tensor, delta: Tensor) -> Tensor:
    if x.dtype not in DTYPES:
        return reference.steer_add_ref(x, delta)
    rows = _rows(x)
    out = rows.new_empty(rows.shape)
    extension().steer_add(_view(rows), _view(delta.contiguous()), _view(out), torch.get_num_threads())
    return out


def steer_add_(x: Tensor, delta: Tensor) -> None:
    if x.dtype not in DTYPES or x.stride(-1) != 1:
        x.copy_(steer_add(x, delta))
    else:
        view = _view(x)
        extension().steer_add(view, _view(delta.contiguous()), view, torch.get_num_threads())
