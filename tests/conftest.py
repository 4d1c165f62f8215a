"""Tiny models: random weights in the shapes of the common families, and one whose tokens never mix; a driver that only
writes down how it was called."""

import copy
import ctypes
import importlib.util
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: its tests run on the CPU

# the cores are shared by the processes of a run
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

PAD, EOS, BOS, VOCAB = 0, 1, 2, 64


def _build(family: str, **changes: Any) -> nn.Module:
    import transformers

    common = {
        "vocab_size": VOCAB,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": BOS,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    grouped = {**common, "num_key_value_heads": 1, "intermediate_size": 32}
    config = {
        "llama": lambda: transformers.LlamaConfig(**grouped | changes),
        "gpt2": lambda: transformers.GPT2Config(**common | changes),
        "gemma": lambda: transformers.GemmaConfig(**grouped | {"head_dim": 8} | changes),
        "mixtral": lambda: transformers.MixtralConfig(
            **grouped | {"num_local_experts": 4, "num_experts_per_tok": 2} | changes
        ),
    }[family]()
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


_built: dict[str, nn.Module] = {}


def _copy(family: str = "llama", **changes: Any) -> nn.Module:
    key = f"{family} {sorted(changes.items())}"
    if key not in _built:
        _built[key] = _build(family, **changes)
    return copy.deepcopy(_built[key])


@pytest.fixture(scope="module")
def tiny() -> Iterator[Callable[..., nn.Module]]:
    """tiny("llama" | "gpt2" | "gemma" | "mixtral", **config): a causal model of 3 blocks, 16 wide.

    The module's tests run on one thread: on products this small, threads only wait for each other.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield _copy
    torch.set_num_threads(before)


class Affine(nn.Module):
    """x -> scale x + shift, element by element: the same bits whatever stands beside a token."""

    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(scale)), nn.Parameter(torch.tensor(shift))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Tokenwise(nn.Module):
    """Embeddings of ids [B, T] through affine blocks; the padding id is NaN everywhere."""

    def __init__(self, dim: int = 5, blocks: int = 2) -> None:
        super().__init__()
        self.config = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS)
        self.embed = nn.Embedding(VOCAB, dim)
        self.layers = nn.ModuleList(Affine(1.5 + i, 0.25 * i) for i in range(blocks))
        with torch.no_grad():
            self.embed.weight.copy_(torch.randn(VOCAB, dim, generator=torch.Generator().manual_seed(0)))
            self.embed.weight[PAD] = torch.nan

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(scope="session")
def tokenwise() -> Callable[..., Tokenwise]:
    """tokenwise(dim=5, blocks=2): a model whose tokens never mix, so that statistics can be compared bit for bit."""
    return Tokenwise


class FakeDriver:
    """tests/data/fake_driver.c in use; `library` has its own controls."""

    cubin = b"\x7fELF" + bytes(60)
    sizes: ClassVar = {
        "i1": 1,
        "u1": 1,
        "i8": 1,
        "u8": 1,
        "i16": 2,
        "i32": 4,
        "fp32": 4,
        "map": 128,
    }  # bytes; all others have 8

    def __init__(self, path: Path) -> None:
        self.path, self.library = path, ctypes.CDLL(str(path))
        self.library.fake_log.restype = ctypes.c_char_p
        self.expect()

    def expect(self, words: str = "") -> None:
        """Begin anew with kernels that take what the words say."""
        given = [word for word in words.split() if word != "none" and word[0] != "="]
        sizes = [self.sizes.get(word.split(":")[0], 8) for word in given]
        self.library.fake_reset(len(sizes), (ctypes.c_int * 64)(*sizes))

    @property
    def log(self) -> list[str]:
        return self.library.fake_log().decode().splitlines()

    @property
    def parameters(self) -> list[bytes]:
        """Of the last launch."""
        return [bytes.fromhex(word) for word in self.log[-1].split(" : ")[1].split()]


@pytest.fixture(scope="session")
def compiled_driver(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """compiled_driver(*flags, source=...): the path of a driver compiled with NVIDIA's header, which Triton ships."""
    folder = tmp_path_factory.mktemp("drivers")
    header = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "include"

    def compiled(*flags: str, source: Path = Path(__file__).parent / "data" / "fake_driver.c") -> Path:
        path = folder / f"lib{len(list(folder.iterdir()))}.so"
        command = ["gcc", "-shared", "-fPIC", "-pthread", "-I", str(header), *flags, str(source), "-o", str(path)]
        subprocess.run(command, check=True)
        return path

    return compiled


@pytest.fixture(scope="session")
def driver_path(compiled_driver: Callable[..., Path]) -> Path:
    return compiled_driver()


@pytest.fixture
def fake(driver_path: Path) -> Iterator[FakeDriver]:
    """The launcher calls a driver that only writes down how it was called."""
    from emocore import _C

    assert _C.driver_open(str(driver_path))
    driver = FakeDriver(driver_path)
    yield driver
    driver.library.fake_quiet(0)
    _C.driver_open("")
