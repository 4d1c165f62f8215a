"""A billion rows of one hook point through a capture: rows a second, and the error against float64 at the end.

The rows are a few batches, each shown as often as the others, so that float64 knows their covariance exactly.
Run it with `make gpu`.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import emocore

from .bench_accuracy import correlation_error, rows, scatter, second, variance_error
from .machine import Machine, environment
from .ours import lacks_step
from .passing import FORWARD, Passing, moments
from .report import DRY, file_name
from .shapes import SCALES

ROWS, DIM, BATCH, BATCHES = 10**9, 4096, 16_384, 4
LOOK = 64  # rounds of all batches between looks at the clock


def run(machine: Machine, seconds: float, seed: int = 0) -> dict[str, Any]:
    """Accumulate until a billion rows are in, or the time is up."""
    tiny = machine.scale.tiny
    batch, dim = machine.scale.rows(BATCH, tiny=256), machine.scale.dim(384 if tiny else DIM)
    parts = rows(machine, seed, 2.0, torch.bfloat16, batch, BATCHES, dim)
    model, found = Passing(1, machine.device, torch.bfloat16), moments(machine.scale.block, tiny)
    wanted = -(-machine.scale.rows(ROWS, tiny=1024) // (batch * BATCHES))
    done, took = 0, 0.0
    with torch.no_grad(), emocore.capture(model, {"layers.0": found}, resident=True):
        for part in parts:  # memory and kernels
            model(inputs_embeds=part)
        machine.synchronize()
        start = time.perf_counter()
        while done < wanted and took < seconds:
            for _ in range(min(LOOK, wanted - done)):
                for part in parts:
                    model(inputs_embeds=part)
                done += 1
            machine.synchronize()
            took = time.perf_counter() - start
    return {"rows": done * batch * BATCHES, "complete": done == wanted, "seconds": took, "dim": dim} | _errors(
        found, parts, (done + 1) * BATCHES * batch
    )


def _errors(found: emocore.Moments, parts: list[Tensor], n: int) -> dict[str, float]:
    """Of n rows in all, each batch's as often."""
    seen = sum(part.shape[0] * part.shape[1] for part in parts)
    exact = second(scatter(parts) * ((seen - 1) / seen) * (n / (n - 1)))
    covariance = found.covariance()
    return {
        "missing rows": float(n - found.count),
        "variance error": variance_error(covariance, exact),
        "correlation error": correlation_error(covariance, exact[1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--results", type=Path, default=Path("."))
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not given.dry else "cpu")
    machine = Machine(device, given.dry, SCALES["tiny" if given.dry else "full"])
    with emocore.ops.use("triton" if given.dry else "auto"):
        absent = lacks_step(machine, *FORWARD)
        if absent is not None:
            print(f"a billion rows: {absent.status}")
            return
        found = run(machine, given.seconds)
    rate = found["rows"] / found["seconds"]
    short = "" if found["complete"] else f" of {ROWS:,}: the time was up"
    print(f"{found['rows']:,} rows{short} of D={found['dim']} in {found['seconds']:.1f} s, {rate / 1e6:,.1f} M rows/s")
    print(", ".join(f"{name} {found[name]:.2g}" for name in ("missing rows", "variance error", "correlation error")))
    if given.dry:
        print(DRY)
    date = datetime.now()
    path = given.results / file_name(f"{machine.name} billion", date)
    record = {"dry": given.dry, "date": date.isoformat(timespec="seconds"), "environment": environment(machine)}
    path.write_text(json.dumps(record | found | {"rows a second": rate}, indent=1) + "\n")


if __name__ == "__main__":
    main()
