"""Verify: every captured row against the model's own hidden states, and the counts against the mask."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .capturing import capture
from .errors import CaptureError
from .hookpoints import block_names, read_output
from .ledger import Ledger
from .rows import Rows


@dataclass(frozen=True)
class Verified:
    """What `verify` found: rows compared per hook point, and the ledgers."""

    rows: Mapping[str, int]
    ledger: Mapping[str, Ledger]

    def __str__(self) -> str:
        return "\n".join(f"{name:<40} {n:>8,} rows equal" for name, n in self.rows.items())


def verify(model: nn.Module, inputs: Mapping[str, Any]) -> Verified:
    """Run `inputs` (the model's keywords) once while capturing every block, and compare every row bit for bit.

    At every real token the output of block i must be what block i + 1, or the final norm, is given, and must be
    `hidden_states[i + 1]`; the last of these through the final norm, where the model shows it so. Raises CaptureError
    naming hook point, row and difference.
    """
    names = block_names(model)
    norm = _final_norm(model, names)
    readers = [model.get_submodule(name) for name in names[1:]] + ([norm] if norm is not None else [])
    with torch.no_grad(), capture(model, names, Rows) as tap, _inputs_of(readers) as given:
        hidden = getattr(model(**inputs, output_hidden_states=True), "hidden_states", None)
    if hidden is None or len(hidden) != len(names) + 1:
        raise CaptureError(
            "verify: hidden_states",
            expected=f"{len(names) + 1} entries, the embeddings and every block",
            got=None if hidden is None else len(hidden),
            way_out="Verify needs a model that returns output_hidden_states.",
        )
    mask = inputs.get("attention_mask")
    real = torch.ones(hidden[0].shape[:2], dtype=torch.bool) if mask is None else mask.to("cpu") != 0
    compared: dict[str, int] = {}
    for i, name in enumerate(names):
        rows, shown = tap.sinks[name].rows, hidden[i + 1]
        if len(rows) != int(real.sum()):
            raise CaptureError(
                f"verify: {name!r} captured another number of rows",
                expected=f"{int(real.sum())} real tokens",
                got=f"{len(rows)}, and {tap.ledger[name].tokens.nonfinite} that are not finite",
            )
        if i in given and given[i].shape == shown.shape:
            _compare(name, rows, given[i], real, "what the model goes on with")
        if norm is not None and name == names[-1] and not torch.equal(rows, _at(shown, real)):
            rows = _normed(norm, rows, shown, real)
        _compare(name, rows, shown, real, "the model's hidden state")
        compared[name] = len(rows)
    return Verified(compared, tap.ledger)


def _final_norm(model: nn.Module, names: list[str]) -> nn.Module | None:
    """The norm that stands beside the list of blocks, the last where there are several."""
    parent = model.get_submodule(names[0].rpartition(".")[0].rpartition(".")[0])
    norms = [module for module in parent.children() if "norm" in type(module).__name__.lower()]
    return norms[-1] if norms else None


@contextlib.contextmanager
def _inputs_of(modules: list[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """What each module is given first [B, T, D], by its place in the list, before any hook of its own."""
    given: dict[int, Tensor] = {}

    def keep(place: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given[place] = read_output((*args, *kwargs.values())).clone()

        return hook

    handles = [
        module.register_forward_pre_hook(keep(place), prepend=True, with_kwargs=True)
        for place, module in enumerate(modules)
    ]
    try:
        yield given
    finally:
        for handle in handles:
            handle.remove()


def _at(hidden: Tensor, real: Tensor) -> Tensor:
    return hidden[real.to(hidden.device)]


def _normed(norm: nn.Module, rows: Tensor, like: Tensor, real: Tensor) -> Tensor:
    """norm(rows), in the shape that the model calls it with: other shapes may round otherwise."""
    whole = torch.zeros_like(like)
    whole[real.to(like.device)] = rows
    with torch.no_grad():
        return _at(norm(whole), real)


def _compare(name: str, rows: Tensor, whole: Tensor, real: Tensor, what: str) -> None:
    expected = _at(whole, real)
    other = (rows != expected).any(1)
    if bool(other.any()):
        raise CaptureError(
            f"verify: {name!r}, row {int(other.nonzero()[0])}, differs from {what}",
            expected="equal values",
            got=f"a difference of up to {float((rows - expected).abs().max()):.3g} in {int(other.sum())} rows",
            way_out="Something alters the residual stream after this hook point: look for hooks on the module.",
        )
