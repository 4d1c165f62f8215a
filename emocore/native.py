"""The compiled extension's functions for torch tensors, one an op; strided rows are read in place."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from . import reference, reference_steering
from .errors import NativeMissingError

DTYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
_NAMES = {**DTYPES, torch.int64: "int64", torch.int32: "int32", torch.bool: "uint8"}

# Tensors of so many bytes get memory of their own from the system: its first use costs more than what is computed.
OWN_MEMORY = 32 << 20

MOST_THREADS = 1024

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


def _threads() -> int:
    """torch's, as many as make sense on any machine."""
    return min(torch.get_num_threads(), MOST_THREADS)


def _rows(x: Tensor) -> Tensor:
    x = x if x.dtype in DTYPES else x.float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _output(rows: Tensor) -> Tensor:
    out = rows.new_empty(rows.shape)
    if out.nbytes >= OWN_MEMORY:
        extension().large_pages(_view(out))
    return out


def stage(x: Tensor, index: Tensor | None, rows: Tensor, norms: Tensor, finite: Tensor) -> None:
    if x.dtype not in DTYPES or torch.promote_types(x.dtype, rows.dtype) != rows.dtype:
        reference.stage_ref(x, index, rows, norms, finite)
        return
    if x.dtype != rows.dtype:
        x, index = (x if index is None else x[index]).to(rows.dtype), None
    x = _rows(x)
    at = None if index is None else index.to(torch.int64).contiguous()
    extension().stage(
        _view(x),
        None if at is None else _view(at),
        _view(rows),
        _view(norms),
        _view(finite),
        _threads(),
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
        _threads(),
    )


def gram(rows: Tensor, weights: Tensor | None, shift: Tensor, tiles: Tensor) -> None:
    rows = _rows(rows)
    extension().gram(
        _view(rows),
        None if weights is None else _view(weights),
        _view(shift),
        _view(tiles),
        _threads(),
    )


