# ruff: noqa: N999
"""The CPU kernels. Formulas, shapes and accumulators: emocore/precision.py and `csrc/*_cpu.h`.

A NumPy array is seen as rows of its last axis, which is contiguous; one axis is one row. The tuple
`(address, dtype, rows, cols, row_stride)` says the same of any memory, the stride in elements; a 1-D array is
`(address, dtype, 1, n, n)`. Activations are float64, float32, float16 or bfloat16 (only as a tuple: NumPy has none).
Raises ValueError for a shape or dtype, IndexError for an index or label, before anything is written.

And a ring of slots that threads of its own write to files, as emocore/ring.py has it.

And the launcher of GPU kernels: `driver_*` reach a GPU through the CUDA driver, found at run time; what it refuses is
an emocore.errors.DeviceError.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

TILE: int
CHAIN: int
BLOCK_CHAINS: int

Memory: TypeAlias = tuple[int, str, int, int, int]
Activations: TypeAlias = NDArray[np.float64] | NDArray[np.float32] | NDArray[np.float16] | Memory
Reals: TypeAlias = NDArray[np.float64] | NDArray[np.float32] | Memory
Float64s: TypeAlias = NDArray[np.float64] | Memory

def stage(
    source: Activations,
    index: NDArray[np.int64] | Memory | None,
    out: Activations,
    norms: Float64s,
    finite: NDArray[np.uint8] | Memory,
    threads: int,
) -> int:
    """out[j] = source[index[j]] with its norm; a row not finite becomes zeros. Returns how many did."""

def label_sums(
    rows: Activations,
    labels: NDArray[np.int32] | Memory | None,
    weights: Float64s | None,
    shift: Float64s,
    sums: Float64s,
    squares: Float64s | None,
    threads: int,
) -> None:
    """sums[k] += w (x - shift), squares[k] += w (x - shift)^2, k the label of the row; -1 is skipped."""

def gram(
    rows: Activations,
    weights: Float64s | None,
    shift: Float64s,
    tiles: Float64s,
    threads: int,
) -> None:
    """tiles += the lower triangle of sum w (x - shift)(x - shift)', tiles [T, 128, 128] by tile rows."""

def project(
    rows: Activations,
    readers: Reals,
    centre: Float64s | None,
    normalise: bool,
    out: Reals,
    threads: int,
    parts: int = 1,
    offset: Float64s | None = None,
    mean: Float64s | None = None,
    std: Float64s | None = None,
) -> None:
    """out[r, k] = ((x_r - centre) . v_k + offset_k - mean_k) / std_k, readers [parts * K, D] added up part by part.

    With normalise the first two are divided by |x_r - centre|; a zero row is not. Readers are float32, float64, or of
    the same 16 bits as the rows.
    """

def pool_scores(scores: Reals, starts: NDArray[np.int64] | Memory, largest: Reals, mean: Reals, threads: int) -> None:
    """Largest and mean of the rows starts[b] to starts[b + 1] - 1; NaN where there are none, and where the mean is."""

def steer_add(rows: Activations, delta: Reals, out: Activations, threads: int) -> None:
    """out = x + delta, rounded once; out may be rows."""

def steer_slots(
    rows: Activations,
    slots: NDArray[np.int32] | Memory | None,
    readers: Reals | None,
    levels: Reals,
    out: NDArray[np.int32] | Memory,
    threads: int,
) -> None:
    """out[r] = the slot of row r where its scores x . readers all exceed levels[slot], else 0.

    slots [M] are of N / M rows each; those of no row of the tables are 0. None: every row has slot 1.
    """

def steer_edit(
    rows: Activations,
    slots: NDArray[np.int32] | Memory | None,
    readers: Reals | None,
    levels: Reals | None,
    deltas: Reals | None,
    basis: Reals | None,
    dual: Reals | None,
    target: Reals | None,
    gate: Reals | None,
    out: Activations,
    threads: int,
) -> None:
    """out = x + deltas[s] + sum_r gate[s, r] (target[s, r] - x . basis_r) dual_r, rounded once; out may be rows.

    s is what steer_slots finds; where it is 0 a row keeps its bits, and in place is not written. Without slots tables
    have one row, for all. Tables are float64 for float64 rows, else float32.
    """

def large_pages(memory: Memory) -> None:
    """Advises the system to back memory that is still untouched with large pages."""

