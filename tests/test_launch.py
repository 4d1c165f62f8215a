"""Calls of kernels that were loaded ahead of time: which variant serves which call, and what the driver is given."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from emocore import _C, aot
from emocore.errors import DeviceError
from emocore.kernels import _launch, gram_cuda
from emocore.kernels._launch import Variant, launch

STREAM = 77


class Kernel:
    """What `launch` sees of a kernel: its parameters, and a JIT, which notes the calls that it serves."""

    __name__ = "kernel"

    def __init__(self, *names: str, **constants: None) -> None:
        arguments = [SimpleNamespace(name=name, is_constexpr=False) for name in names]
        self.params = [*arguments, *(SimpleNamespace(name=name, is_constexpr=True) for name in constants)]
        self.jitted: list[Any] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: self.jitted.append((grid, args, options))


class Place(NamedTuple):
    """A tensor of a device."""

    address: int
    dtype: torch.dtype = torch.float32
    device: int = 0

    def data_ptr(self) -> int:
        return self.address

    def get_device(self) -> int:
        return self.device


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing loaded, and the current device is 0."""
    monkeypatch.setattr(_launch, "INTERPRETED", False)
    monkeypatch.setattr(_launch, "_cubins", {})
    monkeypatch.setattr(_launch, "_served", [])
    monkeypatch.setattr(_launch, "current_device", lambda: 0)
    monkeypatch.setattr(_launch, "current_stream", lambda device: STREAM + device)
    monkeypatch.setattr(gram_cuda, "current_stream", lambda device: STREAM + device)
    monkeypatch.setattr(gram_cuda, "HANDLES", {})
    monkeypatch.setattr(aot, "GRAM", Path("none"))


def serve(fake: Any, variant: Variant, hidden: int = 2) -> None:
    words = " ".join([*variant.arguments, *["null"] * hidden])
    fake.expect(words)
    handle = _C.driver_load(fake.cubin, "entry", words, 32 * variant.warps)
    _launch.serve(variant, 0, handle, _C.driver_launch)


TYPES = {"x_ptr": "*fp32:16", "rows": "i32", "stride": "i64:16", "scale": "fp32"}
X, AWRY = Place(0x1000), Place(0x1004)


def steering() -> Variant:
    kernel = Kernel("x_ptr", "rows", "stride", "scale", "centre_ptr", "one", D=None, BLOCK=None)
    return Variant(kernel, TYPES, {"D": 64, "BLOCK": 128, "centre_ptr": None, "one": 1}, warps=8)


def test_a_loaded_variant_serves_the_call(fake: Any) -> None:
    variant = steering()
    assert variant.arguments == ["*fp32:16", "i32", "i64:16", "fp32", "none", "=1"]
    serve(fake, variant)
    launch(variant.kernel, (3, 2), X, 5, 64, 0.5, None, 1, warps=8, D=64, BLOCK=128)
    assert not variant.kernel.jitted
    head = f"cuLaunchKernelEx 0x33 grid 3 2 1 block 256 1 1 shared 0 stream {STREAM}"
    assert fake.log[-1].startswith(f"{head} : ")
    expected = [
        struct.pack(code, value) for code, value in zip(("<Q", "<i", "<q", "<f"), (0x1000, 5, 64, 0.5), strict=True)
    ]
    assert fake.parameters == [*expected, bytes(8), bytes(8)]


def test_a_variant_keeps_what_it_was_given() -> None:
    types, constants = {"x_ptr": "*fp32"}, {"D": 1}
    variant = Variant(Kernel("x_ptr", D=None), types, constants)
    types["x_ptr"], constants["D"] = "*fp64", 2
    assert (variant.types, variant.constants) == ({"x_ptr": "*fp32"}, {"D": 1})


def test_constants_may_come_in_any_order(fake: Any) -> None:
    variant = steering()
    serve(fake, variant)
    launch(variant.kernel, (1,), X, 5, 64, 0.5, None, 1, BLOCK=128, D=64, warps=8)
    launch(variant.kernel, (1,), X, 5, 64, 0.5, None, 1, BLOCK=64, D=128, warps=8)
    assert len(variant.kernel.jitted) == 1
    assert variant.kernel.jitted[0][2]["D"] == 128


