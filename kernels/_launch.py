"""How a kernel is launched, and how a variant that ships is written down.

A variant that was built ahead of time and loaded (emocore/aot.py) serves a call by the driver, at a fifth of the host
time; Triton's JIT serves all others.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from triton import knobs

# Under the interpreter `tl.dot` multiplies the bit patterns of bfloat16: kernels upcast their operands there.
INTERPRETED = bool(knobs.runtime.interpret)

# Whether a product and its sum are rounded once. Triton's default for it changes; a result must not.
FUSED = True


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel: the Triton type of every argument ("*bf16:16" is a pointer divisible by 16), its
    constants, warps and stages. An argument that is always None, or always one integer, stands among the constants.

    It serves a call of the same kernel, warps, stages and tl.constexpr constants, by name, whose other arguments, in
    order, fit the types: tensors of the dtype, at an address divisible by 16 where the type says so, ints in the type's
    range and divisible by 16 likewise (a bool only where it says "i1"), floats, and the very constants. A type without
    ":16" promises nothing, so it takes every value: also the 1, and the multiples of 16, that the JIT would specialise.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 3

    def __post_init__(self) -> None:
        for given in ("types", "constants"):  # what was given may change, for the next variant
            object.__setattr__(self, given, dict(getattr(self, given)))

    @property
    def name(self) -> str:
        """The kernel and what tells this variant from its others."""
        given = [t.removesuffix(":16").removeprefix("*") for t in self.types.values() if t.startswith("*")]
        return f"{self.kernel.__name__}[{','.join(given[:2])},{','.join(map(str, self.constants.values()))}]"

    @property
    def arguments(self) -> list[str]:
        """A word for every argument that is not tl.constexpr, in order, as `_C.driver_load` reads them."""
        words = []
        for p in self.kernel.params:
            if not p.is_constexpr:
                constant = self.constants.get(p.name)
                folded = "none" if constant is None else f"={constant}"
                words.append(self.types.get(p.name, folded))
        return words

    @property
    def promises(self) -> int:
        """How much of its arguments it takes for granted: of two that serve a call, the better has more."""
        return sum(word == "none" or word[0] == "=" or word.endswith(":16") for word in self.arguments)


def launch(
    kernel: Any,
    grid: tuple[int, ...] | Callable[..., tuple[int, ...]],
    *args: Any,
    warps: int = 4,
    stages: int = 3,
    **constants: Any,
) -> None:
    """Run `kernel` on `grid` programs, on the device of the first argument, a tensor; nothing for an empty grid."""
    if isinstance(grid, tuple) and 0 in grid:
        return
    if not INTERPRETED and (device := args[0].get_device()) >= 0:
        if device != current_device():
            with torch.cuda.device(device):
                launch(kernel, grid, *args, warps=warps, stages=stages, **constants)
            return
        handles = _cubins and _cubins.get((device, id(kernel), warps, stages, frozenset(constants.items())))
        if handles and isinstance(grid, tuple) and _submit(handles, grid, current_stream(device), args):
            return
    kernel[grid](*args, num_warps=warps, num_stages=stages, enable_fp_fusion=FUSED, **constants)


# --- variants that are loaded

_cubins: dict[tuple[Any, ...], tuple[int, ...]] = {}  # by what a call says by name: handles, the first that fits serves
_served: list[Variant] = []
_submit: Any = None  # _C.driver_launch, once something is loaded
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)


def serve(variant: Variant, device: int, handle: int, submit: Callable[..., bool]) -> None:
    """From now on calls on `device` that fit `variant`, and none served before, are `submit((handle, ...), ...)`."""
    global _submit
    _submit = submit
    named = {p.name: variant.constants[p.name] for p in variant.kernel.params if p.is_constexpr}
    # its id, since hashing a kernel takes longer than launching it; `_served` keeps every such kernel alive
    key = (device, id(variant.kernel), variant.warps, variant.stages, frozenset(named.items()))
    _served.append(variant)
    _cubins[key] = (*_cubins.get(key, ()), handle)
