"""A process that imports everything once and, for each line of JSON that it is sent, forks a writer that may be killed.

The writer says what became of its commits, a line of JSON each; the last line of an answer says how it ended.
faults.c and looks.c are preloaded.
"""

import gc
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import torch

from emocore import ActivationStore
from emocore.errors import BackpressureError, StoreError
from emocore.ring import Ring, sample

sys.path.insert(0, str(Path(__file__).parent))
from faults import Plan, begin, end, failed, mark
from subjects import SUBJECTS, add

FAULTY = 3

Say = Callable[[Any], None]


def write(say: Say, order: dict[str, Any]) -> None:
    """Commits in a row, from the first on, under a plan of faults."""
    path, record = Path(order["path"]), -1
    say("born")
    if order.get("stopped"):
        os.kill(os.getpid(), signal.SIGSTOP)
    if "record" in order:
        record = os.open(order["record"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    begin(Path(order.get("below", path)), order.get("plan", Plan.COUNT), order.get("at", 0), record=record)
    with closing(SUBJECTS[order["subject"]].commits(path, order["first"])) as commits:
        for number in itertools.islice(commits, order.get("commits")):
            mark(number)
            say(number)
    say({"calls": end()})


# --- faults that the process survives


def anew(subject: Any, path: Path) -> Iterator[Callable[[int], None]]:
    """Four writers, one a commit."""

    def commit(number: int) -> None:
        with closing(subject.commits(path, number)) as commits:
            next(commits)

    yield from itertools.repeat(commit, 4)


def held(subject: Any, path: Path) -> Iterator[Callable[[int], None]]:
    """One writer of all four."""
    with ActivationStore(path) as kept:

        def commit(number: int) -> None:
            try:
                add(kept, number)
                kept.commit()
            finally:
                for ledger in kept.ledger.values():
                    assert ledger.rows.formed == ledger.rows.accumulated + ledger.rows.dropped

        yield from itertools.repeat(commit, 4)


def endure(say: Say, order: dict[str, Any]) -> None:
    """Commits 1 to 4 in a folder of their own, again and again; a call of the third fails, another one every time."""
    subject, writers = SUBJECTS[order["subject"]], {"anew": anew, "held": held}[order["writers"]]
    for at in itertools.count(1, order["step"]):
        path, said, calls, found = Path(order["path"]) / str(at), None, 0, []
        path.mkdir(parents=True)
        with closing(writers(subject, path)) as commits:
            for number, commit in enumerate(commits, 1):
                begin(path, order["plan"] if number == FAULTY else Plan.COUNT, at, order["error"], order["every"])
                try:
                    commit(number)
                except StoreError as error:
                    if number != FAULTY:
                        raise
                    said = str(error)
                counted = end()
                if number == FAULTY:
                    calls, call = counted, failed()
                found.append(subject.found(path))
        next(anew(subject, path))(5)
        found.append(subject.found(path))
        strays = [*subject.strays(path)]
        shutil.rmtree(path)
        gc.collect()
        if at > 1 and calls < at:
            return
        handles = len(os.listdir("/proc/self/fd"))
        say({"at": at, "call": call, "error": said, "found": found, "strays": strays, "handles": handles})


def peruse(say: Say, order: dict[str, Any]) -> None:
    """Two commits, read again and again; another call of the reader fails every time."""
    subject, path = SUBJECTS[order["subject"]], Path(order["path"])
    path.mkdir(exist_ok=True)
    with closing(subject.commits(path, 1)) as commits:
        list(itertools.islice(commits, 2))
    for at in itertools.count(1):
        said, found = None, None
        begin(path, Plan.FAIL, at, order["error"], order["every"])
        try:
            found = subject.read(path)
        except StoreError as error:
            said = str(error)
        calls, call = end(), failed()
        again = subject.read(path)
        gc.collect()
        if calls < at:
            return
        handles = len(os.listdir("/proc/self/fd"))
        say({"at": at, "call": call, "error": said, "found": found, "again": again, "handles": handles})


# --- a disk slower than the rows


def resident() -> int:
    """Bytes of memory in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def starve(say: Say, order: dict[str, Any]) -> None:
    """For some seconds rows come at a steady rate, of which the disk takes a share; says counts and memory's growth."""
    path, rate, share, width = Path(order["path"]), order["rate"], order["share"], 256
    policy = sample(**order["sample"]) if "sample" in order else order["policy"]
    with Ring(slots=16, slot_bytes=1 << 16, throttle=share * rate, timeout=60 if share else 0.01) as ring:
        kept = ActivationStore(path, policy=policy, ring=ring, shard_bytes=1 << 22)
        feed, late, before, start, count = kept.at("a"), 0, 0, time.monotonic(), 0
        while count * width * 4 < rate * order["seconds"]:
            x = torch.arange(count, count + 64.0).unsqueeze(1).expand(64, width)
            count += 64
            before = before if count * width * 4 > 4 << 20 else resident()  # a ring's memory is used when it is filled
            try:
                feed.update(x, requests=[str(i) for i in range(count - 64, count)])
            except BackpressureError:
                late += 1
            feed.ledger.check()
            time.sleep(max(0, start + count * width * 4 / rate - time.monotonic()))
        growth = resident() - before
        try:
            kept.commit()
        except BackpressureError:
            late += 1
        say({"rows": feed.ledger.rows.as_dict(), "late": late, "offered": count, "growth": growth})
        ring.close()
        kept.close()


# --- the process


def warm() -> None:
    """One commit in each format, so that a writer's first takes no longer than its next."""
    for subject in SUBJECTS.values():
        with tempfile.TemporaryDirectory() as folder, closing(subject.commits(Path(folder), 1)) as commits:
            next(commits)


def answer(order: dict[str, Any]) -> None:
    """Fork a writer, pass on what it says, and say how it ended."""
    heard, said = os.pipe()
    child = os.fork()
    if not child:
        _obey(order, said)
    os.close(said)
    with open(heard) as lines:
        print(child, lines.readline(), sep="\n", end="", flush=True)
        if "seconds" in order:
            time.sleep(order["seconds"])
            os.kill(child, signal.SIGKILL)
        for line in lines:
            print(line, end="", flush=True)
    print(json.dumps({"status": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}), flush=True)


def _obey(order: dict[str, Any], said: int) -> NoReturn:
    try:
        work = {"write": write, "endure": endure, "peruse": peruse, "starve": starve}[order["do"]]
        work(lambda what: os.write(said, f"{json.dumps(what)}\n".encode()), order)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)  # a child has no team of threads
    warm()
    gc.freeze()  # what was imported need not be looked through by every child
    for line in sys.stdin:
        answer(json.loads(line))
