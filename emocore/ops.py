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

from . import native, reference, reference_drain, reference_forward, reference_steering, reference_track
from .errors import ArgumentError, near
from .gradients import GRADIENTS

_TABLES = "Tensor deltas, Tensor? basis=None, Tensor? dual=None, Tensor? target=None, Tensor? gate=None"
SCHEMAS = {
    "stage": "(Tensor x, Tensor? index, Tensor(a!) rows, Tensor(b!) norms, Tensor(c!) finite) -> ()",
    "label_sums": (
        "(Tensor rows, Tensor? labels, Tensor? weights, Tensor shift, Tensor(a!) sums, Tensor(b!)? squares) -> ()"
    ),
    "gram": "(Tensor rows, Tensor? weights, Tensor shift, Tensor(a!) tiles) -> ()",
    "project": (
        "(Tensor rows, Tensor readers, Tensor? centre, bool normalise, Tensor? mean=None, Tensor? std=None) -> Tensor"
    ),
    "project_packed": "(Tensor rows, Tensor packed, Tensor offset, bool normalise) -> Tensor",
    "project_rows": "(Tensor rows, Tensor packed, Tensor offset, Tensor? count, Tensor(a!) out) -> ()",
    "project_steer": "(Tensor x, Tensor packed, Tensor offset, Tensor slots, Tensor deltas) -> (Tensor, Tensor)",
    "project_steer_": "(Tensor(a!) x, Tensor packed, Tensor offset, Tensor slots, Tensor deltas) -> Tensor",
    "pool_scores": "(Tensor scores, Tensor starts) -> (Tensor, Tensor)",
    "steer_add": "(Tensor x, Tensor delta) -> Tensor",
    "steer_add_": "(Tensor(a!) x, Tensor delta) -> ()",
    "steer_set": "(Tensor x, Tensor basis, Tensor dual, Tensor target) -> Tensor",
    "steer_set_": "(Tensor(a!) x, Tensor basis, Tensor dual, Tensor target) -> ()",
    "steer_rows": f"(Tensor x, Tensor slots, {_TABLES}) -> Tensor",
    "steer_rows_": f"(Tensor(a!) x, Tensor slots, {_TABLES}) -> ()",
    "steer_when": f"(Tensor x, Tensor slots, Tensor readers, Tensor levels, {_TABLES}) -> Tensor",
    "steer_when_": f"(Tensor(a!) x, Tensor slots, Tensor readers, Tensor levels, {_TABLES}) -> ()",
    "steer_slots": "(Tensor x, Tensor slots, Tensor readers, Tensor levels) -> Tensor",
}

_forced: str | None = None


def _in_place(out_of_place: Callable[..., Tensor]) -> Callable[..., None]:
    def act(x: Tensor, *args: Any) -> None:
        x.copy_(out_of_place(x, *args))

    return act


def _project_steer_in_place_ref(x: Tensor, *args: Any) -> Tensor:
    scores, y = reference_steering.project_steer_ref(x, *args)
    x.copy_(y)
    return scores


# --- which implementation serves which device

REFERENCE: dict[str, Callable[..., Any]] = {
    "stage": reference.stage_ref,
    "label_sums": reference.label_sums_ref,
    "gram": reference.gram_ref,
    "project": reference.project_ref,
    "project_packed": reference_steering.project_packed_ref,
    "project_rows": reference_steering.project_rows_ref,
    "project_steer": reference_steering.project_steer_ref,
    "project_steer_": _project_steer_in_place_ref,
    "pool_scores": reference_steering.pool_scores_ref,
    "steer_add": reference.steer_add_ref,
    "steer_add_": _in_place(reference.steer_add_ref),
    "steer_set": reference.steer_set_ref,
    "steer_set_": _in_place(reference.steer_set_ref),
    "steer_rows": reference_steering.steer_rows_ref,
    "steer_rows_": _in_place(reference_steering.steer_rows_ref),
    "steer_when": reference_steering.steer_when_ref,
    "steer_when_": _in_place(reference_steering.steer_when_ref),
    "steer_slots": reference_steering.steer_slots_ref,
}
NATIVE_CPU: dict[str, Callable[..., Any]] = {
    "stage": native.stage,
    "label_sums": native.label_sums,
    "gram": native.gram,
    "project": native.project,
    "project_packed": native.project_packed,
    "project_rows": native.project_rows,
    "project_steer": native.project_steer,
    "project_steer_": native.project_steer_,
    "pool_scores": native.pool_scores,
    "steer_add": native.steer_add,
    "steer_add_": native.steer_add_,
    "steer_set": native.steer_set,
    "steer_set_": native.steer_set_,
    "steer_rows": native.steer_rows,
    "steer_rows_": native.steer_rows_,
    "steer_when": native.steer_when,
    "steer_when_": native.steer_when_,
    "steer_slots": native.steer_slots,
}


