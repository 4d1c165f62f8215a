"""The ring against full disks, bad handles, interrupted and short writes, forks, signals and a process that ends."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emocore.errors import StoreError
from emocore.ring import Ring, Stream

PAGE = 4096


def noise(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def run(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own."""
    begin = "import os, signal, sys, threading, time, torch\nfrom emocore.ring import Ring\npath = sys.argv[1]\n"
    command = [sys.executable, "-c", begin + code, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}, check=False
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of a megabyte."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no filesystem can be mounted here")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


# --- writes that fail


def fill(stream: Stream) -> None:
    for n in range(600):
        stream.append(noise(PAGE, n))


def test_a_full_disk_is_named_and_stops_only_its_own_stream(small_disk: Path, tmp_path_factory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "rows"
    with open(small_disk / "rows", "wb") as full, open(elsewhere, "wb") as fine, Ring(slots=3, slot_bytes=PAGE) as ring:
        stream, other = ring.stream(full.fileno()), ring.stream(fine.fileno())
        with pytest.raises(StoreError, match=r"could not be written; got No space left on device \(errno 28\)"):
            fill(stream)
        for again in (lambda: stream.append(noise(1)), stream.flush):
            with pytest.raises(StoreError, match="errno 28"):
                again()
        other.append(noise(10 * PAGE))
        other.flush()
        assert ring.live().in_flight == 0
        assert elsewhere.read_bytes() == bytes(noise(10 * PAGE).numpy())
        written = (small_disk / "rows").read_bytes()
        assert written == b"".join(bytes(noise(PAGE, n).numpy()) for n in range(len(written) // PAGE))
        os.truncate(small_disk / "rows", 0)
        with open(small_disk / "again", "wb") as file:  # there is room again, for another stream
            resumed = ring.stream(file.fileno())
            resumed.append(noise(50 * PAGE))
            resumed.flush()
        assert (small_disk / "again").stat().st_size == 50 * PAGE


def test_a_descriptor_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "rows").touch()
    with open(tmp_path / "rows", "rb") as file, Ring(slots=2, slot_bytes=PAGE) as ring:
        stream = ring.stream(file.fileno())
        stream.append(noise(3))
        with pytest.raises(StoreError, match=r"Bad file descriptor \(errno 9\)"):
            stream.flush()
        with pytest.raises(StoreError, match=r"handle 9999: cannot be written to; got Bad file descriptor"):
            ring.stream(9999)


@pytest.mark.parametrize("let_go", [False, True])
def test_an_error_that_nobody_saw_is_raised_at_the_end(tmp_path: Path, let_go: bool) -> None:
    (tmp_path / "rows").touch()
    ring = Ring(slots=2, slot_bytes=PAGE)
    with open(tmp_path / "rows", "rb") as file:
        stream = ring.stream(file.fileno())
        stream.append(noise(3))
        if let_go:
            del stream
        with pytest.raises(StoreError, match="errno 9"):
            ring.close()
    ring.close()


def test_a_limit_of_the_file_size_is_a_short_write_and_then_an_error(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open(tmp_path / "rows", "wb") as file, Ring(slots=2, slot_bytes=4 * PAGE) as ring:
        stream = ring.stream(file.fileno())
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        try:
            stream.append(noise(4 * PAGE))
            with pytest.raises(StoreError, match=r"File too large \(errno 27\)"):
                stream.flush()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "rows").read_bytes() == bytes(noise(4 * PAGE)[:5000].numpy())


SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/types.h>
#include <unistd.h>
static ssize_t hostile(const char* name, int handle, const void* data, size_t bytes, off_t offset) {
    static unsigned call;
    ssize_t (*real)(int, const void*, size_t, off_t) = dlsym(RTLD_NEXT, name);
    const unsigned n = __atomic_add_fetch(&call, 1, __ATOMIC_RELAXED);
    if (getenv("SLOWLY") && n <= 2) usleep((3 - n) * 500000);
    const char* broken = getenv("BREAKS_AT");
    if (broken && n == (unsigned)atoi(broken)) { errno = EIO; return -1; }
    if (n % 3 == 0) { errno = EINTR; return -1; }
    if (n % 3 == 1 && bytes > 1) bytes = 1 + bytes * (n % 7) / 8;
    return real(handle, data, bytes, offset);
}
ssize_t pwrite(int h, const void* d, size_t b, off_t o) { return hostile("pwrite", h, d, b, o); }
ssize_t pwrite64(int h, const void* d, size_t b, off_t o) { return hostile("pwrite64", h, d, b, o); }
"""

HOSTILE = """
x = torch.arange(200_000)
with open(path, "wb") as file, Ring(slots=4, slot_bytes=4096, threads=2) as ring:
    stream = ring.stream(file.fileno())
    for part in x.split(777):
        stream.append(part)
    stream.flush()
assert open(path, "rb").read() == bytes(x.view(torch.uint8).numpy())
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library whose pwrite is interrupted and falls short; as it is told to, it fails once, or dawdles twice."""
    source = tmp_path_factory.mktemp("shim") / "shim.c"
    source.write_text(SHIM)
    library = str(source.with_suffix(".so"))
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", library, "-ldl"], check=True)
    return library


def test_interrupted_and_short_writes_are_gone_on_with(tmp_path: Path, shim: str) -> None:
    done = run(HOSTILE, tmp_path / "rows", LD_PRELOAD=shim)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("call", [1, 5, 300])
def test_one_failed_write_is_never_lost(tmp_path: Path, shim: str, call: int) -> None:
    done = run(HOSTILE, tmp_path / "rows", LD_PRELOAD=shim, BREAKS_AT=str(call))
    assert done.returncode == 1
    assert "StoreError: stream to handle" in done.stderr
    assert "Input/output error (errno 5)" in done.stderr


OVERTAKEN = """
from emocore.errors import BackpressureError
def append(value, pages):
    try: return stream.append(torch.full((pages * 4096,), value, dtype=torch.uint8))
    except BackpressureError: return False
with open(path, "wb") as file, Ring(slots=2, slot_bytes=4096, threads=2, timeout=0.1) as ring:
    stream = ring.stream(file.fileno())
    assert not append(1, 3)  # both slots are stuck in the disk, the first one longer
    while not append(2, 1): pass
    while True:
        try: stream.flush()
        except BackpressureError: continue
        break
    assert stream.bytes == 4096
assert open(path, "rb").read()[:4096] == bytes([2]) * 4096
"""


def test_what_was_given_up_never_lands_on_what_came_after(tmp_path: Path, shim: str) -> None:
    done = run(OVERTAKEN, tmp_path / "rows", LD_PRELOAD=shim, SLOWLY="1")
    assert done.returncode == 0, done.stderr


# --- processes and signals

FORKED = """
import emocore.errors as errors
file = open(path, "wb")
ring = Ring(slots=4, slot_bytes=4096, throttle=200_000, threads=2)
stream = ring.stream(file.fileno())
x = torch.arange(5000)
stream.append(x)
child = os.fork()
if not child:
    for call in (lambda: stream.append(x), stream.flush, lambda: ring.stream(file.fileno())):
        try: call()
        except errors.StoreError as error: assert "forked" in str(error), error
        else: os._exit(7)
    ring.live(), stream.room, stream.bytes
    ring.close()
    del stream, ring
    sys.exit(3)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 3, status
stream.append(x)
stream.flush()
ring.close()
assert open(path, "rb").read() == 2 * bytes(x.view(torch.uint8).numpy())
"""


def test_a_forked_child_is_refused_and_ends_without_a_trace(tmp_path: Path) -> None:
    done = run(FORKED, tmp_path / "rows")
    assert done.returncode == 0, done.stderr


ENDING = """
file = open(path, "wb")
ring = Ring(slots=64, slot_bytes=4096, throttle=100_000)
stream = ring.stream(file.fileno())
stream.append(torch.arange(25_000))
"""


@pytest.mark.parametrize("end", ["", "del ring, stream", "file.close()", "sys.exit(0)"])
def test_what_was_appended_is_written_when_the_process_ends(tmp_path: Path, end: str) -> None:
    done = run(ENDING + end, tmp_path / "rows")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "rows").read_bytes() == bytes(torch.arange(25_000).view(torch.uint8).numpy())


def test_a_producer_still_at_work_at_exit_does_not_hang_it(tmp_path: Path) -> None:
    """A daemon thread appends for ever: it is refused, and the process ends."""
    work = """
def work():
    while True: stream.append(torch.arange(25_000))
threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
"""
    done = run(ENDING + work, tmp_path / "rows")
    assert done.returncode == 0, done.stderr
    whole = bytes(torch.arange(25_000).view(torch.uint8).numpy())
    assert (tmp_path / "rows").read_bytes()[: len(whole)] == whole


@pytest.mark.parametrize("call", ["stream.append(torch.zeros(99_999))", "stream.flush()"])
def test_ctrl_c_ends_a_wait(tmp_path: Path, call: str) -> None:
    interrupted = f"""
ring = Ring(slots=4, slot_bytes=4096, throttle=0, timeout=None)
file = open(path, "wb")
stream = ring.stream(file.fileno())
stream.append(torch.arange(100))
def interrupt():
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
start = time.monotonic()
try: {call}
except KeyboardInterrupt: print(f"{{time.monotonic() - start:.1f}}")
assert stream.bytes == 800
ring.close()
assert open(path, "rb").read()[:800] == bytes(torch.arange(100).view(torch.uint8).numpy())
"""
    done = run(interrupted, tmp_path / "rows")
    assert done.returncode == 0, done.stderr
    assert 0.4 <= float(done.stdout) < 10


def test_memory_stays_bounded_on_a_disk_that_stands_still(tmp_path: Path) -> None:
    """64 MiB are offered to a ring of 4 MiB."""
    bounded = """
def resident(): return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
from emocore.ring import drop
file, x = open(path, "wb"), torch.ones(256, 1024)
ring = Ring(slots=16, slot_bytes=1 << 18, throttle=0)
stream = ring.stream(file.fileno())
drop.offer(stream, x)
before = resident()
got = [drop.offer(stream, x) for _ in range(64)]
assert sum(one.taken + one.dropped for one in got) == 64 * 256
print(resident() - before)
"""
    done = run(bounded, tmp_path / "rows")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 8 << 20
