"""Ring: bounded memory between whoever produces rows and the files that they go to, with a back-pressure policy."""

from __future__ import annotations

import math
import os
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import native
from .errors import ArgumentError, BackpressureError, StoreError

PAGE = 4096


@dataclass(frozen=True)
class RingState:
    """Where a ring stands: slots and how many of them wait for the disk, bytes written, seconds spent.

    `seconds_writing` is the time in which there was a write; `seconds_waited` is what appends waited for slots.
    """

    slots: int
    fill: float
    in_flight: int
    bytes_written: int
    seconds_writing: float
    seconds_waited: float

    @property
    def gigabytes_per_second(self) -> float:
        """Of the disk, while it was written to; 0 before the first write."""
        return self.bytes_written / self.seconds_writing / 1e9 if self.seconds_writing else 0.0


class Ring:
    """Slots of host memory, filled by any number of streams and written to their files by threads of its own.

    The memory is `slots` x `slot_bytes`, whatever is appended. A call that gets on with nothing for `timeout` seconds
    (None: for ever) raises BackpressureError. `throttle`, in bytes a second, makes the disk as slow as a test wants
    it until the ring is closed. Raises ArgumentError.

    >>> import tempfile
    >>> with tempfile.TemporaryFile() as file, Ring(slots=2, slot_bytes=4096) as ring:
    ...     stream = ring.stream(file.fileno())
    ...     stream.append(torch.arange(3, dtype=torch.uint8))
    ...     stream.flush()
    ...     file.read()
    True
    b'\\x00\\x01\\x02'
    """

    def __init__(
        self,
        *,
        slots: int = 64,
        slot_bytes: int = 4 << 20,
        threads: int = 1,
        timeout: float | None = 60.0,
        throttle: float | None = None,
    ) -> None:
        _expect("slots", slots, 1 <= slots <= 1 << 20, "1 to 2^20")
        _expect("slot_bytes", slot_bytes, slot_bytes >= PAGE and slot_bytes % PAGE == 0, f"a multiple of {PAGE}")
        _expect("threads", threads, 1 <= threads <= 256, "1 to 256")
        _expect("timeout", timeout, timeout is None or timeout >= 0, "seconds, or None")
        _expect("throttle", throttle, throttle is None or throttle >= 0, "bytes a second, or None")
        self.timeout = math.inf if timeout is None else float(timeout)
        self._ring = native.extension().Ring(slots, slot_bytes, threads, -1.0 if throttle is None else float(throttle))
        self._end = weakref.finalize(self, _close, self._ring)  # at exit, too

    def stream(self, handle: int, offset: int = 0, *, direct: bool = False) -> Stream:
        """What is appended to the stream is written to the file descriptor `handle` from byte `offset` on.

        The descriptor is duplicated: the caller may close his own. A `direct` one, opened with O_DIRECT, is written in
        whole pages of 4,096 bytes: `offset` is a multiple of that, and the file is to be truncated to what was
        appended. Raises ArgumentError, or StoreError where `handle` is none or the ring is closed.
        """
        _expect("offset", offset, offset >= 0 and not (direct and offset % PAGE), f"{PAGE} n" if direct else ">= 0")
        if not self._end.alive or self._ring.forked:
            raise _refused("ring", "forked" if self._ring.forked else "closed")
        try:
            own = os.dup(handle)
        except OSError as error:
            raise StoreError(f"handle {handle}: cannot be written to", got=_said(error.errno or 0)) from error
        return Stream(self, self._ring.open(own, offset, direct), f"stream to handle {handle}")

    def live(self) -> RingState:
        """Where it stands now."""
        slots, free, in_flight, written, writing, waited = self._ring.live()
        return RingState(slots, 1 - free / max(slots, 1), in_flight, written, writing, waited)

    def close(self) -> None:
        """Wait until all that was appended is written, and end the writers; raises StoreError for what nobody saw fail.

        Streams may not be appended to any more. Closing twice is no error.
        """
        if self._end.alive:
            _close(self._ring)
            self._end.detach()

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Stream:
    """Bytes in order to one file, by `Ring.stream`. Threads may share one: a call waits for the one before it."""

    def __init__(self, ring: Ring, stream: Any, name: str) -> None:
        self.ring, self.name, self._stream = ring, name, stream

    def append(self, data: Tensor, *, wait: bool = True) -> bool:
        """Copy the bytes of `data`, of any dtype and strides, row by row; all of them or none.

        Of a tensor on a GPU, what it holds when its device's current stream has come so far. The copy runs beside
        that stream, and this thread waits for it: let it be one that does not launch the model.

        Without `wait` it returns False where the free slots do not hold them. Else it waits for slots; raises
        BackpressureError when none becomes free within the ring's timeout, StoreError when the file has failed, the
        ring is closed, or this is a fork of its process.
        """
        if data.device.type not in ("cpu", "cuda"):
            raise ArgumentError("data", expected="a tensor on the CPU or a GPU", got=data.device)
        outcome = self._from_device(data, wait) if data.is_cuda else self._from_host(data, wait)
        if outcome not in ("done", "full"):
            raise self._refused(outcome)
        return bool(outcome == "done")

    def _from_host(self, data: Tensor, wait: bool) -> Any:
        width, apart = data.element_size(), data.dim() == 2 and data.stride(1) == 1 and not data.is_contiguous()
        data = data if apart else data.contiguous()
        rows, cols, stride = (*data.shape, data.stride(0)) if apart else (1, data.numel(), data.numel())
        return self._stream.append(data.data_ptr(), rows, cols * width, stride * width, wait, self.ring.timeout)

    def _from_device(self, data: Tensor, wait: bool) -> Any:
        with torch.cuda.device(data.device):
            data, after = data.contiguous(), torch.cuda.current_stream().cuda_stream
            return self._stream.append_device(data.data_ptr(), data.nbytes, after, wait, self.ring.timeout)

    def flush(self) -> None:
        """Wait until every byte appended is written, not synced; raises as `append` does.

        Of a direct stream the last page is padded with zeros, and written again with what is appended later.
        """
        outcome = self._stream.flush(self.ring.timeout)
        if outcome != "done":
            raise self._refused(outcome)

    @property
    def bytes(self) -> int:
        """Appended so far."""
        return int(self._stream.standing()[0])

    @property
    def crc32c(self) -> int:
        """CRC-32C of all that was appended."""
        return int(self._stream.standing()[1])

    @property
    def room(self) -> int:
        """Bytes that can be appended without waiting, as long as no other stream takes them."""
        return int(self._stream.room())

    def _refused(self, outcome: str) -> BackpressureError | StoreError:
        return _refused(self.name, outcome, self._stream.standing()[2], self.ring.timeout)


