"""Tensor maps: what the driver is asked for, and what is refused before it is asked."""

from typing import Any

import pytest

from emocore import _C
from emocore.errors import DeviceError


def test_tensor_map_of_a_stack_of_matrices(fake: Any) -> None:
    made = _C.driver_tensor_map(2**40, "fp16", (6, 16384, 4096), (2**33, 4096, 1), (1, 64, 64))
    assert made == b"\xab" * 128
    assert fake.log == [
        f"cuTensorMapEncodeTiled fp16 {2**40:#x} plain 1 swizzle 128",
        "axis 4096 0 64 1",
        "axis 16384 8192 64 1",
        f"axis 6 {2**34} 1 1",
    ]


@pytest.mark.parametrize(("dtype", "size"), [("fp16", 2), ("bf16", 2), ("fp32", 4)])
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_tensor_map_of_a_matrix(fake: Any, dtype: str, size: int, swizzle: int) -> None:
    columns = swizzle // size or 256
    _C.driver_tensor_map(4096, dtype, [3, 17], [24, 1], [256, columns], swizzle)
    assert fake.log == [
        f"cuTensorMapEncodeTiled {dtype} 0x1000 plain 1 swizzle {swizzle}",
        f"axis 17 0 {columns} 1",
        f"axis 3 {24 * size} 256 1",
    ]


GOOD: dict[str, Any] = {
    "address": 4096, "dtype": "fp16", "shape": (8, 64), "strides": (64, 1), "box": (8, 64), "swizzle": 128,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"address": 4104}, "address"),
        ({"address": 0}, "address"),
        ({"dtype": "i32"}, "fp16, bf16 or fp32"),
        ({"dtype": "fp61"}, "fp16, bf16 or fp32"),
        ({"shape": (8,)}, "one length"),
        ({"strides": (64, 1, 1)}, "one length"),
        ({"box": ()}, "one length"),
        ({"shape": (), "strides": (), "box": ()}, "one length"),
        ({"shape": (1,) * 6, "strides": (8,) * 5 + (1,), "box": (1,) * 6}, "one length"),
        ({"shape": (0, 64)}, "shape must be"),
        ({"shape": (2**32 + 1, 64)}, "shape must be"),
        ({"strides": (64, 2)}, "stride 1"),
        ({"strides": (65, 1)}, "16 bytes"),
        ({"strides": (2**40, 1)}, "below 2\\^40"),
        ({"box": (257, 64)}, "box must be"),
        ({"box": (8, 0)}, "box must be"),
        ({"box": (8, 72)}, "longer than the swizzle"),
        ({"box": (8, 4)}, "16 bytes"),
        ({"swizzle": 16}, "swizzle must be"),
    ],
)
def test_tensor_map_says_what_the_driver_would_not(fake: Any, change: dict[str, Any], said: str) -> None:
    _C.driver_tensor_map(**GOOD)
    fake.expect()
    with pytest.raises(ValueError, match=said):
        _C.driver_tensor_map(**GOOD | change)
    assert not fake.log


def test_a_refused_tensor_map(fake: Any) -> None:
    fake.library.fake_fail(b"cuTensorMapEncodeTiled", 1)
    with pytest.raises(DeviceError, match="cuTensorMapEncodeTiled failed; got CUDA_ERROR_INVALID_VALUE"):
        _C.driver_tensor_map(**GOOD)
