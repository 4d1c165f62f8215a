"""The launcher against a driver that writes down every call, compiled with NVIDIA's own declarations: without a GPU."""

import statistics
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from emocore import _C
from emocore.errors import DeviceError

PINNED, PINNED_ON_DEVICE = 0x5000, 0x6000


class Place(NamedTuple):
    """What a launch sees of a tensor."""

    address: int
    dtype: torch.dtype = torch.float32
    device: int = 0

    def data_ptr(self) -> int:
        return self.address

    def get_device(self) -> int:
        return self.device


def load(fake: Any, words: str, name: str = "kernel", **form: Any) -> int:
    fake.expect(words)
    return _C.driver_load(fake.cubin, name, words, **{"threads": 128, **form})


@pytest.fixture(scope="session")
def old(compiled_driver: Callable[..., Path]) -> Path:
    return compiled_driver("-DOLD")


def launch(handle: int, *arguments: Any, grid: tuple[int, ...] = (1,), stream: int = 0) -> bool:
    return _C.driver_launch((handle,), grid, stream, arguments)


# --- loading


def test_load_brings_the_entry_to_the_device(fake: Any) -> None:
    load(fake, "*fp32 i32", name="some_kernel")
    assert fake.log == [
        "cuLibraryLoadData ELF 0 0",
        "cuLibraryGetKernel 0x11 some_kernel",
        "cuKernelGetFunction 0x22",
    ]


@pytest.mark.parametrize(
    ("form", "asked"),
    [
        ({"shared": 4096}, ["shared 4096"]),
        ({"shared": 49152}, ["shared 49152"]),
        ({"shared": 232448}, ["shared 232448", "carveout 100"]),
        ({"cluster": (2, 2, 2)}, []),
        ({"cluster": (16, 1, 1)}, ["cluster 1"]),
    ],
)
def test_load_asks_for_what_is_more_than_usual(fake: Any, form: dict[str, Any], asked: list[str]) -> None:
    load(fake, "", **form)
    assert fake.log[3:] == [f"cuFuncSetAttribute 0x33 {line}" for line in asked]


@pytest.mark.parametrize(
    "words", ["i31", "*", "**fp32", "*fp8", "fp32:16", "i32:8", "fp16", "=", "=x", "=1x", "map:16"]
)
def test_load_refuses_types_that_it_does_not_know(fake: Any, words: str) -> None:
    with pytest.raises(ValueError, match="parameters"):
        load(fake, words)
    assert not fake.log


def test_load_refuses_too_many_parameters(fake: Any) -> None:
    load(fake, "i64 " * 64)
    with pytest.raises(ValueError, match="too many"):
        _C.driver_load(fake.cubin, "kernel", "i64 " * 65, 32)
    with pytest.raises(ValueError, match="too many"):
        _C.driver_load(fake.cubin, "kernel", "map " * 33, 32)


def whole(size: int) -> bytes:
    """An ELF file whose table of two sections of 64 bytes ends where it does."""
    header = bytearray(b"\x7fELF" + bytes(size - 4))
    struct.pack_into("<Q", header, 40, size - 128)
    struct.pack_into("<HH", header, 58, 64, 2)
    return bytes(header)


@pytest.mark.parametrize(
    "cubin", [b"", b"\x7fELF", bytes(64), b".version 8.0 .target sm_90" * 9, whole(512)[:511], whole(512)[:99]]
)
def test_load_refuses_what_is_no_whole_cubin(fake: Any, cubin: bytes) -> None:
    with pytest.raises(ValueError, match="no whole ELF file"):
        _C.driver_load(cubin, "kernel", "", 32)
    assert not fake.log
    assert _C.driver_load(whole(512), "kernel", "", 32) >= 0


@pytest.mark.parametrize("takes", ["i32", "i32 i32 i32", "i32 i64", ""])
def test_load_refuses_a_kernel_that_takes_something_else(fake: Any, takes: str) -> None:
    fake.expect(takes)
    with pytest.raises(DeviceError, match="parameters of 4 4 bytes") as caught:
        _C.driver_load(fake.cubin, "kernel", "i32 i32", 32)
    assert "emocore aot" in str(caught.value)
    assert fake.library.fake_libraries() == 0


