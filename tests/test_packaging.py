"""The packaging recipe: what a checkout and a wheel must hold for `import emocore.kernels` to work and no more."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_kernels_folder_never_becomes_a_package_of_that_name() -> None:
    """Hugging Face has a package `kernels`; an __init__.py here would shadow it and break loading models."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert os.readlink(ROOT / "emocore" / "kernels") == "../kernels"


def test_no_conftest_at_the_root() -> None:
    """It would put the root on sys.path, and `kernels` with it."""
    assert not (ROOT / "conftest.py").exists()
    assert str(ROOT) not in sys.path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    # a copy, so that neither a build folder here nor an extension built in place leaks into the wheel
    source = out / "source"
    leave = shutil.ignore_patterns(".git", ".venv", "build", "*.so", "out", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, source, symlinks=True, ignore=leave)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out)]
    subprocess.run(
        [*command, str(source)], check=True, capture_output=True, env={**os.environ, "PYTHONWARNINGS": "ignore"}
    )
    (found,) = out.glob("emocore_engine-*.whl")
    return found


def test_wheel_holds_code_kernels_types_and_stories(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "emocore/__init__.py",
        "emocore/py.typed",
        "emocore/_C.pyi",
        "emocore/kernels/steering.py",
        "emocore/benchmarks/conftest.py",
        "emocore/benchmarks/bench_label_sums.py",
        "emocore/emotions/data/banned.txt",
        "emocore/emotions/data/stories/letter.jsonl",
    ):
        assert name in names
    assert any(n.startswith("emocore/_C.") and n.endswith((".so", ".pyd")) for n in names)
    assert not any(n.startswith(("kernels/", "benchmarks/", "tests/", "csrc/")) for n in names)


def test_wheel_works_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, 'site');"
        "import emocore, torch; assert 'site' in emocore.__file__, emocore.__file__;"
        "m = emocore.Moments(covariance=True); m.update(torch.eye(3)); assert m.count == 3;"
        "import emocore._C as c; assert 'site' in c.__file__;"
        "import emocore.kernels;"
        "assert len(emocore.emotions.corpus.stories()) % 171 == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_the_wheel_measures_itself_outside_of_a_checkout(wheel: Path, tmp_path: Path) -> None:
    """`emocore bench` there: a result that is right, beside others, and the settings that were taken away."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    command = [sys.executable, "-P", "-m", "emocore", "bench", "--quick", "--only", "label_sums", "--threads", "1"]
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "OPENBLAS_CORETYPE": "Haswell"}
    done = subprocess.run([*command, "--json", "found.json"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["environment"]["dropped"]["OPENBLAS_CORETYPE"] == "Haswell"
    assert found["environment"]["settings"] == {}
    assert {case["op"] for case in found["cases"]} == {"label_sums"}
    assert all(case["contenders"][0]["rounds"] >= 3 for case in found["cases"])


def test_an_unbuilt_checkout_says_make(tmp_path: Path) -> None:
    """Without the extension: a typed error that names the command, and the reference on request."""
    code = (
        "import sys; sys.modules['emocore._C'] = None;"
        "import torch, emocore, emocore.errors as e\n"
        "try: emocore.Moments().update(torch.eye(2))\n"
        "except e.NativeMissingError as error: assert 'make' in str(error), error\n"
        "else: raise SystemExit('no error')\n"
        "with emocore.ops.use('reference'):\n"
        "    m = emocore.Moments(); m.update(torch.eye(2)); assert m.mean.tolist() == [0.5, 0.5]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
