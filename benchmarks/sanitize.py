"""Every kernel once on a small case, each checked against float64: what compute-sanitizer is run on.

Run it with `make gpu`. A kernel that is not there is named; the status is 1 if a result is wrong.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import emocore
from emocore import Directions, ops
from emocore.calibration import Calibration
from emocore.linalg import tile_count, unit

from .harness import failed
from .machine import Machine, poisoned
from .ours import lacks_op, lacks_step
from .passing import DRAIN, FORWARD, SEQUENCE, STORED, Passing, bound_16, captured
from .ring import Ring
from .shapes import SCALES

BLOCK, DIM, LABELS, POINTS = 512, 257, 5, 2
DRY_DIM, DRY_ROWS = 65, 24  # where kernels are interpreted
ROUNDED, SCORED = 1e-2, 1e-4  # of what is rounded to 16 bits; of scores of 16-bit rows

Check = tuple[str, Callable[[], float], float]  # name, error against float64, bound


def off(found: Tensor, exact: Tensor) -> float:
    """Largest difference relative to the largest exact value; 0 where both are 0."""
    return float((found.double() - exact.double()).abs().max() / exact.double().abs().max().clamp_min(1e-30))


def arguments(machine: Machine, dim: int, n: int) -> dict[str, tuple[Any, ...]]:
    """What every op is called with, on bfloat16 rows."""
    g = machine.generator(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=machine.device, dtype=torch.float64)

    def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=machine.device)

    x, v = normal(n, dim).bfloat16(), unit(normal(LABELS, dim))[0]
    readers, basis, dual = v.float(), v[:2], torch.linalg.pinv(v[:2] @ v[:2].T) @ v[:2]
    packed, offset, shift = v.bfloat16()[None], normal(LABELS).float(), normal(dim)
    slots = torch.arange(n // 2, device=machine.device).remainder(3).int()
    deltas, levels, target = normal(3, dim).float(), normal(3, 1).float(), normal(3, 2).float()
    labels = torch.arange(n, device=machine.device).remainder(LABELS + 1).int() - 1
    starts = torch.tensor([0, 3, n], dtype=torch.int32, device=machine.device)
    tables = (deltas, basis.float(), dual.float(), target, None)
    staged = (torch.empty_like(x), zeros(n), zeros(n, dtype=torch.bool))
    found: dict[str, tuple[Any, ...]] = {
        "stage": (x, None, *staged),
        "label_sums": (x, labels, None, shift, zeros(LABELS, dim), zeros(LABELS, dim)),
        "gram": (x, None, shift, zeros(tile_count(dim), 128, 128)),
        "project": (x, readers, shift, False),
        "project_packed": (x, packed, offset, True),
        "project_rows": (x[None], packed[None], offset[None], None, zeros(1, n, LABELS, dtype=torch.float32)),
        "project_steer": (x, packed, offset, slots, deltas),
        "pool_scores": (normal(n, LABELS).float(), starts),
        "steer_add": (x, deltas[0]),
        "steer_set": (x, basis, dual, target[0].double()),
        "steer_rows": (x, slots, *tables),
        "steer_when": (x, slots, readers[:1], levels, *tables),
        "steer_slots": (x, slots, readers[:1], levels),
    }
    return found | {f"{op}_": given for op, given in found.items() if f"{op}_" in ops.SCHEMAS}


def beside_reference(op: str, given: tuple[Any, ...]) -> float:
    """The largest error of what an op gives and writes, against the reference on the same arguments."""
    ours, theirs = ([t.clone() if isinstance(t, Tensor) else t for t in given] for _ in range(2))
    found, right = getattr(torch.ops.emocore, op).default(*ours), ops.REFERENCE[op](*theirs)
    pairs = list(zip(_tensors([found, *ours]), _tensors([right, *theirs]), strict=True))
    return max(off(one, other) for one, other in pairs)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


def drained(machine: Machine, rows: Tensor) -> float:
    """Two blocks by the steps of the drain alone."""
    labels = torch.arange(rows.shape[1], device=rows.device).remainder(LABELS + 1).int() - 1
    ring = Ring.of(machine, rows, labels, LABELS, BLOCK)
    ring.clear()
    ring.frozen.zero_()
    for _ in range(2):
        ring.drain()
    y = rows[-1].double() - ring.shift[-1]
    sums = y.new_zeros(LABELS + 1, y.shape[1]).index_add_(0, labels.long() % (LABELS + 1), y)
    return max(off(ring.scatter(POINTS - 1), y.T @ y), off(ring.totals[-1], sums))


def seen(rows: Tensor) -> float:
    """The same rows through a capture."""
    x = rows[0].reshape(-1, SEQUENCE, rows.shape[2])
    found = captured(emocore.Moments(LABELS, covariance=True, block_rows=BLOCK), [x], [0] * len(x))
    return off(found.covariance(), torch.cov(rows[0].double().T).to(found.covariance().device))


def stored(rows: Tensor) -> float:
    """The same rows through a capture into a store, from a ring that holds two forwards."""
    x = rows[0].reshape(-1, SEQUENCE // 4, rows.shape[2])
    model = Passing(POINTS, x.device, x.dtype)
    with tempfile.TemporaryDirectory() as folder, mock.patch.multiple("emocore.outflow", LEAST=1, RUN=1):
        with torch.no_grad(), emocore.ActivationStore(folder) as kept:  # noqa: SIM117
            with emocore.capture(model, "layers.*", kept, resident=True) as tap:
                for part in x.split(1):
                    with tap.batch(requests=["a"]):
                        model(inputs_embeds=part)
        view = emocore.activations(folder)["layers.1"]
        places = view.places.position.double().reshape(len(x), -1)
        in_order = torch.equal(places, torch.arange(x.shape[1]).double().expand_as(places))
        return off(view.rows, x.reshape(view.rows.shape).cpu()) if in_order else 1.0


def watched(machine: Machine, dim: int) -> float:
    """A monitor on the device beside one on the host, over a prompt and a step."""
    v = unit(torch.randn(LABELS, dim, generator=machine.generator(1), device=machine.device, dtype=torch.float64))[
        0
    ].cpu()
    one, zero = torch.ones(LABELS, dtype=torch.float64), torch.zeros(LABELS, dtype=torch.float64)
    names = tuple(f"d{i}" for i in range(LABELS))
    vectors = Directions(
        names,
        v,
        v.float(),
        torch.zeros(dim, dtype=torch.float64),
        1.0,
        one,
        calibration=Calibration(zero, one, 9, None),
    )
    model = Passing(POINTS, machine.device, torch.bfloat16)
    x = torch.randn(3, 5, dim, generator=machine.generator(2), device=machine.device).bfloat16()
    found: list[Tensor] = []
    for resident in (True, False):
        alarms = {"d0": emocore.Threshold(z=0.5, on="token")}
        places = {f"layers.{i}": vectors for i in range(POINTS)}
        with torch.no_grad(), emocore.monitor(model, places, alarms, resident=resident) as watch:
            for part in (x[:, :4], x[:, 4:]):
                with watch.batch(requests=["a", "b", "c"]):
                    model(inputs_embeds=part.contiguous())
        scores = torch.cat([watch.scores[place][name].cpu() for place in places for name in "abc"])
        found.append(torch.cat([scores.double(), torch.tensor([float(len(watch.alarms))])]))
    return off(*found)


def checks(machine: Machine) -> Iterator[Check]:
    """Every check that has its kernels here; says which have not."""
    dim, n = (DRY_DIM, DRY_ROWS) if machine.dry else (DIM, BLOCK)
    given = arguments(machine, dim, n)
    for op in ops.SCHEMAS:
        if absent := lacks_op(machine, op):
            print(f"{op}: {absent.status}")
        elif op not in given:
            print(f"{op}: missing: no case here")
        else:
            yield op, lambda op=op: beside_reference(op, given[op]), ROUNDED
    for dtype in (torch.bfloat16,) if machine.dry else (torch.bfloat16, torch.float32):
        rows = torch.randn(POINTS, 2 * BLOCK, dim, generator=machine.generator(3), device=machine.device).to(dtype)
        for name, steps, call in (
            ("drain", DRAIN, lambda rows=rows: drained(machine, rows)),
            ("capture", FORWARD, lambda rows=rows: seen(rows)),
            ("capture into a store", STORED, lambda rows=rows: stored(rows)),
        ):
            if absent := lacks_step(machine, *steps):
                print(f"{name} {dtype}: {absent.status}")
            else:
                yield f"{name} {dtype}", call, bound_16(2 * BLOCK)
    if absent := lacks_step(machine, "track"):
        print(f"monitor: {absent.status}")
    else:
        yield "monitor", lambda: watched(machine, dim), SCORED


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="on the CPU, interpreted")
    parser.add_argument("--raw", action="store_true", help="new memory is what it was: for a tool that follows it")
    given = parser.parse_args()
    dry, memory = given.dry, nullcontext if given.raw else poisoned
    device = torch.device("cuda" if torch.cuda.is_available() and not dry else "cpu")
    machine = Machine(device, dry, SCALES["tiny"])
    wrong = 0
    with ops.use("triton" if dry else "auto"), memory():
        for name, check, bound in checks(machine):
            try:
                error = check()
            except Exception as raised:  # the next kernel is still to be looked at
                print(f"{name}: {failed(raised)}")
                wrong += 1
                continue
            wrong += not error <= bound
            print(f"{name}: errs by {error:.1e}, may by {bound:.0e}{'' if error <= bound else '  WRONG'}", flush=True)
    machine.synchronize()
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
