"""Rows that come from a GPU, against a driver that copies as late as it may: without a GPU."""

import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emocore import _C
from emocore.errors import DeviceError
from emocore.ring import Ring, Stream

MIB = 1 << 20
MODEL = 7  # the stream that the model runs on

Opened = Callable[..., tuple[Stream, Callable[[], bytes]]]


def noise(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def append(stream: Stream, data: Tensor, wait: bool = True) -> str:
    """What `Stream.append` does with a tensor of the device, whose memory is the host's here."""
    return stream._stream.append_device(data.data_ptr(), data.nbytes, MODEL, wait, 20.0)


def fill(fake: Any, data: Tensor, value: int) -> None:
    """A kernel of the model, which has not run yet."""
    at, count = ctypes.c_void_p(data.data_ptr()), ctypes.c_size_t(data.nbytes)
    fake.library.fake_fill(ctypes.c_size_t(MODEL), at, value, count)


@pytest.fixture
def opened(fake: Any, tmp_path: Path) -> Iterator[Opened]:
    """opened(**ring): a stream to a file, and what gives the file's bytes when all is written."""
    path = tmp_path / "rows"
    handle, rings = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), []

    def open_stream(**options: Any) -> tuple[Stream, Callable[[], bytes]]:
        rings.append(Ring(**{"slots": 3, "slot_bytes": 3 * MIB, **options}))
        stream = rings[-1].stream(handle)

        def written() -> bytes:
            stream.flush()
            return path.read_bytes()

        return stream, written

    yield open_stream
    for ring in rings:
        ring.close()
    os.close(handle)


@pytest.mark.parametrize("count", [0, 1, MIB - 1, MIB, 3 * MIB + 5, 20 * MIB + 12345])
def test_the_bytes_of_the_device_arrive(opened: Opened, count: int) -> None:
    stream, written = opened()
    first, x = noise(777), noise(count, 1)
    stream.append(first)
    assert append(stream, x) == "done"
    stream.append(first)
    expected = b"".join(bytes(part.numpy()) for part in (first, x, first))
    assert written() == expected
    assert (stream.bytes, stream.crc32c) == (len(expected), _C.crc32c(expected))


def test_copies_wait_for_what_the_model_was_given(fake: Any, opened: Opened) -> None:
    """And for nothing later; the memory of the device may be used again at once."""
    stream, written = opened()
    x = noise(10 * MIB)
    for value in range(5):
        fill(fake, x, value)
        append(stream, x)
        x.fill_(99)
    assert written() == b"".join(bytes([value]) * x.nbytes for value in range(5))


def test_slots_are_pinned_once_and_copied_to_in_pieces(fake: Any, opened: Opened) -> None:
    stream, _ = opened()
    for _ in range(2):
        append(stream, noise(3 * MIB))
    calls = [line.split() for line in fake.log]
    pinned = [line[1:] for line in calls if line[0].startswith("cuMemHostRegister")]
    assert pinned == [[str(9 * MIB), "1"]]
    assert [line[1:] for line in calls if line[0].startswith("cuMemcpyDtoHAsync")] == [[str(MIB)]] * 6
    assert [line[1:] for line in calls if line[0] == "cuStreamCreate"] == [["1"]]  # beside the default stream
    assert {line[1] for line in calls if line[0] == "cuEventCreate"} == {"3"}  # a wait sleeps, no clock


def test_without_room_nothing_is_copied(fake: Any, opened: Opened) -> None:
    stream, written = opened(throttle=0)
    assert append(stream, noise(8 * MIB), wait=False) == "done"
    before = fake.log
    assert append(stream, noise(2 * MIB), wait=False) == "full"
    assert fake.log == before
    stream.ring.close()
    assert written() == bytes(noise(8 * MIB).numpy())


CALLS = ["cuMemHostRegister_v2", "cuCtxGetCurrent", "cuStreamCreate", "cuEventCreate", "cuEventRecord"]
CALLS += ["cuStreamWaitEvent", "cuMemcpyDtoHAsync_v2", "cuEventSynchronize"]


@pytest.mark.parametrize("call", CALLS)
def test_a_copy_that_fails_leaves_the_stream_as_it_was(fake: Any, opened: Opened, call: str) -> None:
    stream, written = opened()
    x = noise(7 * MIB)
    stream.append(x[:1000])
    before = (stream.bytes, stream.crc32c, stream.room)
    fake.library.fake_fail(call.encode(), 1)
    with pytest.raises(DeviceError, match=f"{call.removesuffix('_v2')} of .*CUDA_ERROR_INVALID_VALUE"):
        append(stream, x, wait=False)
    assert (stream.bytes, stream.crc32c, stream.room) == before
    fake.library.fake_fail(b"", 0)
    assert append(stream, x, wait=False) == "done"
    assert written() == bytes(x[:1000].numpy()) + bytes(x.numpy())


def test_a_thread_is_let_work_beside_one_that_records_a_graph(fake: Any) -> None:
    _C.driver_relax()
    assert fake.log[-1].split() == ["cuThreadExchangeStreamCaptureMode", "2"]
    fake.library.fake_fail(b"cuThreadExchangeStreamCaptureMode", 1)
    with pytest.raises(DeviceError, match="cuThreadExchangeStreamCaptureMode failed"):
        _C.driver_relax()


def test_a_thread_without_a_context_is_told(fake: Any, opened: Opened) -> None:
    stream, _ = opened()
    fake.library.fake_context(0)
    with pytest.raises(DeviceError, match="no CUDA context on this thread"):
        append(stream, noise(3))


def test_rows_of_several_devices_in_turn(fake: Any, opened: Opened) -> None:
    stream, written = opened()
    for device in (1, 2, 1):
        fake.library.fake_context(device)
        append(stream, noise(1000, device))
    assert written() == b"".join(bytes(noise(1000, device).numpy()) for device in (1, 2, 1))
    assert sum(line.startswith("cuStreamCreate") for line in fake.log) == 3


def test_nothing_is_left_on_the_device(fake: Any, tmp_path: Path) -> None:
    with open(tmp_path / "rows", "wb") as file, Ring(slots=2, slot_bytes=MIB) as ring:
        stream = ring.stream(file.fileno())
        append(stream, noise(5 * MIB))
        assert fake.library.fake_living() > 0
    del stream, ring
    assert fake.library.fake_living() == 0


def test_without_a_driver_it_says_so(tmp_path: Path) -> None:
    if _C.driver_available():
        pytest.skip("there is a driver")
    with open(tmp_path / "rows", "wb") as file, Ring(slots=2, slot_bytes=MIB) as ring:
        stream = ring.stream(file.fileno())
        with pytest.raises(DeviceError, match="the CUDA driver cannot be used"):
            append(stream, noise(3))
        assert stream.append(noise(3))
