"""How a kernel is launched, and how a variant that ships is written down."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from triton import knobs

# Under the interpreter `tl.dot` multiplies the bit patterns of bfloat16: kernels upcast their operands there.
INTERPRETED = bool(knobs.runtime.interpret)


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel: the Triton type of every argument ("*bf16:16" is a pointer divisible by 16), its
    constants, warps and stages."""

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 3

    @property
    def name(self) -> str:
        """The kernel and what tells this variant from its others."""
        given = [t.removesuffix(":16").removeprefix("*") for t in self.types.values() if t.startswith("*")]
        return f"{self.kernel.__name__}[{','.join(given[:2])},{','.join(map(str, self.constants.values()))}]"


def launch(
    kernel: Any,
    grid: tuple[int, ...] | Callable[..., tuple[int, ...]],
    *args: Any,
    warps: int = 4,
    stages: int = 3,
    **constants: Any,
) -> None:
    """Run `kernel` on `grid` programs; nothing for an empty grid."""
    if isinstance(grid, tuple) and 0 in grid:
        return
    kernel[grid](*args, num_warps=warps, num_stages=stages, **constants)
