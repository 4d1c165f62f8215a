"""The hot path on a real GPU: exact on fresh rows, the same bits when replayed, no wait, no allocation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import emocore
from emocore import Moments, Threshold, Tokens, ops
from emocore.calibration import Calibration
from emocore.directions import Directions

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: streams, graphs and the allocator are CUDA's own"
)

LAYERS, DIM, SEQUENCES, TOKENS = 3, 192, 8, 33
BLOCK = 512
VARIANCE, CORRELATION = 2e-6, 5e-6  # the contract
ROUNDING = 3e-3  # over sqrt(rows): six standard deviations of 16-bit rows' rounding to fp16, which averages out


class Rows(nn.Module):
    """Shows inputs_embeds [B, T, D] at every layer; computes and allocates nothing."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(LAYERS))
        self.place = nn.Parameter(torch.zeros(1, dtype=dtype), requires_grad=False)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds)
        return inputs_embeds


@pytest.fixture
def fresh(device: torch.device) -> torch.Generator:
    """Random numbers that no run had before; the seed is shown when a test fails."""
    g = torch.Generator(device)
    print("seed", g.seed())
    return g


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """New memory is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def rows(g: torch.Generator, ratio: float = 2.0, sequences: int = SEQUENCES, tokens: int = TOKENS) -> Tensor:
    """[B, T, D] about means of `ratio` deviations, which lie between 0.01 and 100."""
    scale = torch.logspace(-2, 2, DIM, device=g.device)
    x = torch.randn(sequences, tokens, DIM, generator=g, device=g.device)
    return (x + ratio) * scale


def sinks(labels: int | None = None) -> dict[str, Moments]:
    return {f"layers.{i}": Moments(labels, covariance=True, block_rows=BLOCK) for i in range(LAYERS)}


def recorded(call: Callable[[], object]) -> Callable[[], None]:
    """A call as a CUDA graph, recorded after it ran on the recording stream."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        call()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def unwaiting(call: Callable[[], object]) -> None:
    """Run a call in which a wait for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("ratio", [0.0, 2.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_moments_of_fresh_rows_hold_the_contract(fresh: torch.Generator, dtype: torch.dtype, ratio: float) -> None:
    """20,000 rows in uneven batches: within the bounds of the contract, every row and label accounted for."""
    base = rows(fresh, ratio, 80, 250).to(dtype).to(fresh.device)
    found = Moments(3, covariance=True)
    model = Rows(dtype).to(fresh.device)
    with torch.no_grad(), emocore.capture(model, {"layers.1": found}) as tap:
        assert tap.resident
        for part, first in zip(base.split((1, 30, 49)), (0, 1, 31), strict=True):
            with tap.batch(labels=[(first + i) % 3 for i in range(len(part))]):
                model(inputs_embeds=part)
    flat = base.reshape(-1, DIM).double()
    exact = torch.cov(flat.T)
    variance, covariance = exact.diagonal(), found.covariance().to(exact)
    assert found.count == len(flat)
    assert found.label_count.sum() == len(flat)
    noise = 0.0 if dtype == torch.float32 else ROUNDING / len(flat) ** 0.5
    assert float((covariance.diagonal() / variance - 1).abs().max()) <= VARIANCE + noise
    scale = torch.outer(variance, variance).sqrt()
    assert float(((covariance - exact) / scale).abs().max()) <= CORRELATION + noise
    label = torch.arange(len(base), device=flat.device).remainder(3).repeat_interleave(base.shape[1])
    for k in range(3):
        off = (found.label_mean[k].to(exact) - flat[label == k].mean(0)).abs() / variance.sqrt()
        assert float(off.max()) <= 1e-6


def test_a_thousand_replays_are_a_thousand_forwards_bit_for_bit(fresh: torch.Generator) -> None:
    """Fresh rows are copied into the recorded input before each replay; state and ledger are those of eager calls."""
    model = Rows().to(fresh.device)
    shown = torch.empty(SEQUENCES, TOKENS, DIM, dtype=torch.bfloat16, device=fresh.device)
    stream = [rows(fresh).bfloat16() for _ in range(16)]
    eager, replayed = sinks(), sinks()

    def show(x: Tensor) -> None:
        shown.copy_(x)
        model(inputs_embeds=shown)

    with torch.no_grad(), emocore.capture(model, eager) as tap:
        for i in (0, 0, *range(1000)):  # a recording calls once on its stream, and once before that
            show(stream[i % 16])
        eager_ledger = tap.ledger
    with torch.no_grad(), emocore.capture(model, replayed) as tap:
        show(stream[0])
        replay = recorded(lambda: model(inputs_embeds=shown))
        for i in range(1000):
            shown.copy_(stream[i % 16])
            replay()
        replayed_ledger = tap.ledger
    assert str(replayed_ledger) == str(eager_ledger)
    for name, moments in eager.items():
        assert moments.count == 1002 * SEQUENCES * TOKENS
        theirs = replayed[name].state_dict()
        for key, value in moments.state_dict().items():
            if isinstance(value, Tensor):
                assert torch.equal(value, theirs[key]), (name, key)


def test_nothing_waits_and_nothing_is_allocated(fresh: torch.Generator) -> None:
    """After one forward of the largest shape; with labels, skipped tokens and blocks that fill."""
    model, found = Rows().to(fresh.device), sinks(labels=4)
    x = rows(fresh).bfloat16()
    mask = torch.ones(SEQUENCES, TOKENS, dtype=torch.int64, device=fresh.device)
    mask[1::2, :7] = 0

    def several() -> None:
        for _ in range(20):
            model(inputs_embeds=x)

    with torch.no_grad(), emocore.capture(model, found, tokens=Tokens(skip=3)) as tap:
        with tap.batch(labels=[i % 4 for i in range(SEQUENCES)], mask=mask):
            model(inputs_embeds=x)
        unwaiting(several_batches(tap, model, x, mask))
    kept = sum(TOKENS - 3 - 7 * (i % 2) for i in range(SEQUENCES))
    assert found["layers.0"].count == 21 * kept
    with torch.no_grad(), emocore.capture(model, sinks()):
        several()
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        several()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def several_batches(tap: emocore.Tap, model: nn.Module, x: Tensor, mask: Tensor) -> Callable[[], None]:
    def run() -> None:
        for _ in range(20):
            with tap.batch(labels=[i % 4 for i in range(SEQUENCES)], mask=mask):
                model(inputs_embeds=x)

    return run


def directions(g: torch.Generator, names: int = 5) -> dict[str, Directions]:
    """Directions at every layer, calibrated to a mean of 0 and a deviation of 1."""
    patterns = torch.randn(names, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    zeros, ones = torch.zeros(names, dtype=torch.float64), torch.ones(names, dtype=torch.float64)
    readers = (patterns / patterns.norm(dim=1, keepdim=True)).float()
    one = Directions(
        tuple(f"d{i}" for i in range(names)),
        patterns,
        readers,
        torch.zeros(DIM, dtype=torch.float64),
        mean_norm=4.0,
        residual=ones,
        calibration=Calibration(zeros, ones, 1000, None),
    )
    return {f"layers.{i}": one for i in range(LAYERS)}


@pytest.mark.parametrize("how", [{"add": {"d0": 0.5}}, {"ablate": ["d1", "d2"]}, {"clamp": {"d3": 1.0}}], ids=str)
def test_steering_is_the_same_in_a_graph(fresh: torch.Generator, how: dict[str, object]) -> None:
    model, x = Rows().to(fresh.device), rows(fresh).bfloat16()
    shown, out = x.clone(), torch.empty_like(x)
    with torch.no_grad(), emocore.steer(model, directions(fresh), **how):
        model(inputs_embeds=shown)  # moves what it needs to the device
        unwaiting(lambda: model(inputs_embeds=shown))
        replay = recorded(lambda: out.copy_(model(inputs_embeds=shown)))
        shown.copy_(x)
        eager = model(inputs_embeds=shown.clone()).clone()
        out.fill_(torch.nan)
        shown.copy_(x)
        replay()
    assert torch.equal(out, eager)
    assert not torch.equal(out, x)


def test_a_monitor_is_the_same_in_a_graph_and_waits_for_nothing(fresh: torch.Generator) -> None:
    """Scores of 100 replays are those of 100 eager steps; so are the alarms."""
    model = Rows().to(fresh.device)
    vectors, alarms = directions(fresh), {"d0": Threshold(z=0.5, on="token")}
    shown = torch.empty(SEQUENCES, 1, DIM, dtype=torch.bfloat16, device=fresh.device)
    stream = [torch.randn(shown.shape, generator=fresh, device=fresh.device).bfloat16() for _ in range(102)]
    names = [f"request {i}" for i in range(SEQUENCES)]
    found = []
    for graph in (False, True):
        with torch.no_grad(), emocore.monitor(model, vectors, alarms) as watch:
            step: Callable[[], object] = lambda: model(inputs_embeds=shown)  # noqa: E731
            for i, x in enumerate(stream):
                shown.copy_(x)
                with watch.batch(requests=names):
                    if graph and i == 1:
                        step = recorded(step)
                    elif i > 1:
                        unwaiting(step)
                    else:
                        step()
            found.append((watch.scores, [(a.name, a.sequence, a.hook_point) for a in watch.alarms]))
    (eager, rang), (replayed, rang_too) = found
    assert rang
    assert sorted(rang) == sorted(rang_too)
    for name, scores in eager.items():
        for sequence, value in scores.items():
            assert torch.equal(value, replayed[name][sequence]), (name, sequence)


def test_ops_is_served_by_kernels(device: torch.device) -> None:
    """On a GPU no op of the hot path falls back to the reference."""
    with ops.use("auto"):
        table = ops.implementations()
    slow = [op for op in ("project", "steer_add", "steer_add_", "steer_set") if table[op]["cuda"] == "reference"]
    assert not slow
