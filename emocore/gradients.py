"""Gradients: what a backward makes of the scores and edits of rows, with respect to the rows; directions are constants.

By op, what its forward keeps and what its backward returns, as `torch.library.register_autograd` asks for them. What
computes is an op again, so a backward runs on the device that the forward ran on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from .errors import ArgumentError

_ops = torch.ops.emocore


def _keep_project(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, readers, _, normalise, _, std = inputs
    if normalise and rows.requires_grad:
        raise ArgumentError(
            "normalise: cosine scores have no gradient here", way_out="Score raw or centered, and divide in torch."
        )
    ctx.save_for_backward(readers, std)
    ctx.dtype = rows.dtype


def _project_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    readers, std = ctx.saved_tensors
    grad = grad if std is None else grad / std.to(grad.dtype)
    return (grad @ readers.to(grad.dtype)).to(ctx.dtype), None, None, None, None, None


def _project_packed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _project_backward(ctx, grad)[:4]


def _steer_add_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad, None


def _keep_steer_set(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, basis, dual, _ = inputs
    ctx.save_for_backward(basis, dual)


def _steer_set_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    basis, dual = ctx.saved_tensors
    return _ops.steer_set.default(grad, dual, basis, dual.new_zeros(len(dual))), None, None, None


def _keep_project_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, packed, offset, normalise = inputs
    _keep_project(ctx, (rows, packed.to(offset.dtype).sum(0), None, normalise, None, None), output)


def _keep_project_steer(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _keep_project_packed(ctx, (*inputs[:3], False), output)


def _project_steer_backward(ctx: Any, scores: Tensor, y: Tensor) -> tuple[Tensor | None, ...]:
    grad, *_ = _project_backward(ctx, scores)
    return y + cast(Tensor, grad), None, None, None, None


def _keep_steer_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _steer_rows_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    slots, deltas, basis, dual, target, gate = ctx.saved_tensors
    if basis is not None:  # the transpose of the edit, without its constants
        grad = _ops.steer_rows.default(
            grad, slots, torch.zeros_like(deltas), dual, basis, torch.zeros_like(target), gate
        )
    return grad, *[None] * 6


def _keep_steer_when(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, slots, readers, levels, *tables = inputs
    ctx.save_for_backward(_ops.steer_slots.default(x, slots, readers, levels), *tables)


def _steer_when_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_steer_rows_backward(ctx, grad), None, None


GRADIENTS: dict[str, tuple[Callable[..., Any], Callable[..., None] | None]] = {  # op: its backward, what it keeps
    "project": (_project_backward, _keep_project),
    "project_packed": (_project_packed_backward, _keep_project_packed),
    "project_steer": (_project_steer_backward, _keep_project_steer),
    "steer_add": (_steer_add_backward, None),
    "steer_set": (_steer_set_backward, _keep_steer_set),
    "steer_rows": (_steer_rows_backward, _keep_steer_rows),
    "steer_when": (_steer_when_backward, _keep_steer_when),
}