CALL = {"args": (X, 5, 64, 0.5, None, 1), "warps": 8, "stages": 3, "D": 64, "BLOCK": 128}
OTHERS = {
    "rows is 1, as the JIT would specialise": ({"args": (X, 1, 64, 0.5, None, 1)}, True),
    "rows is divisible by 16": ({"args": (X, 32, 64, 0.5, None, 1)}, True),
    "stride of 64 bits": ({"args": (X, 5, 2**40, 0.5, None, 1)}, True),
    "an address that is not aligned": ({"args": (AWRY, 5, 64, 0.5, None, 1)}, False),
    "another dtype": ({"args": (Place(0x1000, torch.float64), 5, 64, 0.5, None, 1)}, False),
    "rows of 64 bits": ({"args": (X, 2**31, 64, 0.5, None, 1)}, False),
    "a stride not divisible": ({"args": (X, 5, 65, 0.5, None, 1)}, False),
    "an int for a float": ({"args": (X, 5, 64, 1, None, 1)}, False),
    "a tensor where None is compiled in": ({"args": (X, 5, 64, 0.5, X, 1)}, False),
    "another int where 1 is compiled in": ({"args": (X, 5, 64, 0.5, None, 2)}, False),
    "an argument fewer": ({"args": (X, 5, 64, 0.5, None)}, False),
    "other warps": ({"warps": 4}, False),
    "other stages": ({"stages": 2}, False),
    "another constant": ({"D": 65}, False),
    "a constant more": ({"EXTRA": 1}, False),
}


@pytest.mark.parametrize(("change", "served"), OTHERS.values(), ids=list(OTHERS))
def test_what_fits_no_variant_goes_to_the_jit(fake: Any, change: dict[str, Any], served: bool) -> None:
    variant = steering()
    serve(fake, variant)
    call = CALL | change
    args = call.pop("args")
    before = len(fake.log)
    launch(variant.kernel, (4,), *args, **call)
    assert (len(fake.log) > before) == served
    named = {key: value for key, value in call.items() if key.isupper()}
    options = {"num_warps": call["warps"], "num_stages": call["stages"], "enable_fp_fusion": True} | named
    assert variant.kernel.jitted == ([] if served else [((4,), args, options)])


def test_another_kernel_is_not_served(fake: Any) -> None:
    variant = steering()
    serve(fake, variant)
    other = steering().kernel
    launch(other, (1,), X, 5, 64, 0.5, None, 1, warps=8, D=64, BLOCK=128)
    assert len(other.jitted) == 1


def test_grids(fake: Any) -> None:
    variant = steering()
    serve(fake, variant)
    before = fake.log
    for empty in ((0,), (3, 0), (1, 1, 0)):
        launch(variant.kernel, empty, X, 5, 64, 0.5, None, 1, warps=8, D=64, BLOCK=128)
    assert not variant.kernel.jitted
    assert fake.log == before
    launch(variant.kernel, lambda meta: (1,), X, 5, 64, 0.5, None, 1, warps=8, D=64, BLOCK=128)
    assert len(variant.kernel.jitted) == 1


