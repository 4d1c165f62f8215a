"""Rows that come faster than the disk takes them, or from many threads: memory is bounded, and every row counted."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from emocore import ActivationStore, activations, store
from emocore.ring import sample

RATE = 16 << 20  # bytes a second
MOST_GROWTH = 8 << 20

SAMPLE = {"p": 0.5, "seed": 3}


@pytest.mark.parametrize("share", [0.1, 0.0], ids=["a tenth", "nothing"])
@pytest.mark.parametrize("policy", ["block", "drop", "sample"])
def test_a_disk_slower_than_the_rows(
    policy: str, share: float, driver: Any, scale: Any, ran: Any, memory: Path
) -> None:
    more = {"sample": SAMPLE} if policy == "sample" else {"policy": policy}
    order = {"path": memory / "kept", "rate": RATE, "share": share, "seconds": scale(0.4, 8.0)}
    (said,), status = driver.run("starve", **order, **more)
    assert status == 0
    counts = said["rows"]
    assert counts["formed"] == said["offered"] == sum(counts.values()) - counts["formed"]
    ran(f"{said['offered']:,} rows offered, {counts['accumulated']:,} written, {said['growth'] >> 10:,} KiB more")
    assert said["growth"] <= MOST_GROWTH
    assert bool(said["late"]) == (share == 0)
    found = activations(memory / "kept")["a"] if counts["accumulated"] else ()
    assert len(found) == counts["accumulated"]
    assert bool(counts["accumulated"]) == bool(share)
    if share:
        numbers = found.rows[:, 0]
        assert torch.equal(found.rows, numbers.unsqueeze(1).expand_as(found.rows))
        assert [int(found.places.names[i]) for i in found.places.request] == numbers.tolist()
        assert bool((numbers.diff() > 0).all())
        assert bool(counts["dropped"]) == (policy == "drop")
        if policy != "drop":
            picked = sample(**SAMPLE).picks(0, said["offered"]) if policy == "sample" else torch.ones(said["offered"])
            assert torch.equal(numbers, picked.nonzero().squeeze(1).float())
        store.verify(memory / "kept")


def test_sixteen_threads_and_sixty_four_requests(scale: Any, ran: Any, memory: Path) -> None:
    """Rows that hold the number of their request and their own: every one is found under its request."""
    threads, requests, count = 16, 64, scale(100_000, 1_000_000)

    def produce(kept: ActivationStore, thread: int) -> None:
        numbers = torch.arange(thread * count // threads, (thread + 1) * count // threads)
        for part in numbers.split(125):
            rows = torch.stack([part % requests, part], 1).float()
            kept.at("a").update(rows, requests=[f"request {n % requests}" for n in part.tolist()])

    with ActivationStore(memory, shard_rows=20_000) as kept:
        workers = [threading.Thread(target=produce, args=(kept, i)) for i in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    view = activations(memory)["a"]
    assert torch.equal(view.rows[:, 1].sort().values, torch.arange(count).float())
    names = torch.tensor([int(name.split()[1]) for name in view.places.names])
    assert torch.equal(names[view.places.request].float(), view.rows[:, 0])
    assert store.verify(memory).rows == count
    ran(f"{count:,} rows")
