"""The harness: contenders run interleaved in one process, behind a correctness check, and one table is printed at the
end.

A case names its contenders, ours first, and how far ours may be from float64. Timings are medians over interleaved
rounds; `ratio` is the best other contender over ours.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

import emocore

TABLE: list[dict[str, Any]] = []
HEAD = ("case", "threads", "ours ms", "best other", "ms", "ratio", "error", "its error", "rate")

Contender = Callable[[], torch.Tensor]


def error_of(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference relative to the largest exact value."""
    return float((found.double() - exact).abs().max() / exact.abs().max())


@pytest.fixture
def race(benchmark: Any) -> Callable[..., None]:
    """race(case, {"emocore": f, "torch ...": g}, exact, bound, work, unit): check, time interleaved, record; `read`
    makes what our first call returned comparable, outside the timing."""

    def run(
        case: str,
        contenders: Mapping[str, Contender],
        exact: torch.Tensor,
        bound: float,
        work: float,
        unit: str,
        rounds: int = 9,
        read: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        ours, *others = contenders
        errors = {}
        for name, call in contenders.items():
            found = call()
            errors[name] = error_of(read(found) if read and name == ours else found, exact)
        assert errors[ours] <= bound, f"{case}: {ours} errs by {errors[ours]:.1e}"
        if benchmark.disabled:
            benchmark(contenders[ours])
            return
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, call in contenders.items():
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
        median = {name: statistics.median(t) for name, t in times.items()}
        best = min(others, key=lambda name: median[name])
        row = dict(
            zip(
                HEAD,
                (
                    case,
                    torch.get_num_threads(),
                    f"{median[ours] * 1e3:.2f}",
                    best,
                    f"{median[best] * 1e3:.2f}",
                    f"{median[best] / median[ours]:.2f}x",
                    f"{errors[ours]:.0e}",
                    f"{errors[best]:.0e}",
                    f"{work / median[ours] / 1e9:.1f} {unit}",
                ),
                strict=True,
            )
        )
        TABLE.append(row)
        benchmark.extra_info.update(
            row,
            op=case.split()[0],
            impl=emocore.ops.implementations(),
            error_vs_float64=errors,
            seconds=median,
            versions={"torch": torch.__version__, "emocore": emocore.__version__},
        )
        benchmark.pedantic(contenders[ours], rounds=3)

    return run


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"], autouse=True)
def threads(request: pytest.FixtureRequest) -> Any:
    """Every case runs on one thread and on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not TABLE:
        return
    wide = {key: max(len(key), *(len(str(row[key])) for row in TABLE)) for key in HEAD}
    terminalreporter.write_line("")
    terminalreporter.write_line("  ".join(f"{key:<{wide[key]}}" for key in HEAD))
    for row in TABLE:
        terminalreporter.write_line("  ".join(f"{row[key]!s:<{wide[key]}}" for key in HEAD))
