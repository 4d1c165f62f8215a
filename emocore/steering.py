"""Steering: add, ablate or clamp directions in a module's output, in the forward pass.

Directions are not orthogonal. With unit patterns V [R, D]: ablate is x - QQ'x for an orthonormal basis Q of their span;
clamp is x + (c - Vx) (VV')^+ V, so that every clamped score is c at once. Order within a hook point: ablate, clamp, add.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import linalg, ops
from .directions import Directions
from .errors import ArgumentError, ShapeError
from .hookpoints import check_model, read_output, replace_output, resolve

UNITS = ("residual_norm", "absolute")


class Edit:
    """What is done to the hidden state at one hook point; built once, applied to [..., D] of any float dtype."""

    def __init__(
        self,
        vectors: Directions,
        add: Mapping[str, float],
        ablate: Sequence[str],
        clamp: Mapping[str, float],
        unit: str,
        to: str,
    ) -> None:
        if unit not in UNITS:
            raise ArgumentError("unit", expected=" or ".join(map(repr, UNITS)), got=repr(unit))
        if to not in ("zero", "baseline"):
            raise ArgumentError("to", expected="'zero' or 'baseline'", got=repr(to))
        both = sorted(set(ablate) & set(clamp))
        if both:
            raise ArgumentError("ablate, clamp: a direction is in both", got=both)
        scale = vectors.mean_norm if unit == "residual_norm" else 1.0
        centre = vectors.centre if to == "baseline" else torch.zeros_like(vectors.centre)
        self.dim = vectors.dim
        self.sets: list[tuple[Tensor, Tensor, Tensor]] = []  # (basis, dual, target)
        if ablate:
            q = linalg.orthonormal_span(vectors[list(ablate)].unit)
            self.sets.append((q, q, q @ centre))
        if clamp:
            v = vectors[list(clamp)].unit
            value = scale * torch.tensor(list(clamp.values()), dtype=torch.float64)
            dual = torch.linalg.pinv(v @ v.T, hermitian=True, rtol=1e-10) @ v
            self.sets.append((v, dual, value + v @ centre))
        self.delta: Tensor | None = None
        if any(s != 0 for s in add.values()):
            strength = scale * torch.tensor(list(add.values()), dtype=torch.float64)
            self.delta = (strength @ vectors[list(add)].unit).float()

    def __call__(self, hidden: Tensor, in_place: bool = False) -> Tensor:
        """The edited hidden state; the very tensor where nothing is to be done."""
        if hidden.shape[-1] != self.dim:
            raise ShapeError("steer: width of the hidden state", expected=self.dim, got=hidden.shape[-1])
        x = hidden.reshape(-1, self.dim)
        for basis, dual, target in self.sets:
            x = ops.steer_set(x, basis.to(x.device), dual.to(x.device), target.to(x.device))
        if self.delta is not None:
            delta = self.delta.to(x.device)
            if in_place and not self.sets and x.data_ptr() == hidden.data_ptr():
                ops.steer_add_(x, delta)
                return hidden
            x = ops.steer_add(x, delta)
        return hidden if x.data_ptr() == hidden.data_ptr() else x.reshape(hidden.shape)


class Steering:
    """Open steering of one model; made by `steer`, removed at the end of its `with` block."""

    def __init__(self, model: nn.Module, edits: Mapping[str, Edit]) -> None:
        self.model, self.edits = model, edits
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Steering:
        modules = dict(self.model.named_modules())
        for name, edit in self.edits.items():
            self._handles.append(modules[name].register_forward_hook(_editor(edit)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _editor(edit: Edit) -> Any:
    def act(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = read_output(output)
        # a module that returns its own input must not have it changed under the caller's feet
        aliased = any(isinstance(a, Tensor) and a.data_ptr() == hidden.data_ptr() for a in args)
        edited = edit(hidden, in_place=not (hidden.requires_grad or aliased))
        return None if edited is hidden else replace_output(output, edited)

    return act


def steer(
    model: nn.Module,
    vectors: Directions | Mapping[str, Directions],
    *,
    add: Mapping[str, float] | None = None,
    ablate: Sequence[str] = (),
    clamp: Mapping[str, float] | None = None,
    unit: str = "residual_norm",
    to: str = "zero",
) -> Steering:
    """Steer every token along named directions while the `with` block runs the model.

    add: {name: strength}, in fractions of the mean residual norm (`unit="absolute"`: in activation units) along the unit
    pattern. ablate: names whose span is removed, or set to the centre's with `to="baseline"`. clamp: {name: score} along the
    unit pattern, in the same unit, from zero or from the baseline. A mapping steers each of its hook points at full
    strength. Strength 0 is bit-exact. Raises ArgumentError, HookPointError, LabelError, ShapeError.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
    >>> v = Directions(("up",), torch.tensor([[0.0, 2.0]]).double(), torch.tensor([[0.0, 1.0]]), torch.zeros(2).double(),
    ...                mean_norm=4.0, residual=torch.ones(1), hook_point="0")
    >>> with steer(model, v, add={"up": 0.5}):
    ...     model(torch.zeros(1, 2))
    tensor([[0., 2.]], grad_fn=...)
    """
    if not add and not ablate and not clamp:
        raise ArgumentError("steer: nothing to do", way_out="Give add=, ablate= or clamp=.")
    several = vectors if isinstance(vectors, Mapping) else {vectors.hook_point: vectors}
    edits: dict[str, Edit] = {}
    for name, directions in several.items():
        if name is None:
            raise ArgumentError("vectors: they name no hook point", way_out="Give {hook point: vectors}.")
        (found,) = resolve(model, name)
        check_model(model, directions.provenance.get("model"), f"vectors at {name!r}")
        edits[found] = Edit(directions, add or {}, ablate, clamp or {}, unit, to)
    return Steering(model, edits)