def test_the_most_special_variant_is_tried_first(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that serve a call, the one that promises most; whatever order the file has them in."""
    kernel = Kernel("x_ptr", "rows", D=None)
    plain = Variant(kernel, {"x_ptr": "*fp32", "rows": "i32"}, {"D": 8}, warps=1)
    aligned = Variant(kernel, {"x_ptr": "*fp32:16", "rows": "i32"}, {"D": 8}, warps=1)
    even = Variant(kernel, {"x_ptr": "*fp32:16", "rows": "i32:16"}, {"D": 8}, warps=1)
    folded = Variant(kernel, {"x_ptr": "*fp32:16"}, {"D": 8, "rows": 1}, warps=1)
    assert [v.promises for v in (plain, aligned, even, folded)] == [0, 1, 2, 2]
    ship(monkeypatch, {"some": [plain, aligned, even]}, threads={id(plain): 96, id(aligned): 64, id(even): 32})
    fake.expect("*fp32 i32 null null")
    aot._load(0, 90, building=False)
    for args, threads in (((X, 32), 32), ((X, 2), 64), ((AWRY, 32), 96), ((AWRY, 2), 96)):
        launch(kernel, (1,), *args, warps=1, D=8)
        assert f"block {threads} 1 1" in fake.log[-1]
    assert not kernel.jitted


# --- devices


def test_a_kernel_runs_where_its_first_argument_is(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    variant, current = steering(), [0]

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.index

        def __exit__(self, *error: object) -> None:
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(_launch, "current_device", lambda: current[0])
    serve(fake, variant)
    entered = []
    monkeypatch.setattr(Kernel, "__getitem__", lambda kernel, grid: lambda *args, **options: entered.append(current[0]))
    there = Place(0x1000, device=3)
    launch(variant.kernel, (1,), there, 5, 64, 0.5, None, 1, warps=8, D=64, BLOCK=128)
    assert entered == [3]
    assert current == [0]
    before = len(fake.log)
    launch(variant.kernel, (1,), X, 5, 64, 0.5, None, 1, warps=8, D=64, BLOCK=128)
    assert len(fake.log) == before + 1


def test_the_interpreter_and_the_host_are_left_alone(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = steering()
    serve(fake, variant)
    before = fake.log
    host = torch.zeros(4)
    launch(variant.kernel, (1,), host, 5, 64, 0.5, None, 1, warps=8, D=64, BLOCK=128)
    monkeypatch.setattr(_launch, "INTERPRETED", True)
    launch(variant.kernel, (1,), X, 5, 64, 0.5, None, 1, warps=8, D=64, BLOCK=128)
    assert len(variant.kernel.jitted) == 2
    assert fake.log == before


def test_a_refusal_of_the_driver_is_not_hidden(fake: Any) -> None:
    variant = steering()
    serve(fake, variant)
    fake.library.fake_fail(b"cuLaunchKernelEx", 1)
    with pytest.raises(DeviceError, match=r"cuLaunchKernelEx\(entry\)"):
        launch(variant.kernel, (1,), X, 5, 64, 0.5, None, 1, warps=8, D=64, BLOCK=128)
    assert not variant.kernel.jitted


# --- attaching


def ship(monkeypatch: pytest.MonkeyPatch, shipped: dict[str, list[Variant]], **changes: dict[int, Any]) -> None:
    """These are the modules and variants that ship; all are in the cache as changed."""

    def built(variant: Variant, arch: int) -> aot.Built | None:
        said = {"entry": "entry", "threads": 32, "hidden": 2, "shared": 0, "cubin": b"\x7fELF" + bytes(60)}
        said |= {key: of[id(variant)] for key, of in changes.items() if id(variant) in of}
        return aot.Built(variant.name, arch, registers=1, spilled=0, ptx="", **said) if said["cubin"] else None

    monkeypatch.setattr(aot, "modules", lambda: list(shipped))
    monkeypatch.setattr(aot, "variants", lambda module: iter(shipped[module]))
    monkeypatch.setattr(aot, "cached", built)


def test_load_says_what_is_left_to_the_jit_and_why(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel("x_ptr", D=None)
    good, missing, scratch, strange, broken, greedy = (
        Variant(kernel, {"x_ptr": kind}, {"D": i}, warps=1)
        for i, kind in enumerate(["*fp32", "*fp32", "*fp32", "*fp8e5", "*fp32", "*fp32"])
    )
    ship(
        monkeypatch,
        {"a": [good, missing, scratch], "b": [strange, broken, greedy]},
        hidden={id(scratch): -1},
        cubin={id(missing): b"", id(broken): b"nothing"},
        shared={id(greedy): 2**20},
    )
    fake.expect("*fp32 null null")
    fake.library.fake_fail(b"cuFuncSetAttribute", 1)
    report = aot._load(0, 90, building=False)
    assert report.arch == 90
    assert report.loaded == (good.name,)
    assert report.left[missing.name] == "not built"
    assert report.left[scratch.name] == "only Triton can launch it"
    assert "'*fp8e5'" in report.left[strange.name]
    assert "no whole ELF file" in report.left[broken.name]
    assert "cuFuncSetAttribute(entry) failed" in report.left[greedy.name]
    for i in range(6):
        launch(kernel, (1,), X, warps=1, D=i)
    assert [options["D"] for _, _, options in kernel.jitted] == [1, 2, 3, 4, 5]


def test_attach_needs_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="there is no CUDA device"):
        aot.attach()
    monkeypatch.setattr(_launch, "INTERPRETED", True)
    with pytest.raises(DeviceError, match="TRITON_INTERPRET"):
        aot.attach()


# --- the gram that nvcc compiles


class Rows(NamedTuple):
    """y [S, P, block, D] of a device."""

    shape: tuple[int, int, int, int]
    address: int = 2**21
    contiguous: bool = True
    dtype: torch.dtype = torch.float16

    def data_ptr(self) -> int:
        return self.address

    def get_device(self) -> int:
        return 0

    def is_contiguous(self) -> bool:
        return self.contiguous


@pytest.fixture
def gram(fake: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., bool]:
    cubin = tmp_path / "gram.cubin"
    cubin.write_bytes(fake.cubin)
    monkeypatch.setattr(aot, "GRAM", cubin)
    monkeypatch.setattr(gram_cuda, "_multiprocessors", lambda device: 132)
    fake.expect("map *i32 *i64 *fp64 i32 i32 i32")
    ship(monkeypatch, {})
    loaded = aot._load(0, 90, building=False).loaded
    assert loaded == ("emocore_gram_sm90", "emocore_gram2_sm90")

    def call(y: Rows, chain: int | None = None) -> bool:
        tensors = (Place(0x1000, torch.int64), y.shape[2], Place(0x2000, torch.int32), Place(0x3000, torch.float64))
        return gram_cuda.fold_gram(y, *tensors, chain or gram_cuda.CHAIN // y.shape[1])

    return call


def test_gram_is_given_its_map_and_sizes(fake: Any, gram: Callable[..., bool]) -> None:
    assert gram(Rows((3, 2, 16384, 4096)))
    tensor_map, axes, launched = fake.log[-5], fake.log[-4:-1], fake.log[-1]
    assert tensor_map == f"cuTensorMapEncodeTiled fp16 {2**21:#x} plain 1 swizzle 128"
    assert axes == ["axis 4096 0 64 1", "axis 16384 8192 64 1", f"axis 6 {2 * 16384 * 4096} 1 1"]
    head = "cuLaunchKernelEx 0x33 grid 132 1 1 block 384 1 1 shared 205904 stream 77 : "
    assert launched.startswith(head + "ab" * 128)
    expected = [struct.pack("<Q", at) for at in (0x2000, 0x1000, 0x3000)]
    assert fake.parameters[1:] == [*expected, *(struct.pack("<i", n) for n in (3, 16384, 4096))]
    assert gram(Rows((3, 2, 16384, 4096)))
    assert fake.log[-2] == launched  # its map was made once


def test_gram_leaves_what_it_cannot_read(gram: Callable[..., bool], monkeypatch: pytest.MonkeyPatch) -> None:
    assert gram(Rows((1, 1, 16384, 384), address=2**22))
    assert not gram(Rows((1, 1, 16384, 388)))
    assert not gram(Rows((1, 1, 16384, 384), address=2**22 + 8))
    assert not gram(Rows((1, 1, 16384, 384), contiguous=False))
    assert not gram(Rows((1, 3, 16384, 384)))
    assert not gram(Rows((1, 1, 16384, 384), address=2**22), chain=256)  # of float16 rows
    monkeypatch.setattr(gram_cuda, "HANDLES", {})
    assert not gram(Rows((1, 1, 16384, 384), address=2**22))


def test_a_gram_that_cannot_be_loaded_is_left(fake: Any, gram: Callable[..., bool]) -> None:
    aot.GRAM.write_bytes(b"nothing")
    report = aot._load(0, 90, building=False)
    assert report.loaded == ()
    assert set(report.left) == {"emocore_gram_sm90", "emocore_gram2_sm90"}


def test_gram_is_of_one_architecture(fake: Any, gram: Callable[..., bool]) -> None:
    assert aot._load(0, 100, building=False).loaded == ()
