"""The ring: every byte in its place, over many laps, from many threads, with a disk as slow as you like."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emocore import _C
from emocore.errors import ArgumentError, BackpressureError, StoreError
from emocore.ring import Offered, Policy, Ring, Stream, block, drop, sample

PAGE = 4096


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows"


@contextmanager
def writing(path: Path, flags: int = 0) -> Iterator[int]:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o600)
    try:
        yield handle
    finally:
        os.close(handle)


@contextmanager
def one_stream(path: Path, **options: object) -> Iterator[Stream]:
    """A stream to `path` in a ring of its own, of 4 slots of a page."""
    with writing(path) as handle, Ring(**{"slots": 4, "slot_bytes": PAGE, **options}) as ring:
        yield ring.stream(handle)


def data(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def noise(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def together(work: Callable[[int], None], count: int) -> None:
    failed = []

    def guarded(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


# --- the checksum


def by_the_book(text: bytes) -> int:
    """CRC-32C a bit at a time."""
    crc = 0xFFFFFFFF
    for byte in text:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


LITERAL = [
    (b"", 0),
    (b"123456789", 0xE3069283),
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
]


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize(("text", "expected"), LITERAL)
def test_checksum_is_that_of_rfc_3720(text: bytes, expected: int, portable: bool) -> None:
    assert _C.crc32c(text, portable=portable) == expected == by_the_book(text)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("count", [1, 7, 8, 767, 768, 769, 12287, 12288, 12289, 30011])
def test_checksum_of_any_length_and_alignment(count: int, portable: bool) -> None:
    text = data(noise(count + 3))
    expected = by_the_book(text[3:])
    assert _C.crc32c(memoryview(text)[3:], portable=portable) == expected
    for cut in (0, 1, count // 2, count):
        begun = _C.crc32c(text[3 : 3 + cut], portable=portable)
        assert _C.crc32c(text[3 + cut :], begun, portable) == expected


# --- bytes and their order


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (0, 3), (33, 17), (3, 5, 7)])
def test_the_bytes_of_a_tensor_arrive(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).mul(9).to(dtype)
    with one_stream(path) as stream:
        assert stream.append(x)
        stream.flush()
        assert path.read_bytes() == data(x)
        assert (stream.bytes, stream.crc32c) == (x.nbytes, _C.crc32c(data(x)))


STRIDED = {
    "columns": lambda x: x[:, 3:90],
    "every other row": lambda x: x[::2],
    "one column": lambda x: x[:, :1],
    "transposed": lambda x: x.T,
    "expanded": lambda x: x[:1].expand(70, -1),
    "every other column": lambda x: x[:, ::2],
    "part of three axes": lambda x: x.view(10, 20, 100)[:, 2:5],
}


@pytest.mark.parametrize("slot_bytes", [PAGE, 3 * PAGE, 1 << 20])
@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
def test_strided_rows_are_gathered(path: Path, view: Callable[[Tensor], Tensor], slot_bytes: int) -> None:
    x = view(torch.randn(200, 100))
    with one_stream(path, slot_bytes=slot_bytes) as stream:
        for _ in range(3):
            stream.append(x)
        stream.flush()
        assert path.read_bytes() == 3 * data(x)
        assert stream.crc32c == _C.crc32c(3 * data(x))


@pytest.mark.parametrize(("laps", "threads"), [(20_000, 1), (3000, 4)])
def test_order_and_content_over_many_laps(path: Path, laps: int, threads: int) -> None:
    """Every 8 bytes say which they are, through 2 slots of a page."""
    words = 2 * laps * PAGE // 8
    appended, n = 0, 0
    with one_stream(path, slots=2, threads=threads) as stream:
        while appended < words:
            n = n * 7919 % 9973 + 1
            count = min(n, words - appended)
            stream.append(torch.arange(appended, appended + count))
            appended += count
        stream.flush()
        found = torch.from_file(str(path), size=words, dtype=torch.int64)
        assert torch.equal(found, torch.arange(words))
        assert stream.ring.live().bytes_written == 8 * words
        assert stream.crc32c == _C.crc32c(found.numpy())


def test_sixteen_producers_with_streams_of_their_own(path: Path) -> None:
    """More streams than slots: what idle ones hold is written, so that the others get on."""

    def expected(i: int) -> Tensor:
        return torch.arange(60_000, dtype=torch.int32) + i * 1_000_000

    with Ring(slots=5, slot_bytes=PAGE, threads=2) as ring:
        files = [open(f"{path}{i}", "wb") for i in range(16)]  # noqa: SIM115
        streams = [ring.stream(file.fileno()) for file in files]

        def work(i: int) -> None:
            for part in expected(i).split(997 + i):
                streams[i].append(part)

        together(work, 16)
        for i, (file, stream) in enumerate(zip(files, streams, strict=True)):
            stream.flush()
            file.close()
            assert Path(file.name).read_bytes() == data(expected(i))
            assert stream.crc32c == _C.crc32c(expected(i).numpy())
        assert ring.live().fill == 0


def test_sixteen_producers_on_one_stream_tear_no_row(path: Path) -> None:
    with one_stream(path, threads=3) as stream:
        together(lambda i: [stream.append(torch.full((1013,), 1000 * i + n)) for n in range(50)], 16)
        stream.flush()
        rows = torch.from_file(str(path), size=16 * 50 * 1013, dtype=torch.int64).view(-1, 1013)
        assert bool((rows == rows[:, :1]).all())
        assert sorted(rows[:, 0].tolist()) == sorted(1000 * i + n for i in range(16) for n in range(50))
        for i in range(16):  # in each thread's own order
            own = [n for n in rows[:, 0].tolist() if n // 1000 == i]
            assert own == sorted(own)


def test_idle_streams_beyond_the_slots_do_not_block(path: Path) -> None:
    with Ring(slots=2, slot_bytes=PAGE, timeout=20) as ring:
        files = [open(f"{path}{i}", "wb") for i in range(9)]  # noqa: SIM115
        streams = [ring.stream(file.fileno()) for file in files]
        for lap in range(5):
            for i, stream in enumerate(streams):
                assert stream.append(torch.tensor([10 * lap + i], dtype=torch.uint8))
        for i, (file, stream) in enumerate(zip(files, streams, strict=True)):
            stream.flush()
            file.close()
            assert list(Path(file.name).read_bytes()) == [10 * lap + i for lap in range(5)]


def test_writes_begin_at_the_offset(path: Path) -> None:
    path.write_bytes(b"header--")
    with one_stream(path) as unused, writing(path) as handle:
        stream = unused.ring.stream(handle, 8)
        stream.append(noise(9000))
        stream.flush()
        assert path.read_bytes() == b"header--" + data(noise(9000))
        assert stream.bytes == 9000


def test_flush_is_no_end(path: Path) -> None:
    x = noise(40_000)
    with one_stream(path) as stream:
        for part in x.split(1777):
            stream.append(part)
            stream.flush()
            stream.flush()
            assert path.stat().st_size == stream.bytes
        assert path.read_bytes() == data(x)


def test_the_handle_is_the_streams_own(path: Path) -> None:
    """A descriptor closed, its number used again: the bytes do not land in another file."""
    other = path.with_name("other")
    with Ring(slots=4, slot_bytes=PAGE) as ring:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        stream = ring.stream(handle)
        os.close(handle)
        with writing(other) as again:
            assert again == handle
            stream.append(noise(10_000))
            stream.flush()
    assert path.read_bytes() == data(noise(10_000))
    assert other.read_bytes() == b""


def test_a_stream_let_go_of_is_written_and_closed(path: Path) -> None:
    handles = len(os.listdir("/proc/self/fd"))
    with Ring(slots=2, slot_bytes=PAGE) as ring:
        for n in range(50):
            with writing(Path(f"{path}{n}")) as handle:
                ring.stream(handle).append(noise(100, n))
        until = time.monotonic() + 20
        while len(os.listdir("/proc/self/fd")) > handles and time.monotonic() < until:
            time.sleep(0.01)
        assert len(os.listdir("/proc/self/fd")) == handles
    assert [Path(f"{path}{n}").read_bytes() for n in range(50)] == [data(noise(100, n)) for n in range(50)]


# --- direct writes


def direct_flag(folder: Path) -> int:
    try:
        with writing(folder / "probe", os.O_DIRECT):
            return os.O_DIRECT
    except OSError:
        return 0  # a filesystem without it: the pages are the same


@pytest.mark.parametrize("threads", [1, 3])
def test_direct_writes_are_whole_pages(path: Path, threads: int) -> None:
    """Appends, flushes and other streams in between: after a truncation the file is what was appended."""
    x = noise(600_000)
    with (
        writing(path, direct_flag(path.parent)) as handle,
        writing(path.with_name("other")) as other,
        Ring(slots=3, slot_bytes=2 * PAGE, threads=threads) as ring,
    ):
        stream, rival = ring.stream(handle, direct=True), [ring.stream(other) for _ in range(3)]
        for i, part in enumerate(x.split(3001)):
            stream.append(part)
            rival[i % 3].append(part[:10])  # takes what slots there are
            if i % 7 == 0:
                stream.flush()
                assert path.stat().st_size == -(-stream.bytes // PAGE) * PAGE
                assert path.read_bytes() == data(x)[: stream.bytes].ljust(path.stat().st_size, b"\0")
        stream.flush()
        os.truncate(path, stream.bytes)
    assert path.read_bytes() == data(x)


def test_close_writes_the_last_page_of_a_direct_stream(path: Path) -> None:
    with writing(path, direct_flag(path.parent)) as handle, writing(path.with_name("other")) as other:
        ring = Ring(slots=1, slot_bytes=PAGE)
        stream, rival = ring.stream(handle, PAGE, direct=True), ring.stream(other)
        stream.append(noise(100))
        rival.append(noise(100))  # its slot is taken from it: the bytes wait in its tail
        ring.close()
    assert path.read_bytes()[PAGE:] == data(noise(100)).ljust(PAGE, b"\0")


# --- a disk that does not keep up


def test_a_full_ring_times_out_and_takes_nothing(path: Path) -> None:
    with one_stream(path, timeout=0.2, throttle=0) as stream:
        for n in range(4):
            assert stream.append(noise(PAGE, n))
        before = (stream.bytes, stream.crc32c)
        start = time.monotonic()
        with pytest.raises(BackpressureError, match=r"a slot written within 0\.2 s.*`drop`"):
            stream.append(noise(1))
        assert 0.2 <= time.monotonic() - start < 10
        with pytest.raises(BackpressureError):
            stream.flush()
        assert not stream.append(noise(1), wait=False)
        assert (stream.bytes, stream.crc32c) == before
    assert path.read_bytes() == b"".join(data(noise(PAGE, n)) for n in range(4))


@pytest.mark.parametrize("direct", [False, True])
def test_an_append_given_up_in_the_middle_leaves_no_byte(path: Path, direct: bool) -> None:
    """It had handed slots to the writers: what comes next stands where it stood."""
    with writing(path) as handle, Ring(slots=4, slot_bytes=PAGE, threads=3, timeout=0.1, throttle=30_000) as ring:
        stream, kept = ring.stream(handle, direct=direct), b""
        gave_up = 0
        for n in range(12):
            part = noise(100 + 2003 * n, n)
            try:
                stream.append(part)
                kept += data(part)
            except BackpressureError:
                gave_up += 1
            assert (stream.bytes, stream.crc32c) == (len(kept), _C.crc32c(kept))
        assert gave_up
        ring.close()
    assert path.read_bytes()[: len(kept)] == kept


def test_without_waiting_it_is_all_or_nothing(path: Path) -> None:
    with one_stream(path, throttle=0) as stream:
        assert stream.append(noise(PAGE + 1), wait=False)
        assert not stream.append(noise(3 * PAGE), wait=False)
        assert stream.room == 3 * PAGE - 1
        assert stream.append(noise(3 * PAGE - 1), wait=False)
        assert (stream.room, stream.bytes, stream.ring.live().fill) == (0, 4 * PAGE, 1.0)
        assert not stream.append(noise(1), wait=False)
    assert path.read_bytes() == data(noise(PAGE + 1)) + data(noise(3 * PAGE - 1))


@pytest.mark.parametrize("share", [0.1, 0.0])
def test_drop_counts_exactly(path: Path, share: float) -> None:
    """At a tenth of the rate, and on a disk that stands still: what was taken is there, in order, the rest counted."""
    rows, size = 4000, 64
    with one_stream(path, throttle=share * 50e6) as stream:
        taken, kept = Offered(0), []
        for n in range(rows // 50):
            got = drop.offer(stream, (torch.arange(50) + 50 * n)[:, None].expand(-1, size // 8), 50 * n)
            kept += range(50 * n, 50 * n + got.taken)
            taken = Offered(taken.taken + got.taken, taken.dropped + got.dropped)
            time.sleep(50 * size / 50e6)
        assert taken.taken + taken.dropped == rows
        assert taken.dropped > 0
        assert stream.bytes == size * taken.taken
        if not share:
            assert taken.taken == 4 * PAGE // size
    found = torch.from_file(str(path), size=len(kept) * size // 8, dtype=torch.int64).view(-1, size // 8)
    assert torch.equal(found, torch.tensor(kept)[:, None].expand(-1, size // 8))


@pytest.mark.parametrize("policy", [block, sample(0.3, seed=5)])
def test_waiting_policies_lose_nothing_on_a_slow_disk(path: Path, policy: Policy) -> None:
    x = torch.arange(30_000).view(-1, 1)
    with one_stream(path, throttle=2e6) as stream:
        offered = [policy.offer(stream, part, i * 1000) for i, part in enumerate(x.split(1000))]
        stream.flush()
        assert stream.ring.live().seconds_waited > 0
    kept = x[policy.picks(0, len(x))]
    assert path.read_bytes() == data(kept)
    assert sum(one.taken for one in offered) == len(kept)
    assert sum(one.taken + one.sampled_out for one in offered) == len(x)
    assert not any(one.dropped for one in offered)


def test_sampling_is_a_function_of_seed_and_row() -> None:
    one = sample(0.25, seed=3).picks(0, 100_000)
    assert abs(int(one.sum()) - 25_000) < 5 * (100_000 * 0.25 * 0.75) ** 0.5
    assert torch.equal(one[700:900], sample(0.25, seed=3).picks(700, 200))
    assert bool((one <= sample(0.5, seed=3).picks(0, 100_000)).all())  # the rows of a smaller p are among them
    other = sample(0.25, seed=4).picks(0, 100_000)
    assert abs(int((one & other).sum()) - 6250) < 400
    assert int(sample(0.0).picks(0, 1000).sum()) == 0
    assert int(sample(1.0).picks(0, 1000).sum()) == 1000


def test_live_adds_up(path: Path) -> None:
    with one_stream(path, throttle=0) as stream:
        stream.append(noise(2 * PAGE + 5))
        now = stream.ring.live()
        assert (now.slots, now.fill, now.in_flight, now.bytes_written) == (4, 0.75, 2, 0)
        assert now.gigabytes_per_second == 0
        ring = stream.ring
    now = ring.live()
    assert (now.fill, now.in_flight, now.bytes_written) == (0, 0, 2 * PAGE + 5)
    assert now.gigabytes_per_second > 0


# --- arguments


@pytest.mark.parametrize(
    "options",
    [
        {"slots": 0},
        {"slot_bytes": 0},
        {"slot_bytes": PAGE + 1},
        {"threads": 0},
        {"threads": 257},
        {"timeout": -1},
        {"throttle": -1},
    ],
)
def test_bad_rings_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        Ring(**options)


def test_bad_streams_and_tensors_are_refused(path: Path) -> None:
    with one_stream(path) as stream, writing(path) as handle:
        for offset, direct in ((-1, False), (-PAGE, True), (100, True)):
            with pytest.raises(ArgumentError, match="offset"):
                stream.ring.stream(handle, offset, direct=direct)
        with pytest.raises(ArgumentError, match=r"data; expected a tensor on the CPU or a GPU; got meta"):
            stream.append(torch.zeros(3, device="meta"))
        for p in (-0.1, 1.1, float("nan")):
            with pytest.raises(ArgumentError, match="p; expected"):
                sample(p)
    with pytest.raises(StoreError, match="closed"):
        stream.append(noise(1))
    with pytest.raises(StoreError, match="closed"):
        stream.ring.stream(0)
    stream.flush()  # all of it is written
    stream.ring.close()
