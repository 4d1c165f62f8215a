"""Resident: which captures stay on the device, and the hooks of those that do; they trace under torch.compile."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import ops
from .batches import CACHES
from .errors import ArgumentError
from .hookpoints import bare, read_output, refuse_compiled
from .moments import Moments
from .seats import ROWS
from .sinks import Binding

if TYPE_CHECKING:
    from .lanes import Lane


def residence(
    model: nn.Module, points: Mapping[str, Sequence[Binding]], fires: int, wanted: bool | None
) -> torch.device | None:
    """The device a capture stays on, None for one whose rows go to their sinks at every commit.

    Raises ArgumentError where it is wanted and cannot be, CaptureError for a model that was compiled before.
    """
    parameters = list(model.parameters())
    devices = {p.device for p in parameters}
    device = next(iter(devices)) if len(devices) == 1 else None
    if wanted is False or (wanted is None and (device is None or device.type != "cuda")):
        return None
    sinks = [binding for bindings in points.values() for binding in bindings]
    reasons = {
        "the model is on several devices, or has no parameters": device is None,
        "a sink is no Moments, monitor's or ActivationStore's": not all(
            isinstance(b.sink, Moments) or any(getattr(b.sink, n, None) is not None for n in ("onlooker", "receiver"))
            for b in sinks
        ),
        "a Moments holds float64 rows": any(
            isinstance(b.sink, Moments) and b.sink.exact and b.rule.pool is None for b in sinks
        ),
        "a module fires more than once": fires != 1,
        "the model is float64": all(p.dtype not in ROWS for p in parameters),
    }
    against = [reason for reason, holds in reasons.items() if holds]
    if against and wanted:
        raise ArgumentError("resident", got=f"True, but {against[0]}", way_out="Use capture(resident=None).")
    if against:
        return None
    refuse_compiled(model, "capture")
    return device


def hooks(lane: Lane, model: nn.Module, modules: Sequence[nn.Module]) -> list[torch.utils.hooks.RemovableHandle]:
    """Register the hooks of a lane; they hold no state of their own."""
    places = {name: i for i, name in enumerate(inspect.signature(bare(model).forward).parameters)}
    order, handle = lane.order, lane.handle

    def given(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in kwargs:
            return kwargs[name]
        return args[places[name]] if name in places and places[name] < len(args) else None

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shown = given("input_ids", args, kwargs)
        if shown is None:
            shown = given("inputs_embeds", args, kwargs)
        if shown is None:
            shown = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        mask = given("attention_mask", args, kwargs)
        cache = next((c for name in CACHES if (c := given(name, args, kwargs)) is not None), None)
        past = 0 if cache is None else cache.get_seq_length()
        past_at = past if isinstance(past, Tensor) else None
        ops.lane_begin(order, mask, shown, past_at, 0 if past_at is not None else past, handle)

    def stager(point: int) -> Any:
        def stage(module: nn.Module, args: Any, output: Any) -> None:
            ops.lane_stage(order, read_output(output).detach(), handle, point)

        return stage

    def commit(module: nn.Module, args: Any, output: Any) -> None:
        ops.lane_commit(order, handle)

    def abandon(module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            lane.abandon()

    return [
        model.register_forward_pre_hook(begin, with_kwargs=True),
        *(module.register_forward_hook(stager(i)) for i, module in enumerate(modules)),
        model.register_forward_hook(commit),
        model.register_forward_hook(abandon, always_call=True),
    ]