def test_a_driver_that_cannot_tell_parameters_is_believed(fake: Any, old: Path) -> None:
    assert _C.driver_open(str(old))
    fake = type(fake)(old)
    fake.expect("i32")
    handle = _C.driver_load(fake.cubin, "kernel", "i32 null", 32)
    fake.expect("i32 null")
    assert launch(handle, 7)
    assert fake.parameters == [struct.pack("<i", 7), bytes(8)]


CALLS = ["cuCtxGetCurrent", "cuCtxGetDevice", "cuLibraryLoadData", "cuLibraryGetKernel", "cuKernelGetFunction"]


@pytest.mark.parametrize("call", [*CALLS, "cuFuncSetAttribute"])
@pytest.mark.parametrize(
    ("code", "named"), [(1, "CUDA_ERROR_INVALID_VALUE, invalid argument"), (987654, "error 987654")]
)
def test_a_failed_load_says_what_failed_and_leaves_nothing(fake: Any, call: str, code: int, named: str) -> None:
    fake.library.fake_fail(call.encode(), code)
    with pytest.raises(DeviceError) as caught:
        _C.driver_load(fake.cubin, "some_kernel", "", 32, 50000)
    assert f"{call}(some_kernel) failed; got {named}. " in str(caught.value)
    assert fake.library.fake_libraries() == 0
    handle = load(fake, "i32", shared=50000)  # and the next one works
    assert launch(handle, 1)
    assert fake.library.fake_libraries() == 1


def test_load_needs_a_context(fake: Any) -> None:
    fake.library.fake_context(0)
    with pytest.raises(DeviceError, match=r"no CUDA context.*Use the device first"):
        _C.driver_load(fake.cubin, "kernel", "", 32)
    assert not fake.log


def test_without_a_driver(fake: Any, compiled_driver: Callable[..., Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty.c"
    empty.write_text("int cuLaunchKernelEx(void) { return 0; }\n")
    assert not _C.driver_open(str(tmp_path / "missing.so"))
    assert not _C.driver_open(str(compiled_driver(source=empty)))
    if not _C.driver_open(""):
        assert not _C.driver_available()
        with pytest.raises(DeviceError, match=r"libcuda\.so\.1.*Kernels need an NVIDIA driver"):
            _C.driver_load(fake.cubin, "kernel", "", 32)
        with pytest.raises(DeviceError):
            _C.driver_tensor_map(16, "fp16", (8, 8), (8, 1), (8, 8))


# --- launching


def test_launch_passes_the_exact_bytes(fake: Any) -> None:
    words = "*bf16:16 i32 *i64 i1 i8 u8 i16 i64 none fp32 =1 fp64 i64:16 map null null"
    handle = load(fake, words)
    tensor_map = bytes(range(128))
    given = (
        Place(2**47 - 16, torch.bfloat16), -(2**31), Place(0x7008, torch.int64), True, -128, 255, -2, 2**63 - 1, None,
        0.1, 1, 0.1, -(2**62), tensor_map,
    )  # fmt: skip
    assert launch(handle, *given, grid=(5, 6, 7), stream=2**40 + 1)
    head = f"cuLaunchKernelEx 0x33 grid 5 6 7 block 128 1 1 shared 0 stream {2**40 + 1} : "
    assert fake.log[-1].startswith(head)
    assert b"".join(fake.parameters[3:11]) == b"".join(
        struct.pack("<" + code, value)
        for code, value in zip("?bBhqfdq", (True, -128, 255, -2, 2**63 - 1, 0.1, 0.1, -(2**62)), strict=True)
    )
    assert fake.parameters[:3] == [
        struct.pack("<Q", 2**47 - 16),
        struct.pack("<i", -(2**31)),
        struct.pack("<Q", 0x7008),
    ]
    assert fake.parameters[11:] == [tensor_map, bytes(8), bytes(8)]


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({}, ""),
        ({"cluster": (2, 1, 1)}, " cluster 2 1 1"),
        ({"programmatic": True}, " programmatic 1"),
        ({"cluster": (1, 4, 2), "programmatic": True}, " cluster 1 4 2 programmatic 1"),
    ],
)
def test_launch_says_cluster_and_early_start(fake: Any, form: dict[str, Any], said: str) -> None:
    handle = load(fake, "i32", threads=384, shared=205904, **form)
    assert launch(handle, 3, grid=(8, 8))
    head = "cuLaunchKernelEx 0x33 grid 8 8 1 block 384 1 1 shared 205904 stream 0"
    assert fake.log[-1] == f"{head}{said} : 03000000"