def peak(arithmetic: str, turns: int, threads: int) -> float:
    """Operations that a team does in `turns` rounds of multiply-adds on registers: time the call for the ceiling."""

def isa() -> str:
    """The instruction set in use."""

def isas() -> list[str]:
    """Those that this machine can use, narrowest first."""

def use_isa(name: str) -> None:
    """Computes with this instruction set from now on."""

def openmp() -> str:
    """Path of the OpenMP runtime whose threads are used, "" for our own."""

def crc32c(data: bytes | bytearray | memoryview | NDArray[np.generic], crc: int = 0, portable: bool = False) -> int:
    """CRC-32C of contiguous memory, continuing `crc`; `portable` by tables, as where there is no instruction for it."""

class Ring:
    """Slots and writers; bytes a second are limited to `throttle`, unless negative, until it is closed."""

    def __init__(self, slots: int, slot_bytes: int, threads: int, throttle: float) -> None: ...
    def open(self, handle: int, offset: int, direct: bool) -> Stream:
        """Of a file descriptor that is the stream's own from now on: it closes it."""

    def live(self) -> tuple[int, int, int, int, float, float]:
        """Slots, those free, those with the writers; bytes written; seconds of writing, and of waiting for slots."""

    def close(self, seconds: float) -> tuple[str, int]:
        """How it ended, and the errno where that is "failed"."""

    @property
    def forked(self) -> bool: ...

class Stream:
    """How a call ended: "done", "full", "late" (no progress for so many seconds), "failed", "closed" or "forked"."""

    def append(self, address: int, rows: int, width: int, stride: int, wait: bool, seconds: float) -> str:
        """`rows` times `width` bytes, `stride` bytes apart."""

    def append_device(self, address: int, bytes: int, after: int, wait: bool, seconds: float) -> str:
        """Bytes on the current device, as they are when the stream `after` has done what it was given until now."""

    def flush(self, seconds: float) -> str: ...
    def standing(self) -> tuple[int, int, int]:
        """Bytes appended, their CRC-32C, and the errno of the write that failed, or 0."""

    def room(self) -> int:
        """Bytes that can be appended without waiting."""

def driver_available() -> bool:
    """Whether the CUDA driver, libcuda.so.1, is there. Starts nothing: a context is torch's to make."""

def driver_open(path: str) -> bool:
    """Takes another library for the driver, for tests; "" goes back. Kernels stay with the one that loaded them."""

def driver_relax() -> None:
    """From now on this thread may copy, wait and allocate while another records a graph: it has no part in it."""

def driver_load(
    cubin: bytes,
    name: str,
    parameters: str,
    threads: int,
    shared: int = 0,
    cluster: tuple[int, int, int] = (1, 1, 1),
    programmatic: bool = False,
) -> int:
    """A handle of the entry `name` of a cubin, on the current device for the life of the process.

    `parameters` has a word for every argument of a call, in order: "*bf16" a tensor ("*bf16:16" at an address
    divisible by 16), "i32" an int ("i32:16" likewise; "i1" is a bool), "fp32" a float, "map" a tensor map; "none" and
    "=1" what is compiled in; "null" is no argument, but zeros for the kernel. `shared` is in bytes, `threads` and
    `cluster` as in CUDA; a `programmatic` kernel starts early, and waits itself for what is ahead of it.
    """

def driver_launch(handles: tuple[int, ...], grid: tuple[int, ...], stream: int, arguments: tuple[object, ...]) -> bool:
    """Launches the first of the kernels that the arguments fit; False, with nothing done, where none does.

    None does on a thread whose current device is another. Tensors are on the device, or in pinned memory.
    """

def driver_tensor_map(
    address: int,
    dtype: str,
    shape: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    swizzle: int = 128,
) -> bytes:
    """The 128 bytes by which a kernel copies boxes out of a tensor of fp16, bf16 or fp32 at an address; zeros outside.

    Axes are outermost first, strides in elements, the last 1; rows of the box are no longer than the swizzle in bytes.
    """

def gram_cuda_form(parts: int) -> tuple[str, str, int, int]:
    """How csrc/gram_cuda.cu folds y of 1 or 2 parts: entry, parameters, threads, shared bytes for `driver_load`."""

def gram_cuda_grid(hooks: int, dim: int, multiprocessors: int) -> int:
    """Its blocks."""

def gram_cuda_map(address: int, hooks: int, parts: int, block: int, dim: int) -> bytes:
    """Its tensor map of y [hooks, parts, block, dim] float16."""