def project(
    rows: Tensor,
    readers: Tensor,
    centre: Tensor | None,
    normalise: bool,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    rows, readers = _rows(rows), readers.contiguous()
    out = rows.new_empty(len(rows), len(readers), dtype=reference.score_dtype(rows, readers))
    given = [_wide(t) for t in (centre, mean, std)]  # kept while their addresses are in use
    c, m, s = (None if t is None else _view(t) for t in given)
    extension().project(_view(rows), _view(readers), c, normalise, _view(out), _threads(), 1, None, m, s)
    return out


def project_packed(rows: Tensor, packed: Tensor, offset: Tensor, normalise: bool) -> Tensor:
    rows = _rows(rows)
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    out = rows.new_empty(len(rows), packed.shape[1], dtype=wide)
    _project_packed(rows, packed, offset, normalise, out)
    return out


def _project_packed(rows: Tensor, packed: Tensor, offset: Tensor, normalise: bool, out: Tensor) -> None:
    readers = packed.contiguous().view(-1, packed.shape[2])
    if readers.dtype not in (rows.dtype, torch.float32, torch.float64):
        readers = readers.float()
    added = offset.to(torch.float64).contiguous()
    extension().project(
        _view(rows),
        _view(readers),
        None,
        normalise,
        _view(out),
        _threads(),
        len(packed),
        _view(added),
    )


def project_rows(rows: Tensor, packed: Tensor, offset: Tensor, count: Tensor | None, out: Tensor) -> None:
    n = rows.shape[1] if count is None else min(int(count), rows.shape[1])
    if out.stride(-1) != 1 or out.dtype not in (torch.float32, torch.float64):
        reference_steering.project_rows_ref(rows, packed, offset, count, out)
        return
    for some, readers, added, scores in zip(rows, packed, offset, out, strict=True):
        _project_packed(_rows(some[:n]), readers, added, False, scores[:n])


def project_steer(x: Tensor, packed: Tensor, offset: Tensor, slots: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
    return project_packed(x, packed, offset, False), steer_rows(x, slots, deltas)


def project_steer_(x: Tensor, packed: Tensor, offset: Tensor, slots: Tensor, deltas: Tensor) -> Tensor:
    scores = project_packed(x, packed, offset, False)
    steer_rows_(x, slots, deltas)
    return scores


def pool_scores(scores: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    if scores.dtype not in (torch.float32, torch.float64):
        return reference_steering.pool_scores_ref(scores, starts)
    given, edges = _rows(scores), starts.to(torch.int64).contiguous()
    largest, mean = (given.new_empty(len(starts) - 1, scores.shape[1], dtype=torch.float32) for _ in range(2))
    extension().pool_scores(_view(given), _view(edges), _view(largest), _view(mean), _threads())
    return largest, mean


def steer_add(x: Tensor, delta: Tensor) -> Tensor:
    if x.dtype not in DTYPES:
        return reference.steer_add_ref(x, delta)
    rows, delta = _rows(x), delta.contiguous()
    out = _output(rows)
    extension().steer_add(_view(rows), _view(delta), _view(out), _threads())
    return out


def steer_add_(x: Tensor, delta: Tensor) -> None:
    if x.dtype not in DTYPES or x.stride(-1) != 1:
        x.copy_(steer_add(x, delta))
    else:
        view, delta = _view(x), delta.contiguous()
        extension().steer_add(view, _view(delta), view, _threads())


def steer_set(x: Tensor, basis: Tensor, dual: Tensor, target: Tensor) -> Tensor:
    return _edited(x, None, None, None, None, basis, dual, target)


def steer_set_(x: Tensor, basis: Tensor, dual: Tensor, target: Tensor) -> None:
    _edit_in_place(x, None, None, None, None, basis, dual, target)


def steer_rows(x: Tensor, slots: Tensor, deltas: Tensor, *sets: Tensor | None) -> Tensor:
    return _edited(x, slots, None, None, deltas, *sets)


def steer_rows_(x: Tensor, slots: Tensor, deltas: Tensor, *sets: Tensor | None) -> None:
    _edit_in_place(x, slots, None, None, deltas, *sets)


def steer_when(
    x: Tensor, slots: Tensor, readers: Tensor, levels: Tensor, deltas: Tensor, *sets: Tensor | None
) -> Tensor:
    return _edited(x, slots, readers, levels, deltas, *sets)


def steer_when_(
    x: Tensor, slots: Tensor, readers: Tensor, levels: Tensor, deltas: Tensor, *sets: Tensor | None
) -> None:
    _edit_in_place(x, slots, readers, levels, deltas, *sets)


def steer_slots(x: Tensor, slots: Tensor, readers: Tensor, levels: Tensor) -> Tensor:
    rows = _rows(x)
    given = [_slots(rows, slots), _table(rows, readers), _table(rows, levels)]
    out = torch.empty(len(rows), dtype=torch.int32)
    extension().steer_slots(_view(rows), *map(_view, given), _view(out), _threads())
    return out


def _edited(x: Tensor, *edit: Tensor | None) -> Tensor:
    rows = _rows(x)
    out = _output(rows)
    _edit(rows, out, *edit)
    return out.to(x.dtype)


def _edit_in_place(x: Tensor, *edit: Tensor | None) -> None:
    if x.dtype not in DTYPES or x.stride(-1) != 1:
        x.copy_(_edited(x, *edit))
    else:
        _edit(x, x, *edit)


def _edit(
    x: Tensor,
    out: Tensor,
    slots: Tensor | None,
    readers: Tensor | None,
    levels: Tensor | None,
    deltas: Tensor | None,
    basis: Tensor | None = None,
    dual: Tensor | None = None,
    target: Tensor | None = None,
    gate: Tensor | None = None,
) -> None:
    sets = (None,) * 4 if basis is None or dual is None or target is None else (basis, dual, target, gate)
    tables = [None if t is None else _table(x, t) for t in (readers, levels, deltas, *sets)]
    given = [None if slots is None else _slots(x, slots), *tables]  # kept while its addresses are in use
    extension().steer_edit(_view(x), *(None if t is None else _view(t) for t in given), _view(out), _threads())


def _slots(x: Tensor, slots: Tensor) -> Tensor:
    reference_steering.rows_per_slot(len(x), slots)
    return slots.to(torch.int32).contiguous()


def _wide(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.float64).contiguous()


def _table(x: Tensor, t: Tensor) -> Tensor:
    """In the type of the sums: float64 for float64 rows, else float32."""
    return t.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()