ELSEWHERE = [
    ("*fp32", Place(0x1000, torch.float64)),
    ("*fp32", Place(PINNED, torch.float32, device=1)),
    ("*fp32", Place(0x1000, torch.float32, device=-1)),
    ("*fp32:16", Place(0x1008)),
    ("*fp32", None),
    ("*fp32", 0x1000),
    ("*i1", Place(0x1000, torch.uint8)),
    ("*u8", Place(0x1000, torch.complex64)),
    ("*fp32", "text"),
    ("*fp32", torch.zeros(1)),
    ("*fp32", torch.zeros(0)),
    ("*fp32", torch.zeros(1, device="meta")),
    ("i32", 2**31),
    ("i32", -(2**31) - 1),
    ("i32:16", 8),
    ("i64", 2**63),
    ("u8", -1),
    ("i32", True),
    ("i32", 1.0),
    ("i32", None),
    ("i1", 1),
    ("fp32", 1),
    ("=1", 2),
    ("=1", True),
    ("=1", None),
    ("none", 0),
    ("none", Place(0x1000)),
    ("map", bytes(127)),
    ("map", bytes(129)),
    ("i32 i32", 1),
    ("", 1),
]


@pytest.mark.parametrize(
    ("words", "value"), ELSEWHERE, ids=[f"{w or 'nothing'}-{i}" for i, (w, _) in enumerate(ELSEWHERE)]
)
def test_launch_leaves_what_does_not_fit(fake: Any, words: str, value: Any) -> None:
    handle = load(fake, words)
    before = fake.log
    assert not launch(handle, value)
    assert fake.log == before
    assert sys.exc_info() == (None, None, None)


FITTING = [
    ("*i1", Place(0x1000, torch.bool), struct.pack("<Q", 0x1000)),
    ("*u1", Place(0x1000, torch.bool), struct.pack("<Q", 0x1000)),
    ("*fp32", Place(PINNED, device=-1), struct.pack("<Q", PINNED_ON_DEVICE)),
    ("*fp32:16", Place(0), bytes(8)),
    ("*fp32:16", Place(0x1010), struct.pack("<Q", 0x1010)),
    ("i32", 1, struct.pack("<i", 1)),
    ("i32:16", 0, struct.pack("<i", 0)),
    ("i32:16", -32, struct.pack("<i", -32)),
    ("u1", False, bytes(1)),
    ("fp32", float("inf"), struct.pack("<f", float("inf"))),
    ("fp32", 1e300, struct.pack("<f", float("inf"))),
]


@pytest.mark.parametrize(("words", "value", "passed"), FITTING, ids=[f"{w}-{i}" for i, (w, *_) in enumerate(FITTING)])
def test_launch_takes_what_fits(fake: Any, words: str, value: Any, passed: bytes) -> None:
    handle = load(fake, words)
    assert launch(handle, value)
    assert fake.parameters == [passed]


def test_the_first_kernel_that_fits_is_launched(fake: Any) -> None:
    handles = tuple(load(fake, word, threads=threads) for word, threads in (("i32:16", 32), ("i32", 64), ("i64", 96)))
    for value, threads in ((16, 32), (17, 64), (2**40, 96)):
        fake.expect("i64" if threads == 96 else "i32")
        assert _C.driver_launch(handles, (1,), 0, (value,))
        assert f"block {threads} 1 1" in fake.log[-1]
    assert not _C.driver_launch(handles, (1,), 0, ("none of them",))
    assert not _C.driver_launch((), (1,), 0, (1,))


