"""One small file of every format, as the current code writes them.

Those of every format are kept for ever in `data/format<n>`, and are not written again: a new format gets a folder of
its own, by `python tests/golden.py tests/data/format<n>`.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from emocore import ActivationStore, Moments, Tokens, save, store
from emocore.calibration import Calibration, StreamReference
from emocore.directions import Directions


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def directions() -> Directions:
    """Two directions with all that they may carry."""
    counted = torch.arange(12.0, dtype=torch.float64)
    stream = StreamReference(
        0.125, 16, 90, counted[:6].reshape(3, 2), counted[1:7].reshape(3, 2), counted.reshape(3, 2, 2)
    )
    return Directions(
        names=("at ease", "grief-stricken"),
        patterns=torch.stack([f64(3, 4, 0), f64(0, 0, -2)]),
        readers=torch.tensor([[0.6, 0.8, 0], [0, 0, -1]]),
        centre=f64(1, 2, 3),
        mean_norm=13.25,
        residual=f64(1, 0.5),
        hook_point="model.layers.20",
        tokens=Tokens(skip=49, pool="mean"),
        calibration=Calibration(f64(0.5, -0.5), f64(2, 4), 90, Tokens(), stream),
        provenance={"method": "difference", "model": "Toy(hidden_size=3)"},
    )


def by_hook_point() -> dict[str, Directions]:
    """Plain directions at two hook points of different width."""
    one, other = f64(0, 5), f64(6, 0, 8)
    return {
        name: Directions((label,), v[None], (v / v.norm())[None], torch.zeros_like(v), 2.0, f64(1), name)
        for name, label, v in (("layers.0", "calm", one), ("layers.1", "sad 🙂", other))
    }


def moments() -> Moments:
    """Labelled rows with a covariance, one of them refused."""
    found = Moments(["calm", "on edge"], covariance=True)
    found.tokens = Tokens(skip=1)
    rows = torch.tensor([[3.0, 4, 0], [0, 0, 2], [6, 8, 0], [0, torch.nan, 1], [0, 0, 4]])
    found.update(rows, torch.tensor([0, 1, 0, 1, -1]))
    return found


def activations(folder: Path) -> None:
    """Two commits at three hook points, of which the second has a row that is not finite and the third no other."""
    with ActivationStore(folder, labels=["calm", "on edge"], model="toy") as kept:
        where = {"labels": ["calm", None], "requests": ["é", "r"], "sequence": torch.tensor([0, 1])}
        where |= {"position": torch.tensor([1, 2]), "token": torch.tensor([3, -1])}
        kept.at("layers.0").update(torch.tensor([[1, -2], [0.5, 256]], dtype=torch.bfloat16), **where)
        kept.at("layers.1").update(torch.tensor([[1.25, 0, 3], [-1, 2.0**100, 0.1]]), **where)
        kept.commit()
        where = {"labels": ["on edge", "calm"], "requests": ["r", "r"], "sequence": torch.tensor([2, 2])}
        kept.at("layers.0").update(torch.tensor([[3, 4], [5, 6]], dtype=torch.bfloat16), **where)
        kept.at("layers.1").update(torch.tensor([[torch.inf, 0, 0], [7, 8, 9]]), **where)
        kept.at("layers.2").update(torch.full((2, 4), torch.nan, dtype=torch.float16), **where)


def ranks(folder: Path) -> None:
    """Two ranks, joined."""
    for rank in range(2):
        with ActivationStore(folder, rank=rank, world=2, labels=["calm"]) as kept:
            rows = torch.tensor([[1, 2], [3, 4]], dtype=torch.float16) + 10 * rank
            kept.at("layers.0").update(rows, ["calm", None], requests=["a", f"b{rank}"])
    store.join(folder)


def write(folder: Path) -> None:
    """All of them below `folder`, which must be empty."""
    folder.mkdir(exist_ok=True)
    if any(folder.iterdir()):
        sys.exit(f"{folder}: is not empty")
    for suffix in (".safetensors", ".h5"):
        save(directions(), folder / f"directions{suffix}")
        save(by_hook_point(), folder / f"by_hook_point{suffix}")
        save(moments(), folder / f"moments{suffix}")
    activations(folder / "activations")
    ranks(folder / "ranks")
    store.to_hdf5(folder / "activations", folder / "exported")
    for lock in folder.rglob("lock"):
        lock.unlink()


if __name__ == "__main__":
    write(Path(sys.argv[1]))
