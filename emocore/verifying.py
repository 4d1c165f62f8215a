"""Verify: every captured row against the model's own hidden states, and the counts against the mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .capturing import capture
from .errors import CaptureError
from .hookpoints import block_names
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
    """Run `inputs` (the model's keywords) once while capturing every block; compare bit for bit with `hidden_states`.

    Block i must equal `hidden_states[i + 1]` at every real token; the last block may differ from it by the model's
    final norm. Raises CaptureError naming hook point, row and difference.
    """
    names = block_names(model)
    with torch.no_grad(), capture(model, names, Rows) as tap:
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
    for name, shown in zip(names, hidden[1:], strict=True):
        rows, expected = tap.sinks[name].rows, shown[real.to(shown.device)]
        if len(rows) != len(expected):
            raise CaptureError(
                f"verify: {name!r} captured another number of rows",
                expected=f"{len(expected)} real tokens",
                got=f"{len(rows)}, and {tap.ledger[name].tokens.nonfinite} that are not finite",
            )
        norm = _final_norm(model, names) if name == names[-1] else None
        if norm is not None and not torch.equal(rows, expected):
            rows = _normed(norm, rows, shown, real)
        _compare(name, rows, expected)
        compared[name] = len(rows)
    return Verified(compared, tap.ledger)


def _final_norm(model: nn.Module, names: list[str]) -> nn.Module | None:
    """The norm that stands beside the list of blocks, the last where there are several."""
    parent = model.get_submodule(names[0].rpartition(".")[0].rpartition(".")[0])
    norms = [module for module in parent.children() if "norm" in type(module).__name__.lower()]
    return norms[-1] if norms else None


def _normed(norm: nn.Module, rows: Tensor, like: Tensor, real: Tensor) -> Tensor:
    """norm(rows), in the shape that the model calls it with: other shapes may round otherwise."""
    whole = torch.zeros_like(like)
    whole[real.to(like.device)] = rows
    with torch.no_grad():
        normed: Tensor = norm(whole)
    return normed[real.to(like.device)]


def _compare(name: str, rows: Tensor, expected: Tensor) -> None:
    other = (rows != expected).any(1)
    if bool(other.any()):
        raise CaptureError(
            f"verify: {name!r}, row {int(other.nonzero()[0])}, differs from the model's hidden state",
            expected="equal values",
            got=f"a difference of up to {float((rows - expected).abs().max()):.3g} in {int(other.sum())} rows",
            way_out="Something alters the residual stream after this hook point: look for hooks on the module.",
        )