TRITON = {  # op or step: its file in kernels/
    "begin": "begin",
    "stage_rows": "stage_rows",
    "place_labels": "stage_rows",
    "place_rows": "place_rows",
    "commit": "commit",
    "freeze": "convert",
    "convert": "convert",
    "gram": "gram",
    "fold_gram": "gram",
    "sort_labels": "sorting",
    "fold_labels": "folding",
    "settle": "settle",
    "stage": "staging",
    "label_sums": "label_sums",
    "steer_add": "steering",
    "steer_add_": "steering",
    "steer_set": "steer_sets",
    "steer_set_": "steer_sets",
    "steer_rows": "steer_sets",
    "steer_rows_": "steer_sets",
    "steer_when": "steer_sets",
    "steer_when_": "steer_sets",
    "steer_slots": "steer_slots",
    "project": "project",
    "project_packed": "project",
    "project_rows": "project",
    "project_steer": "project",
    "project_steer_": "project",
    "pool_scores": "pool_scores",
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
    "undo": reference_forward.undo_ref,
    "begin": reference_forward.begin_ref,
    "stage_rows": reference_forward.stage_rows_ref,
    "place_labels": reference_forward.place_labels_ref,
    "place_rows": reference_forward.place_rows_ref,
    "commit": reference_forward.commit_ref,
    "freeze": reference_drain.freeze_ref,
    "convert": reference_drain.convert_ref,
    "fold_gram": reference_drain.fold_gram_ref,
    "sort_labels": reference_drain.sort_labels_ref,
    "fold_labels": reference_drain.fold_labels_ref,
    "settle": reference_drain.settle_ref,
    "track": reference_track.track_ref,
}


def step(name: str, device: torch.device) -> Callable[..., Any]:
    """The implementation of a step for tensors on `device`."""
    return (_triton(name) if _by_kernels(device) else None) or STEPS[name]


def has_kernel(name: str, device: torch.device) -> bool:
    """Whether a GPU kernel serves an op or step for tensors on `device`."""
    return _by_kernels(device) and _triton(name) is not None


def _by_kernels(device: torch.device) -> bool:
    return _forced == "triton" or (_forced is None and device.type == "cuda" and _has_kernels(device))


@functools.cache
def _has_kernels(device: torch.device) -> bool:
    """Whether the kernels are made for a GPU: NVIDIA's, sm_80 or later; the reference serves others."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def implementations() -> dict[str, dict[str, str]]:
    """What runs where: {op: {"cpu": ..., "cuda": ...}}, each "native (<instruction set>)", "triton" or "reference".

    >>> implementations()["track"]["cpu"]
    'reference'
    """
    table = {}
    for op in [*SCHEMAS, *STEPS]:
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
    """Force an implementation from now on: "auto", "reference", or an instruction set of the extension.

    Those of x86-64 are "scalar", "avx2", "avx512", "avx512_bf16" and "amx_bf16", as far as this machine has them; the
    fastest is chosen at the first use, or the one that the environment variable EMOCORE_ISA names.

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
        return ((_triton(op) if _by_kernels(args[0].device) else None) or REFERENCE[op])(*args)

    return serve


# --- registration

_library = torch.library.Library("emocore", "DEF")
for _op, _schema in SCHEMAS.items():
    _library.define(_op + _schema)
    _library.impl(_op, _cpu(_op), "CPU")
    _library.impl(_op, _cuda(_op), "CUDA")


def _fake_project(rows: Tensor, readers: Tensor, *args: Any) -> Tensor:
    return rows.new_empty(rows.shape[0], readers.shape[0], dtype=reference.score_dtype(rows, readers))


def _fake_project_packed(rows: Tensor, packed: Tensor, *args: Any) -> Tensor:
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return rows.new_empty(rows.shape[0], packed.shape[1], dtype=wide)


def _fake_project_steer(x: Tensor, packed: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _fake_project_packed(x, packed), x.new_empty(x.shape)


def _fake_pool_scores(scores: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    largest, mean = (scores.new_empty(starts.shape[0] - 1, scores.shape[1], dtype=torch.float32) for _ in range(2))
    return largest, mean


def _fake_slots(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int32)


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
    "project_packed": _fake_project_packed,
    "project_rows": _fake_nothing,
    "project_steer": _fake_project_steer,
    "project_steer_": _fake_project_packed,
    "pool_scores": _fake_pool_scores,
    "steer_set_": _fake_nothing,
    "steer_rows": _fake_like_x,
    "steer_rows_": _fake_nothing,
    "steer_when": _fake_like_x,
    "steer_when_": _fake_nothing,
    "steer_slots": _fake_slots,
}.items():
    torch.library.register_fake(f"emocore::{_op}", cast(Callable[..., Any], _fake), lib=_library)


for _op, (_backward, _keep) in GRADIENTS.items():
    torch.library.register_autograd(f"emocore::{_op}", _backward, setup_context=_keep, lib=_library)

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
project_packed = torch.ops.emocore.project_packed.default
project_rows = torch.ops.emocore.project_rows.default
project_steer = torch.ops.emocore.project_steer.default
project_steer_ = torch.ops.emocore.project_steer_.default
pool_scores = torch.ops.emocore.pool_scores.default
steer_add = torch.ops.emocore.steer_add.default
steer_add_ = torch.ops.emocore.steer_add_.default
steer_set = torch.ops.emocore.steer_set.default
steer_set_ = torch.ops.emocore.steer_set_.default
steer_rows = torch.ops.emocore.steer_rows.default
steer_rows_ = torch.ops.emocore.steer_rows_.default
steer_when = torch.ops.emocore.steer_when.default
steer_when_ = torch.ops.emocore.steer_when_.default
steer_slots = torch.ops.emocore.steer_slots.default
lane_begin = torch.ops.emocore.lane_begin.default
lane_stage = torch.ops.emocore.lane_stage.default
lane_commit = torch.ops.emocore.lane_commit.default