def test_a_kernel_stays_on_its_device(fake: Any) -> None:
    handle = load(fake, "i32")
    fake.library.fake_context(2)
    assert not launch(handle, 1)
    fake.library.fake_context(0)  # a thread that has not used a device yet
    assert launch(handle, 1)
    assert fake.log[-2] == "cuCtxSetCurrent 1"
    for call in ("cuCtxGetCurrent", "cuCtxSetCurrent"):
        fake.library.fake_context(0)
        fake.library.fake_fail(call.encode(), 1)
        with pytest.raises(DeviceError, match=r"\(kernel\) failed; got CUDA_ERROR_INVALID_VALUE"):
            launch(handle, 1)


def test_a_failed_launch_says_what_was_asked_for(fake: Any) -> None:
    handle = load(fake, "i32", name="some_kernel", threads=2048, shared=99)
    fake.library.fake_fail(b"cuLaunchKernelEx", 1)
    with pytest.raises(DeviceError) as caught:
        launch(handle, 1, grid=(2, 3))
    assert str(caught.value) == (
        "cuLaunchKernelEx(some_kernel) failed; got CUDA_ERROR_INVALID_VALUE, invalid argument, for 2 x 3 x 1 blocks of "
        "2048 threads and 99 bytes. Failures of earlier kernels show here too: CUDA_LAUNCH_BLOCKING=1 finds them."
    )
    fake.library.fake_fail(b"", 0)
    assert launch(handle, 1)


def test_launch_refuses_handles_and_grids_that_are_none(fake: Any) -> None:
    handle = load(fake, "i32")
    for wrong in (-1, handle + 1):
        with pytest.raises(ValueError, match=f"no kernel has {wrong}"):
            launch(wrong, 1)
    with pytest.raises(ValueError, match="1 to 3 axes, got 4"):
        launch(handle, 1, grid=(1, 1, 1, 1))
    assert not launch(handle, *range(65))


def test_kernels_keep_the_driver_that_loaded_them(fake: Any, old: Path) -> None:
    handle = load(fake, "i32")
    assert _C.driver_open(str(old))
    assert launch(handle, 1)
    assert fake.log[-1].endswith(": 01000000")


def test_launches_from_many_threads(fake: Any) -> None:
    handle = load(fake, "i64 *fp32 i64")
    fitted = []

    def work(thread: int) -> None:
        fake.library.fake_context(1)
        for i in range(200):
            fitted.append(
                launch(handle, thread, Place(16 * i), i)
                and _C.driver_load(fake.cubin, "kernel", "i64 i64 i64", 32) >= 0
            )

    threads = [threading.Thread(target=work, args=(t,)) for t in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(fitted)
    launched = {line.split(" : ")[1] for line in fake.log if line.startswith("cuLaunch")}
    expected = {" ".join(struct.pack("<q", v).hex() for v in (t, 16 * i, i)) for t in range(8) for i in range(200)}
    assert launched == expected


def test_launch_keeps_no_reference(fake: Any) -> None:
    handle = load(fake, "*fp32 i64 map")
    arguments = (Place(0x10), 10**9, bytes(128))
    launch(handle, *arguments)
    watched = [*arguments, torch.float32]
    before = [sys.getrefcount(x) for x in watched]
    for _ in range(1000):
        launch(handle, *arguments)
    assert [sys.getrefcount(x) for x in watched] == before


def test_launch_is_cheap(fake: Any) -> None:
    """A call of 6 arguments, 3 of them tensors, which cost most: 0.5 us on a quiet machine."""
    handle = load(fake, "*fp32 *fp32 *fp32 i32 i64:16 i64 null null")
    fake.library.fake_quiet(1)
    x = torch.zeros(16)  # a true tensor, in what passes for pinned memory
    arguments, handles, times = (x, x, x, 7, 16, 5), (handle,), []
    for _ in range(200):
        start = time.perf_counter()
        for _ in range(20):
            assert _C.driver_launch(handles, (3, 2), 0, arguments)
        times.append((time.perf_counter() - start) / 20)
    print(statistics.median(times))
    assert statistics.median(times) < 20e-6
