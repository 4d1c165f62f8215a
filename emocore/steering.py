"""Steering: add, ablate or clamp directions in a module's output, in the forward pass.

Directions are not orthogonal. With unit patterns V [R, D]: ablate is x - QQ'x for an orthonormal basis Q of their
span; clamp is x + (c - Vx) (VV')^+ V, so that every clamped score is c at once. Order within a hook point: ablate,
clamp, add. Hooks run in the order they were opened: a capture or monitor opened inside a `with steer(...)` sees the
steered state of that hook point, one opened around it the state before.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import linalg, ops
from .directions import Directions, placed
from .errors import ArgumentError, ShapeError
from .hookpoints import read_output, replace_output

UNITS = ("residual_norm", "absolute")
REFERENCES = ("zero", "baseline")
SAME = 1e-10  # eigenvalues of VV' below this of the largest belong to directions that are one


class Edit:
    """What is done to the hidden state at one hook point; built once, applied to [..., D] of any float dtype."""

    def __init__(
        self,
        vectors: Directions,
        *,
        add: Mapping[str, float],
        ablate: Sequence[str],
        clamp: Mapping[str, float],
        unit: str = "residual_norm",
        to: str = "zero",
    ) -> None:
        scale = vectors.mean_norm if unit == "residual_norm" else 1.0
        centre = vectors.centre if to == "baseline" else torch.zeros_like(vectors.centre)
        self.dim = vectors.dim
        self._sets: list[tuple[Tensor, Tensor, Tensor]] = []  # basis [R, D], dual [R, D], target [R]
        self._delta: Tensor | None = None  # [D]
        self._moved: dict[tuple[torch.device, torch.dtype], tuple[Any, Tensor | None]] = {}
        if ablate:
            q = linalg.orthonormal_span(vectors[ablate].unit)
            self._sets.append((q, q, q @ centre))
        if clamp:
            v = vectors[list(clamp)].unit
            value = scale * torch.tensor(list(clamp.values()), dtype=torch.float64)
            inverse = torch.linalg.pinv(v @ v.T, hermitian=True, rtol=SAME)
            _check_reachable(v @ v.T @ inverse @ value, value, list(clamp))
            self._sets.append((v, inverse @ v, value + v @ centre))
        pushes = {name: s for name, s in add.items() if s != 0}
        if pushes:
            strength = scale * torch.tensor(list(pushes.values()), dtype=torch.float64)
            self._delta = strength @ vectors[list(pushes)].unit

    @property
    def adds_only(self) -> bool:
        """Whether it may act in place: nothing is read before it is written."""
        return not self._sets and self._delta is not None

    def __call__(self, hidden: Tensor, in_place: bool = False) -> Tensor:
        """The edited hidden state; the very tensor where nothing is to be done, or all was done in place.

        `in_place` needs a contiguous tensor that nobody else reads. Raises ShapeError.
        """
        if hidden.shape[-1] != self.dim:
            raise ShapeError("steer: width of the hidden state", expected=self.dim, got=hidden.shape[-1])
        sets, delta = self._at(hidden)
        if delta is not None and in_place and not sets:
            ops.steer_add_(hidden.view(-1, self.dim), delta)
            torch.autograd.graph.increment_version(hidden)
            return hidden
        x = rows = hidden.reshape(-1, self.dim)
        for basis, dual, target in sets:
            x = ops.steer_set(x, basis, dual, target)
        if delta is not None:
            x = ops.steer_add(x, delta)
        return hidden if x is rows else x.reshape(hidden.shape)

    def _at(self, x: Tensor) -> tuple[Any, Tensor | None]:
        """Sets and delta on x's device; the delta as float32, or as float64 for float64 rows."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        key = (x.device, wide)
        if key not in self._moved:
            # a model may be run in inference mode first and trained afterwards
            with torch.inference_mode(False), torch.no_grad():
                sets = [tuple(t.to(x.device) for t in one) for one in self._sets]
                delta = None if self._delta is None else self._delta.to(x.device, wide)
                self._moved[key] = (sets, delta)
        return self._moved[key]


