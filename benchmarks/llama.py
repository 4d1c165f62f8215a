"""A model in the shape of Llama: random weights, plain torch, a fixed cache, nothing that keeps it out of a graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .shapes import Shape

THETA = 500_000.0


class Cache:
    """Keys and values [2, B, H, most, d] a layer; `at` [1] is where the next token goes, on the device."""

    def __init__(self, shape: Shape, batch: int, most: int, filled: int, like: Tensor) -> None:
        size = (2, batch, shape.kv_heads, most, shape.dim // shape.heads)
        self.layers = [torch.randn(size, dtype=like.dtype, device=like.device) for _ in range(shape.layers)]
        self.at = torch.tensor([filled], device=like.device)
        self.filled = filled

    def get_seq_length(self) -> Tensor:
        """Tokens before the next forward, on the device."""
        return self.at


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = shape.heads, shape.kv_heads, shape.dim // shape.heads
        inner = shape.kv_heads * self.size
        self.q, self.o = (nn.Linear(shape.dim, shape.dim, bias=False, dtype=dtype) for _ in range(2))
        self.k, self.v = (nn.Linear(shape.dim, inner, bias=False, dtype=dtype) for _ in range(2))

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], layer: int, cache: Cache | None) -> Tensor:
        b, t, _ = x.shape
        q = _rotated(self.q(x).view(b, t, self.heads, self.size).transpose(1, 2), turn)
        k = _rotated(self.k(x).view(b, t, self.kv_heads, self.size).transpose(1, 2), turn)
        v = self.v(x).view(b, t, self.kv_heads, self.size).transpose(1, 2)
        if cache is not None:  # one token a sequence, which sees all of the cache: a mask would rule out fast kernels
            keys, values = cache.layers[layer]
            k, v = keys.index_copy_(2, cache.at, k), values.index_copy_(2, cache.at, v)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=cache is None, enable_gqa=True)
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


class Block(nn.Module):
    """Attention and a gated feed-forward, each added to its input."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention = Attention(shape, dtype)
        self.gate, self.up = (nn.Linear(shape.dim, shape.inner, bias=False, dtype=dtype) for _ in range(2))
        self.down = nn.Linear(shape.inner, shape.dim, bias=False, dtype=dtype)
        self.before, self.between = (nn.RMSNorm(shape.dim, dtype=dtype) for _ in range(2))

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], layer: int, cache: Cache | None) -> Tensor:
        x = x + self.attention(self.before(x), turn, layer, cache)
        y = self.between(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """input_ids [B, T] to the last block's normed output [B, T, D]; with a cache T is 1."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        with torch.device(device):
            self.embed = nn.Embedding(shape.vocab, shape.dim, dtype=dtype)
            self.layers = nn.ModuleList(Block(shape, dtype) for _ in range(shape.layers))
            self.norm = nn.RMSNorm(shape.dim, dtype=dtype)
            size = shape.dim // shape.heads
            self.frequency = THETA ** -(torch.arange(0, size, 2).float() / size)
        self.eval().requires_grad_(False)

    def forward(self, input_ids: Tensor, past_key_values: Cache | None = None) -> Tensor:
        t, cache = input_ids.shape[1], past_key_values
        at = torch.arange(t, device=input_ids.device) if cache is None else cache.at
        angle = at[:, None].float() * self.frequency
        x = self.embed(input_ids)
        turn = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, turn, i, cache)
        return self.norm(x)


def _rotated(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """x [B, H, T, d] turned by its position's angles [T, d/2], the first half against the second."""
    cos, sin = turn
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
