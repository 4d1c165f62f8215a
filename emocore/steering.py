"""Steering: add, ablate or clamp directions in a module's output, in the forward pass.

Order within a hook point: ablate, clamp, add. Hooks run in the order they were opened: a capture or monitor opened
inside a `with steer(...)` sees the steered state of that hook point, one opened around it the state before.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .directions import Directions, placed
from .edits import Request
from .errors import ArgumentError, LabelError, ShapeError, near
from .hookpoints import read_output, refuse_compiled, replace_output
from .tables import Edits, Slots

MOST_ROWS = 65536  # sequences, or tokens of a packed batch, whose slots there is memory for


class Steering:
    """Open steering of one model; made by `steer`, removed at the end of its `with` block."""

    def __init__(
        self,
        model: nn.Module,
        places: Mapping[str, Directions],
        requests: Mapping[str | None, Request],
        max_rows: int = MOST_ROWS,
    ) -> None:
        self.model = model
        self._requests = dict(requests)
        self._slots = Slots(max_rows)
        self._in_batch = False
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        given, slots = list(requests.values()), None if None in requests else self._slots
        self.edits = {name: Edits(vectors, given, slots) for name, vectors in places.items()}

    def __enter__(self) -> Steering:
        if self._handles:
            raise ArgumentError("steer: this steering is open already", way_out="Call steer(...) again for a second.")
        refuse_compiled(self.model, "steer")
        tensors = [*self.model.parameters(), *self.model.buffers()]
        weights = {_address(t) for t in tensors}
        modules = dict(self.model.named_modules())
        for name, edits in self.edits.items():
            like = next(modules[name].parameters(), tensors[0] if tensors else None)
            if like is not None:
                edits.place(like.device, like.dtype)
            hook = _editor(edits, weights)
            self._handles.append(modules[name].register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextlib.contextmanager
    def batch(self, requests: Sequence[str | None], cu_seqlens: Tensor | None = None) -> Iterator[None]:
        """The forwards inside edit each sequence as its request says, and leave one of None as it is, bit for bit.

        requests: one a sequence, in the order of the batch; of a packed batch with its bounds `cu_seqlens` [B + 1].
        They are filled into fixed memory: a CUDA graph replays with those of the batch it is replayed in.
        Raises ArgumentError, LabelError or ShapeError.
        """
        slots = self._slots_of(requests, cu_seqlens)
        if self._in_batch:
            raise ArgumentError("batch: one is open already", way_out="A steering has one batch at a time.")
        self._fill(slots)
        self._in_batch = True
        try:
            yield
        finally:
            self._fill(None)
            self._in_batch = False

    def _fill(self, slots: Tensor | None) -> None:
        self._slots.fill(slots)
        for edits in self.edits.values():
            edits.look()

    def _slots_of(self, requests: Sequence[str | None], cu_seqlens: Tensor | None) -> Tensor:
        place: dict[str | None, int] = {name: i for i, name in enumerate(self._requests, 1)}
        if None in place:
            raise ArgumentError("batch: every sequence is steered alike", way_out="Give steer(requests={...}).")
        for name in requests:
            if name is not None and name not in place:
                raise LabelError(f"request {name!r}: unknown", way_out=near(name, [str(n) for n in place]))
        slots = torch.tensor([0 if name is None else place[name] for name in requests], dtype=torch.int32)
        if cu_seqlens is None:
            return slots
        lengths = cu_seqlens.diff().cpu()
        if len(lengths) != len(slots):
            raise ShapeError("requests: of a packed batch", expected=f"{len(lengths)}, one a sequence", got=len(slots))
        return slots.repeat_interleave(lengths)

    def change(
        self,
        *,
        add: Mapping[str, float] | None = None,
        ablate: str | Sequence[str] = (),
        clamp: Mapping[str, float] | None = None,
        when: Mapping[str, float] | None = None,
        requests: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """From the next forward on do this instead, or for these of the requests; units and references stay.

        It is filled into the memory of what it replaces where it sets as many directions: neither a compiled model nor
        a CUDA graph notices. Raises what `steer` raises.
        """
        first = next(iter(self._requests.values()))
        new = _requests(add, ablate, clamp, when, requests, first.unit, first.to)
        for name in new:
            if name not in self._requests:
                raise ArgumentError(
                    "change: this steering has no such request", got=name, expected=list(self._requests)
                )
        self._requests |= new
        for edits in self.edits.values():
            edits.fill(list(self._requests.values()))


def _requests(
    add: Mapping[str, float] | None,
    ablate: str | Sequence[str],
    clamp: Mapping[str, float] | None,
    when: Mapping[str, float] | None,
    requests: Mapping[str, Mapping[str, Any]] | None,
    unit: str,
    to: str,
) -> dict[str | None, Request]:
    """The requests by name, or the one without a name."""
    if requests is None:
        return {None: Request(add or {}, ablate, clamp or {}, when or {}, unit, to)}
    if add or ablate or clamp or when:
        raise ArgumentError("requests: beside an edit of every row", way_out="Give each edit under a name of its own.")
    if not requests:
        raise ArgumentError("requests: an empty mapping", way_out="Give at least one.")
    return {name: Request.of(name, given, unit=unit, to=to) for name, given in requests.items()}


def _editor(edits: Edits, weights: set[int]) -> Any:
    def act(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = read_output(output)
        # a compiler sees to memory itself
        free = not torch.compiler.is_compiling() and not edits.nothing
        edited = edits(hidden, in_place=free and _is_free(hidden, weights, (args, kwargs, output)))
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
    when: Mapping[str, float] | None = None,
    requests: Mapping[str, Mapping[str, Any]] | None = None,
    unit: str = "residual_norm",
    to: str = "zero",
    max_rows: int = MOST_ROWS,
) -> Steering:
    """Steer every token along named directions while the `with` block runs the model.

    add: {name: strength}, in fractions of the mean residual norm (`unit="absolute"`: in activation units) along the
    unit pattern. ablate: names whose span is removed, or set to the centre's with `to="baseline"`. clamp: {name: score}
    along the unit pattern, in the same unit, from zero or from the baseline. when: {name: level}: only tokens whose
    score exceeds its level, of each of these names; scores before the edit, z where the vectors are calibrated, else
    centred. requests: {name: {"add": ..., "ablate": ..., "clamp": ..., "when": ...}}, of which `Steering.batch` says
    which sequence has which; at most `max_rows` of them, or tokens of a packed batch.
    A mapping of vectors steers each of its hook points at full strength. Strength 0 is bit-exact. Raises ArgumentError,
    HookPointError, LabelError; CaptureError for a model that is compiled already; ShapeError at a forward.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
    >>> up = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    >>> zero, one = torch.zeros(2, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    >>> v = Directions(("up",), up, up / 2, centre=zero, mean_norm=4.0, residual=one, hook_point="0")
    >>> with torch.no_grad(), steer(model, v, add={"up": 0.5}):
    ...     model(torch.zeros(1, 2))
    tensor([[0., 2.]])
    >>> with torch.no_grad(), steer(model, v, requests={"higher": {"add": {"up": 1.0}}}) as steering:
    ...     with steering.batch(requests=[None, "higher"]):
    ...         model(torch.zeros(2, 2))
    tensor([[0., 0.],
            [0., 4.]])
    """
    asked = _requests(add, ablate, clamp, when, requests, unit, to)
    return Steering(model, placed(model, vectors), asked, max_rows)
