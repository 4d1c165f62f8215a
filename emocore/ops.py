"""One table of ops: schema, fake, gradient, and which implementation serves which device. The only door to the kernels.

Ops are registered with `torch.library` under `torch.ops.emocore`, so that they survive `torch.compile`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from . import reference
from .errors import ArgumentError, NativeMissingError, near

SCHEMAS = {
    "stage": "(Tensor x, Tensor? index, Tensor(a!) rows, Tensor(b!) norms, Tensor(c!) finite) -> ()",
    "label_sums": "(Tensor rows, Tensor? labels, Tensor? weights, Tensor shift, Tensor(a!) sums, Tensor(b!)? squares) -> ()",
    "gram": "(Tensor rows, Tensor? weights, Tensor shift, Tensor(a!) tiles) -> ()",
    "project": "(Tensor rows, Tensor readers, Tensor? centre, bool normalise) -> Tensor",
    "steer_add": "(Tensor x, Tensor delta) -> Tensor",
    "steer_add_": "(Tensor(a!) x, Tensor delta) -> ()",
    "steer_set": "(Tensor x, Tensor basis, Tensor dual, Tensor target) -> Tensor",
}

NATIVE_DTYPES = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bfloat16"}
_NAMES = {**NATIVE_DTYPES, torch.int64: "int64", torch.int32: "int32", torch.bool: "uint8"}

_forced: str | None = None
_native_module: ModuleType | None = None


def native() -> ModuleType:
    """The compiled extension; raises NativeMissingError, saying how to build it, where it is not there."""
    global _native_module
    if _native_module is None:
        try:
            _native_module = importlib.import_module("emocore._C")
        except ImportError as error:
            raise NativeMissingError(
                "emocore._C: the compiled extension is not built",
                got=str(error),
                way_out="Run `make` in the checkout (needs g++ and the Python headers), or `emocore.ops.use('reference')` to compute slowly without it.",
            ) from error
    return _native_module


# --- the extension, one function an op; reads strided rows in place, float16 through an exact float32 copy


def _view(t: Tensor) -> tuple[int, str, int, int, int]:
    """(address, dtype, rows, cols, row stride in elements); one axis is a single row."""
    name = _NAMES[t.dtype]
    if t.dim() == 1:
        return t.data_ptr(), name, 1, t.shape[0], t.shape[0]
    if t.dim() == 3:  # packed tiles
        return t.data_ptr(), name, t.shape[0], t.shape[1] * t.shape[2], t.stride(0)
    return t.data_ptr(), name, t.shape[0], t.shape[1], t.stride(0)


def _rows(x: Tensor) -> Tensor:
    x = x if x.dtype in NATIVE_DTYPES else x.float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _stage_native(x: Tensor, index: Tensor | None, rows: Tensor, norms: Tensor, finite: Tensor) -> None:
    if x.dtype not in NATIVE_DTYPES or x.dtype != rows.dtype:
        reference.stage_ref(x, index, rows, norms, finite)
        return
    x = _rows(x)
    at = None if index is None else index.to(torch.int64).contiguous()
    native().stage(
        _view(x),
        None if at is None else _view(at),
        _view(rows),
        _view(norms),
        _view(finite),
        torch.get_num_threads(),
    )


def _label_sums_native(
    rows: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    shift: Tensor,
    sums: Tensor,
    squares: Tensor | None,
) -> None:
    rows = _rows(rows)
    k = None if labels is None else labels.to(torch.int32).contiguous()
    native().label_sums(
        _view(rows),
        None if k is None else _view(k),
        None if weights is None else _view(weights),
        _view(shift),
        _view(sums),
        None if squares is None else _view(squares),
        torch.get_num_threads(),
    )


def _gram_native(rows: Tensor, weights: Tensor | None, shift: Tensor, tiles: Tensor) -> None:
    rows = _rows(rows)
    native().gram(
        _view(rows),
        None if weights is None else _view(weights),
        _view(shift),
        _view(tiles),
        torch.get_num_threads(),
    )


def _project_native(rows: Tensor, readers: Tensor, centre: Tensor | None, normalise: bool) -> Tensor:
    rows, readers = _rows(rows), readers.contiguous()
    out = rows.new_empty(len(rows), len(readers), dtype=reference.score_dtype(rows, readers))
    c = None if centre is None else centre.to(torch.float64).contiguous()
    native().project(
        _view(rows),
        _view(readers),
        None if c is None else _view(c),
        normalise,
        _view(out),
        torch.get_num_threads(),
    )
    return out


def _steer_add_native(x: Tensor, delta: Tensor) -> Tensor:
    if x.dtype not in NATIVE_DTYPES:
        return reference.steer_add_ref(x, delta)
    rows = _rows(x)
    out = rows.new_empty(rows.shape)
    native().steer_add(_view(rows), _view(delta.contiguous()), _view(out), torch.get_num_threads())
    return out


def _steer_add_inplace_native(x: Tensor, delta: Tensor) -> None:
    if x.dtype not in NATIVE_DTYPES or x.stride(-1) != 1:
        x.copy_(_steer_add_native(x, delta))
    else:
        view = _view(x)
        native().steer_add(view, _view(delta.contiguous()), view, torch.get_num_threads())


def _steer_add_inplace_ref(x: Tensor, delta: Tensor) -> None:
    x.copy_(reference.steer_add_ref(x, delta))


# --- which implementation serves which device

REFERENCE: dict[str, Callable[..., Any]] = {
    "stage": reference.stage_ref,
    "label_sums": reference.label_sums_ref,
    "gram": reference.gram_ref,
    "project": reference.project_ref,
    "steer_add": reference.steer_add_ref,
    "steer_add_": _steer_add_inplace_ref,
    "steer_set": reference.steer_set_ref,
}
NATIVE_CPU: dict[str, Callable[..., Any]] = {
    "stage": _stage_native,
    "label_sums": _label_sums_native,
    "gram": _gram_native,
    "project": _project_native,
    "steer_add": _steer_add_native,
    "steer_add_": _steer_add_inplace_native,
}


TRITON = {"steer_add": "steering", "steer_add_": "steering"}  # op: its file in kernels/


def _triton(op: str) -> Callable[..., Any] | None:
    """The Triton implementation of an op, None where it has none or Triton is not installed."""
    if op not in TRITON or importlib.util.find_spec("triton") is None:
        return None
    return cast(Callable[..., Any], getattr(importlib.import_module(f"emocore.kernels.{TRITON[op]}"), op))


def implementations() -> dict[str, dict[str, str]]:
    """What runs where: {op: {"cpu": ..., "cuda": ...}}, each "native (<instruction set>)", "triton" or "reference".

    >>> implementations()["steer_set"]["cuda"]
    'reference'
    """
    table = {}
    for op in SCHEMAS:
        cpu = "reference"
        if op in NATIVE_CPU and _forced != "reference":
            cpu = f"native ({native().isa()})"
        gpu = "triton" if _forced != "reference" and _triton(op) else "reference"
        table[op] = {"cpu": cpu, "cuda": gpu}
    return table


@contextlib.contextmanager
def _restoring(forced: str | None, isa: str | None) -> Iterator[None]:
    try:
        yield
    finally:
        _set(forced, isa)


def _set(forced: str | None, isa: str | None) -> None:
    global _forced
    _forced = forced
    if isa is not None:
        native().use_isa(isa)


def use(name: str) -> contextlib.AbstractContextManager[None]:
    """Force an implementation from now on: "auto", "reference", or an instruction set of the extension ("scalar", "avx2").

    As a context manager it restores the former choice at the end. Raises ArgumentError listing the known names.

    >>> with use("reference"):
    ...     implementations()["gram"]["cpu"]
    'reference'
    """
    before = _forced
    if name in ("auto", "reference"):
        _set(None if name == "auto" else name, None)
        return _restoring(before, None)
    known = native().isas()
    if name not in known:
        raise ArgumentError("name: unknown implementation", got=name, way_out=near(name, ["auto", "reference", *known]))
    isa = native().isa()
    _set(None, name)
    return _restoring(before, isa)


def _cpu(op: str) -> Callable[..., Any]:
    fast, slow = NATIVE_CPU.get(op, REFERENCE[op]), REFERENCE[op]

    def serve(*args: Any) -> Any:
        return slow(*args) if _forced == "reference" else fast(*args)

    return serve


def _cuda(op: str) -> Callable[..., Any]:
    def serve(*args: Any) -> Any:
        kernel = None if _forced == "reference" else _triton(op)
        return (kernel or REFERENCE[op])(*args)

    return serve


# --- registration

_library = torch.library.Library("emocore", "DEF")
for _op, _schema in SCHEMAS.items():
    _library.define(_op + _schema)
    _library.impl(_op, _cpu(_op), "CPU")
    _library.impl(_op, _cuda(_op), "CUDA")


def _fake_project(rows: Tensor, readers: Tensor, centre: Tensor | None, normalise: bool) -> Tensor:
    return rows.new_empty(rows.shape[0], readers.shape[0], dtype=reference.score_dtype(rows, readers))


def _fake_nothing(*args: Any) -> None:
    return None


def _fake_like_x(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


for _op, _fake in {
    "stage": _fake_nothing,
    "label_sums": _fake_nothing,
    "gram": _fake_nothing,
    "project": _fake_project,
    "steer_add": _fake_like_x,
    "steer_add_": _fake_nothing,
    "steer_set": _fake_like_x,
}.items():
    torch.library.register_fake(f"emocore::{_op}", _fake, lib=_library)


# --- gradients, with respect to the rows; directions are constants


def _keep_project(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, readers, centre, normalise = inputs
    if normalise and rows.requires_grad:
        raise ArgumentError(
            "normalise: cosine scores have no gradient here", way_out="Score raw or centered, and divide in torch."
        )
    ctx.save_for_backward(readers)
    ctx.dtype = rows.dtype


def _project_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (readers,) = ctx.saved_tensors
    return (grad @ readers.to(grad.dtype)).to(ctx.dtype), None, None, None


def _steer_add_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad, None


def _keep_steer_set(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, basis, dual, _ = inputs
    ctx.save_for_backward(basis, dual)


def _steer_set_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    basis, dual = ctx.saved_tensors
    g = grad.to(dual.dtype)
    return (g - (g @ dual.T) @ basis).to(grad.dtype), None, None, None


torch.library.register_autograd("emocore::project", _project_backward, setup_context=_keep_project, lib=_library)
torch.library.register_autograd("emocore::steer_add", _steer_add_backward, lib=_library)
torch.library.register_autograd("emocore::steer_set", _steer_set_backward, setup_context=_keep_steer_set, lib=_library)

# --- the calls, typed

stage = torch.ops.emocore.stage.default
label_sums = torch.ops.emocore.label_sums.default
gram = torch.ops.emocore.gram.default
project = torch.ops.emocore.project.default
steer_add = torch.ops.emocore.steer_add.default
steer_add_ = torch.ops.emocore.steer_add_.default
steer_set = torch.ops.emocore.steer_set.default
