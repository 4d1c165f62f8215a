"""One table of ops: schema, fake, gradient, and which implementation serves which device. The only door to the kernels.

Ops are registered with `torch.library` under `torch.ops.emocore`, so that they survive `torch.compile`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from . import native, reference, reference_steps
from .errors import ArgumentError, near

SCHEMAS = {
    "stage": "(Tensor x, Tensor? index, Tensor(a!) rows, Tensor(b!) norms, Tensor(c!) finite) -> ()",
    "label_sums": (
        "(Tensor rows, Tensor? labels, Tensor? weights, Tensor shift, Tensor(a!) sums, Tensor(b!)? squares) -> ()"
    ),
    "gram": "(Tensor rows, Tensor? weights, Tensor shift, Tensor(a!) tiles) -> ()",
    "project": "(Tensor rows, Tensor readers, Tensor? centre, bool normalise) -> Tensor",
    "steer_add": "(Tensor x, Tensor delta) -> Tensor",
    "steer_add_": "(Tensor(a!) x, Tensor delta) -> ()",
    "steer_set": "(Tensor x, Tensor basis, Tensor dual, Tensor target) -> Tensor",
}

_forced: str | None = None


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
    "stage": native.stage,
    "label_sums": native.label_sums,
    "gram": native.gram,
    "project": native.project,
    "steer_add": native.steer_add,
    "steer_add_": native.steer_add_,
}


TRITON = {  # op or step: its file in kernels/
    "begin": "forward",
    "stage_rows": "forward",
    "place_labels": "forward",
    "commit": "forward",
    "freeze": "convert",
    "convert": "convert",
    "steer_add": "steering",
    "steer_add_": "steering",
    "track": "track",
}


@functools.cache
def _triton(op: str) -> Callable[..., Any] | None:
    """The Triton implementation of an op, None where it has none or Triton is not installed."""
    if op not in TRITON or importlib.util.find_spec("triton") is None:
        return None
    return cast(Callable[..., Any], getattr(importlib.import_module(f"emocore.kernels.{TRITON[op]}"), op))


# Steps of a capture whose statistics stay on the device (docs/gpu.md): they run inside an op, and are none themselves.
STEPS: dict[str, Callable[..., Any]] = {
    "begin": reference_steps.begin_ref,
    "stage_rows": reference_steps.stage_rows_ref,
    "place_labels": reference_steps.place_labels_ref,
    "commit": reference_steps.commit_ref,
    "freeze": reference.freeze_ref,
    "convert": reference.convert_ref,
    "track": reference.track_ref,
}


def step(name: str, device: torch.device) -> Callable[..., Any]:
    """The implementation of a step for tensors on `device`."""
    wanted = _forced == "triton" or (_forced is None and device.type == "cuda")
    return (_triton(name) if wanted else None) or STEPS[name]


def implementations() -> dict[str, dict[str, str]]:
    """What runs where: {op: {"cpu": ..., "cuda": ...}}, each "native (<instruction set>)", "triton" or "reference".

    >>> implementations()["steer_set"]["cuda"]
    'reference'
    """
    table = {}
    for op in SCHEMAS:
        cpu = "reference"
        if _forced == "triton" and _triton(op):
            cpu = "triton"
        elif op in NATIVE_CPU and _forced not in ("reference", "triton"):
            cpu = f"native ({native.extension().isa()})"
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
        native.extension().use_isa(isa)


def use(name: str) -> contextlib.AbstractContextManager[None]:
    """Force an implementation from now on: "auto", "reference", or an instruction set of the extension, such as "avx2".

    "triton" serves CPU tensors by the GPU kernels too, under Triton's interpreter (TRITON_INTERPRET=1), and what has no
    kernel by the reference: for tests.
    As a context manager it restores the former choice at the end. Raises ArgumentError listing the known names.

    >>> with use("reference"):
    ...     implementations()["gram"]["cpu"]
    'reference'
    """
    before = _forced
    if name in ("auto", "reference", "triton"):
        _set(None if name == "auto" else name, None)
        return _restoring(before, None)
    known = native.extension().isas()
    if name not in known:
        raise ArgumentError(
            "name: unknown implementation", got=name, way_out=near(name, ["auto", "reference", "triton", *known])
        )
    isa = native.extension().isa()
    _set(None, name)
    return _restoring(before, isa)


def _cpu(op: str) -> Callable[..., Any]:
    fast, slow = NATIVE_CPU.get(op, REFERENCE[op]), REFERENCE[op]

    def serve(*args: Any) -> Any:
        if _forced is None:
            return fast(*args)
        kernel = _triton(op) if _forced == "triton" else None
        return (kernel or slow)(*args)

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
    torch.library.register_fake(f"emocore::{_op}", cast(Callable[..., Any], _fake), lib=_library)


# --- gradients, with respect to the rows; directions are constants


def _keep_project(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, readers, _, normalise = inputs
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

# --- hooks of a capture on the device: what they do is the lane's, found by its handle when the op runs

LANE_SCHEMAS = {
    "lane_begin": ("(Tensor(a!) order, Tensor? mask, Tensor? shown, Tensor? past_at, int past, int lane) -> ()"),
    "lane_stage": "(Tensor(a!) order, Tensor x, int lane, int point) -> ()",
    "lane_commit": "(Tensor(a!) order, int lane) -> ()",
}
LANES: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def _lane_begin(
    order: Tensor, mask: Tensor | None, shown: Tensor | None, past_at: Tensor | None, past: int, lane: int
) -> None:
    LANES[lane].begin(mask, shown, past_at, past)


def _lane_stage(order: Tensor, x: Tensor, lane: int, point: int) -> None:
    LANES[lane].stage(point, x)


def _lane_commit(order: Tensor, lane: int) -> None:
    LANES[lane].commit()


# `order` is declared as written, so that a compiled graph keeps the calls in their order; nothing is kept in it
for _op, _call in {"lane_begin": _lane_begin, "lane_stage": _lane_stage, "lane_commit": _lane_commit}.items():
    _library.define(_op + LANE_SCHEMAS[_op])
    _library.impl(_op, _call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"emocore::{_op}", _fake_nothing, lib=_library)

# --- the calls, typed

stage = torch.ops.emocore.stage.default
label_sums = torch.ops.emocore.label_sums.default
gram = torch.ops.emocore.gram.default
project = torch.ops.emocore.project.default
steer_add = torch.ops.emocore.steer_add.default
steer_add_ = torch.ops.emocore.steer_add_.default
steer_set = torch.ops.emocore.steer_set.default
lane_begin = torch.ops.emocore.lane_begin.default
lane_stage = torch.ops.emocore.lane_stage.default
lane_commit = torch.ops.emocore.lane_commit.default
