"""Files made to do harm: hostile.py reads as many as the time allows, and never crashes, hangs or grows."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("kind", ["folder", ".safetensors", ".h5"])
def test_only_typed_errors_or_exact_content(kind: str, scale: Any, ran: Any, memory: Path) -> None:
    command = [sys.executable, "-W", "ignore", HERE / "hostile.py", kind, memory, str(scale(0, 1)), str(scale(3, 240))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 + 2 * scale(3, 240))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    ran("{read:,} read, {refused:,} refused, the slowest in {slowest:.2f} s, {kilobytes:,} kB more".format(**said))
    assert min(said["read"], said["refused"]) > 20
    assert said["slowest"] < 1
    assert said["kilobytes"] < 512 << 10
