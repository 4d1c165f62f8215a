"""Threads: every row goes under the label of the batch that its own thread has open."""

import contextlib
import sys
import threading

import pytest
import torch

from emocore import Rows, Tokens, capture
from emocore.errors import CaptureError, LabelError

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def run_all(work, count: int) -> None:
    failed = []

    def guarded(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # hostile: switch between any two lines
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    if failed:
        raise failed[0]


@pytest.mark.parametrize("pool", [None, "mean"])
def test_threads_with_batches_of_their_own_mislabel_no_row(tokenwise, pool) -> None:
    """Ids carry their label: the embedding of id k says which label its row must have."""
    model, labels, rounds = tokenwise(), [str(k) for k in range(64)], 40
    model.embed.weight.data[:] = torch.arange(64.0).unsqueeze(1)
    barrier = threading.Barrier(4)
    with capture(model, "layers.*", lambda: Rows(labels=labels), tokens=Tokens(pool=pool)) as tap:

        def work(i: int) -> None:
            ids = torch.randint(3, 64, (rounds, 3), generator=torch.Generator().manual_seed(i))
            barrier.wait()
            for one in ids:
                with tap.batch(labels=one), torch.no_grad():
                    model(one.unsqueeze(1).expand(3, 5))

        run_all(work, 4)
    per = 3 * (5 if pool is None else 1)
    for i, rows in enumerate(tap.sinks.values()):
        scale, shift = model.layers[i].scale.item(), model.layers[i].shift.item()
        of = rows.rows[:, 0] if i == 0 else (rows.rows[:, 0] - shift) / scale
        assert len(rows) == 4 * rounds * per
        assert int((of / 1.5).round().int().ne(rows.ids).sum()) == 0
    for ledger in tap.ledger.values():
        ledger.check()
        assert (ledger.tokens.selected, ledger.forwards) == (4 * rounds * 15, 4 * rounds)


def test_threads_that_fail_roll_back_only_their_own_forward(tokenwise) -> None:
    model, rounds = tokenwise(), 30
    fail = threading.local()

    def maybe(module, args, output) -> None:
        if getattr(fail, "now", False):
            raise RuntimeError("bomb")

    model.layers[1].register_forward_hook(maybe)
    with capture(model, {"layers.0": Rows()}) as tap:

        def work(i: int) -> None:
            for n in range(rounds):
                fail.now = n % 3 == i % 3
                with contextlib.suppress(RuntimeError), torch.no_grad():
                    model(IDS)

        run_all(work, 4)
    ledger = tap.ledger["layers.0"]
    ledger.check()
    assert (ledger.tokens.selected, ledger.tokens.rolled_back) == (8 * 80, 8 * 40)
    assert len(tap.sinks["layers.0"]) == 8 * 80


def test_a_thread_without_a_context_belongs_to_the_one_open_batch(tokenwise) -> None:
    model, rows = tokenwise(), Rows(labels=["a", "b"])
    with capture(model, {"layers.0": rows}) as tap, tap.batch(labels=["a", "b"]):
        run_all(lambda i: model(IDS), 1)
    assert rows.ids.tolist() == [0] * 4 + [1] * 4


def test_a_thread_without_a_context_beside_several_batches_is_an_error(tokenwise) -> None:
    model, rows = tokenwise(), Rows(labels=["a", "b"])
    opened, done = threading.Barrier(3), threading.Barrier(3)
    with capture(model, {"layers.0": rows}) as tap:

        def work(i: int) -> None:
            if i == 2:
                opened.wait()
                with pytest.raises(CaptureError, match="several batches are open and this thread belongs to none"):
                    model(IDS)
                done.wait()
                return
            with tap.batch(labels=[i, i]):
                opened.wait()
                done.wait()
                model(IDS)

        run_all(work, 3)
    assert rows.ids.bincount().tolist() == [8, 8]


def test_a_label_that_another_batch_gave_is_never_used(tokenwise) -> None:
    model = tokenwise()
    with capture(model, {"layers.0": Rows(labels=["a"])}) as tap:
        with tap.batch(labels=["a", "a"]):
            model(IDS)
        with pytest.raises(LabelError, match="captured without labels"):
            model(IDS)
    assert len(tap.sinks["layers.0"]) == 8
