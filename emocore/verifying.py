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

FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


@dataclass(frozen=True)
class Verified:
    """What `verify` found: rows compared per hook point, those without a hidden state to compare with, and the ledgers."""

    rows: Mapping[str, int]
    unseen: tuple[str, ...]
    ledger: Mapping[str, Ledger]

    def __str__(self) -> str:
        lines = [f"{name:<40} {n:>8,} rows equal" for name, n in self.rows.items()]
        lines += [f"{name:<40}          not shown by the model" for name in self.unseen]
        return "\n".join(lines)


def verify(model: nn.Module, inputs: Mapping[str, Any]) -> Verified:
    """Run `inputs` (the model's keywords) once while capturing every block, and compare bit for bit with `hidden_states`.

    Block i must equal `hidden_states[i + 1]` at every real token; the last block is compared after the model's final norm,
    where it has one. Raises CaptureError naming hook point, row and difference.
    """
    names = block_names(model)
    with torch.no_grad(), capture(model, names, Rows) as tap:
        hidden = model(**inputs, output_hidden_states=True).hidden_states
    if hidden is None or len(hidden) != len(names) + 1:
        raise CaptureError(
            "verify: hidden_states",
            expected=f"{len(names) + 1} entries, the embeddings and every block",
            got=None if hidden is None else len(hidden),
            way_out="Verify needs a model that returns output_hidden_states.",
        )
    mask = inputs.get("attention_mask")
    shown = hidden[0].shape[:2]
    real = torch.ones(shown, dtype=torch.bool) if mask is None else mask.to("cpu") != 0
    compared: dict[str, int] = {}
    unseen: list[str] = []
    for i, name in enumerate(names):
        rows, expected = tap.sinks[name].rows, hidden[i + 1]
        if i == len(names) - 1 and not _equal(rows, expected, real):
            norm = _final_norm(model)
            if norm is None:
                unseen.append(name)
                continue
            with torch.no_grad():
                rows = norm(rows)
        _compare(name, rows, expected, real)
        compared[name] = len(rows)
    return Verified(compared, tuple(unseen), tap.ledger)


def _equal(rows: Tensor, expected: Tensor, real: Tensor) -> bool:
    return len(rows) == int(real.sum()) and torch.equal(rows, expected[real.to(expected.device)])


def _final_norm(model: nn.Module) -> nn.Module | None:
    found = [m for name, m in model.named_modules() if name.rpartition(".")[2] in FINAL_NORMS and name.count(".") < 2]
    return found[0] if len(found) == 1 else None


def _compare(name: str, rows: Tensor, expected: Tensor, real: Tensor) -> None:
    expected = expected[real.to(expected.device)]
    if len(rows) != len(expected):
        raise CaptureError(f"verify: {name!r} captured another number of rows", expected=len(expected), got=len(rows))
    same = (rows == expected).all(1)
    if not bool(same.all()):
        at = int((~same).nonzero()[0])
        worst = float((rows - expected).abs().max())
        raise CaptureError(
            f"verify: {name!r}, row {at}, differs from the model's hidden state",
            expected="equal values",
            got=f"a difference of up to {worst:.3g} in {int((~same).sum())} rows",
            way_out="The captured rows are not the residual stream: report the model's class.",
        )