def _check_reachable(reached: Tensor, value: Tensor, names: list[str]) -> None:
    off = (reached - value).abs() > 1e-6 * value.abs().max()
    if bool(off.any()):
        raise ArgumentError(
            "clamp: the same direction under several names cannot have several scores",
            got=[name for name, bad in zip(names, off.tolist(), strict=True) if bad],
            way_out="Clamp one of them.",
        )


class Steering:
    """Open steering of one model; made by `steer`, removed at the end of its `with` block."""

    def __init__(self, model: nn.Module, edits: Mapping[str, Edit]) -> None:
        self.model, self.edits = model, edits
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Steering:
        if self._handles:
            raise ArgumentError("steer: this steering is open already", way_out="Call steer(...) again for a second.")
        weights = {_address(t) for t in [*self.model.parameters(), *self.model.buffers()]}
        modules = dict(self.model.named_modules())
        for name, edit in self.edits.items():
            hook = _editor(edit, weights)
            self._handles.append(modules[name].register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _editor(edit: Edit, weights: set[int]) -> Any:
    def act(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = read_output(output)
        free = edit.adds_only and _is_free(hidden, weights, (args, kwargs, output))
        edited = edit(hidden, in_place=free)
        return None if edited is hidden else replace_output(output, edited)

    return act


def _is_free(hidden: Tensor, weights: set[int], around: Any) -> bool:
    """Whether writing to `hidden` is seen by its readers alone: not by autograd, the caller, the weights or a view."""
    if torch.is_grad_enabled() or hidden.requires_grad or not hidden.is_contiguous():
        return False
    address = _address(hidden)
    whole = hidden.untyped_storage().nbytes() == hidden.nbytes
    return whole and address not in weights and sum(_address(t) == address for t in _tensors(around)) == 1


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers, once for each time it stands there."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors(list(vars(value).values()))


def steer(
    model: nn.Module,
    vectors: Directions | Mapping[str, Directions],
    *,
    add: Mapping[str, float] | None = None,
    ablate: str | Sequence[str] = (),
    clamp: Mapping[str, float] | None = None,
    unit: str = "residual_norm",
    to: str = "zero",
) -> Steering:
    """Steer every token along named directions while the `with` block runs the model.

    add: {name: strength}, in fractions of the mean residual norm (`unit="absolute"`: in activation units) along the
    unit pattern. ablate: names whose span is removed, or set to the centre's with `to="baseline"`. clamp: {name: score}
    along the unit pattern, in the same unit, from zero or from the baseline. A mapping steers each of its hook points
    at full strength. Strength 0 is bit-exact. Raises ArgumentError, HookPointError, LabelError; ShapeError at a
    forward.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
    >>> up = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    >>> zero, one = torch.zeros(2, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    >>> v = Directions(("up",), up, up / 2, centre=zero, mean_norm=4.0, residual=one, hook_point="0")
    >>> with torch.no_grad(), steer(model, v, add={"up": 0.5}):
    ...     model(torch.zeros(1, 2))
    tensor([[0., 2.]])
    """
    add, clamp = add or {}, clamp or {}
    ablate = [ablate] if isinstance(ablate, str) else list(dict.fromkeys(ablate))
    if not add and not ablate and not clamp:
        raise ArgumentError("steer: nothing to do", way_out="Give add=, ablate= or clamp=.")
    for argument, value, known in (("unit", unit, UNITS), ("to", to, REFERENCES)):
        if value not in known:
            raise ArgumentError(argument, expected=" or ".join(map(repr, known)), got=repr(value))
    both = sorted(set(ablate) & set(clamp))
    if both:
        raise ArgumentError("ablate, clamp: a direction is in both", got=both)
    for name, strength in [*add.items(), *clamp.items()]:
        if not math.isfinite(strength):
            raise ArgumentError(f"add, clamp: {name!r}", expected="a finite number", got=strength)
    edits = {
        name: Edit(directions, add=add, ablate=ablate, clamp=clamp, unit=unit, to=to)
        for name, directions in placed(model, vectors).items()
    }
    return Steering(model, edits)