@dataclass(frozen=True)
class Offered:
    """What became of rows that were offered to a stream."""

    taken: int
    dropped: int = 0
    sampled_out: int = 0


@dataclass(frozen=True)
class Policy:
    """What becomes of rows when the disk is slower than the model: `block`, `drop` or `sample(p, seed)`."""

    name: str
    waits: bool = True
    p: float = 1.0
    seed: int = 0

    def picks(self, first: int, count: int) -> Tensor:
        """Which of rows first, first + 1, ... are kept [count] bool: a function of seed and row number alone."""
        if self.p >= 1:
            return torch.ones(count, dtype=torch.bool)
        hashed = _mixed(np.arange(count, dtype=np.uint64) + _mixed(np.uint64(self.seed % 2**64)) + np.uint64(first))
        return torch.from_numpy((hashed >> np.uint64(11)).astype(np.float64) < self.p * 2**53)

    def offer(self, stream: Stream, rows: Tensor, first: int = 0) -> Offered:
        """Append rows [N, D], numbered from `first` on, as the policy has it; raises as `Stream.append` does."""
        kept = rows[self.picks(first, len(rows))] if self.p < 1 else rows
        if self.waits:
            stream.append(kept)
            return Offered(len(kept), 0, len(rows) - len(kept))
        taken, size = len(kept), max(kept[:1].nbytes, 1)
        while not stream.append(kept[:taken], wait=False):
            taken = min(taken - 1, max(stream.room, 0) // size)  # others may have taken the room since
        return Offered(taken, len(kept) - taken)


block = Policy("block")
drop = Policy("drop", waits=False)


def sample(p: float, seed: int = 0) -> Policy:
    """Each row is kept with probability `p`, by a hash of seed and row number, and then waits; raises ArgumentError."""
    _expect("p", p, 0 <= p <= 1, "0 to 1")
    return Policy("sample", True, float(p), seed)


def _mixed(x: Any) -> Any:
    """Of uint64, the finaliser of SplitMix64: every bit depends on all."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _close(ring: Any) -> None:
    """Raises StoreError for an error that nobody has seen."""
    outcome, errno = ring.close(math.inf)
    if outcome == "failed":
        raise _refused("ring", outcome, errno)


def _expect(name: str, got: object, fits: bool, expected: str) -> None:
    if not fits:
        raise ArgumentError(name, expected=expected, got=got)


def _said(errno: int) -> str:
    return f"{os.strerror(errno)} (errno {errno})"


def _refused(name: str, outcome: str, errno: int = 0, timeout: float = 0.0) -> BackpressureError | StoreError:
    """The error of an outcome."""
    if outcome == "late":
        return BackpressureError(
            f"{name}: the disk does not keep up",
            expected=f"a slot written within {timeout:g} s",
            got="none",
            way_out="Give the ring more or larger slots, a longer timeout, or the policy `drop` or `sample`.",
        )
    if outcome == "failed":
        return StoreError(
            f"{name}: could not be written",
            got=_said(errno),
            way_out="What was appended since the last flush may be lost; free space or choose another folder.",
        )
    if outcome == "forked":
        return StoreError(f"{name}: belongs to the process that this one was forked from", way_out="Make a new ring.")
    return StoreError(f"{name}: the ring is closed", way_out="Append before Ring.close, or make a new ring.")
