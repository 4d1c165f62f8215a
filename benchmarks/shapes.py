"""Shapes of real models, and the sizes at which the cases run: on a GPU, on a CPU, and tiny."""

from __future__ import annotations

from dataclasses import dataclass

LABELS = 171  # emotion words
COLD_BYTES = 240e6  # inputs rotate over more than this, so that none is found in a GPU's second-level cache


@dataclass(frozen=True)
class Shape:
    """Width, depth, heads, inner width and vocabulary of a model."""

    name: str
    dim: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int


MODELS = {
    shape.name: shape
    for shape in (
        Shape("MiniLM-L6", 384, 6, 12, 12, 1536, 30_522),
        Shape("GPT-2", 768, 12, 12, 12, 3072, 50_257),
        Shape("GPT-2-medium", 1024, 24, 16, 16, 4096, 50_257),
        Shape("Llama-3.2-1B", 2048, 16, 32, 8, 8192, 128_256),
        Shape("Llama-3.2-3B", 3072, 28, 24, 8, 8192, 128_256),
        Shape("Llama-3-8B", 4096, 32, 32, 8, 14_336, 128_256),
        Shape("Llama-3-70B", 8192, 80, 64, 8, 28_672, 128_256),
    )
}
SMALL_LLAMA = Shape("Llama-16", 512, 16, 8, 4, 1536, 8192)  # what a CPU reads in part of a second
TINY_MODEL = Shape("tiny", 64, 2, 4, 2, 96, 211)
LAYERS = {shape.dim: shape.layers for shape in MODELS.values()}

# What stands for a width where kernels are only interpreted: beside a tile of 128, on it and past it.
TINY_DIMS = {384: 65, 768: 96, 1024: 128, 2048: 130, 3072: 144, 4096: 160, 8192: 257}


@dataclass(frozen=True)
class Scale:
    """How large the cases are: "full" and "quick" on the device there is, "tiny" where kernels are interpreted."""

    name: str
    block: int  # rows that a drain folds at once
    seconds: float  # of timing a case
    rounds: tuple[int, int]  # fewest and most
    warm: int = 2  # calls before them

    @property
    def tiny(self) -> bool:
        """Whether figures mean nothing."""
        return self.name == "tiny"

    def dim(self, width: int) -> int:
        """The width that stands for `width`."""
        return TINY_DIMS[width] if self.tiny else width

    def rows(self, full: int, tiny: int = 96) -> int:
        """So many rows, or the few that stand for them."""
        return tiny if self.tiny else full

    def labels(self) -> int:
        """How many labels or directions."""
        return 7 if self.tiny else LABELS

    def points(self, width: int) -> int:
        """Hook points of one group: the layers of the model of that width, at most 64k rows a hook point's block."""
        return 2 if self.tiny else LAYERS[width]


SCALES = {
    "full": Scale("full", 16_384, 0.6, (5, 31)),
    "quick": Scale("quick", 16_384, 0.1, (3, 5), 1),
    "tiny": Scale("tiny", 512, 0.0, (1, 1), 0),
}
