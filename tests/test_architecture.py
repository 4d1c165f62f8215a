"""The floors of the house: imports only go down. This table is the map."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "emocore"

# One line a floor; within a line a module may import only those before it.
FLOORS = [
    ["errors", "precision", "control", "faults", "labels", "hookpoints", "linalg", "packing", "publishing", "formats"],
    [
        "reference",
        "reference_drain",
        "reference_forward",
        "reference_steering",
        "reference_track",
        "kernels",
        "_C",
        "native",
    ],
    ["gradients", "ops", "aot"],
    ["tokens", "ledger", "blocks", "sums", "groups", "plans", "pooling", "calibration"],
    [
        "readout",
        "moments",
        "rows",
        "ring",
        "sinks",
        "batches",
        "forwards",
        "roll",
        "outflow",
        "seats",
        "courier",
        "showings",
        "tags",
        "ways",
        "transactions",
        "resident",
        "lanes",
        "capturing",
    ],
    ["verifying", "fitting", "directions"],
    ["edits", "tables", "steering"],
    [
        "alarms",
        "tracking",
        "watching",
        "onlooking",
        "monitoring",
        "shards",
        "manifest",
        "generations",
        "folders",
        "places",
        "registers",
        "feeds",
        "sealing",
        "intake",
        "recording",
        "recorded",
        "replaying",
        "auditing",
        "joining",
        "exporting",
        "unpacking",
        "importing",
        "store",
    ],
    ["emotions", "integrations"],
    ["demo", "benching", "cli", "__main__", "__init__"],
]
HEIGHT = {name: (floor, place) for floor, row in enumerate(FLOORS) for place, name in enumerate(row)}


def parts() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if part != "kernels":
            found.append((part, path))
    return found


def imported(path: Path) -> set[str]:
    """Parts of emocore that a file imports outside of `if TYPE_CHECKING`."""
    package = ("emocore", *path.relative_to(ROOT).parts[:-1])
    tree = ast.parse(path.read_text())
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("emocore.")}


@pytest.mark.parametrize(("part", "path"), parts(), ids=lambda x: x.name if isinstance(x, Path) else x)
def test_imports_only_go_down(part: str, path: Path) -> None:
    assert part in HEIGHT, f"{part} has no floor: give it one"
    # names of the package itself, such as __version__, stand on the ground
    for other in imported(path) & set(HEIGHT):
        assert other == part or HEIGHT[other] < HEIGHT[part], f"{path.name} imports {other}, which is not below it"


def test_every_listed_module_exists() -> None:
    listed = {name for row in FLOORS for name in row} - {"_C"}
    assert listed == {part for part, _ in parts()} | {"kernels"}


def test_the_map_in_the_docs_is_true() -> None:
    """docs/architecture.md lists every module, floor by floor, with the first line of its docstring."""
    text = (ROOT.parent / "docs" / "architecture.md").read_text()
    found = [line for line in text.splitlines() if line.startswith("| `")]
    assert found == [f"| `{name}` | {floor} | {summary(name)} |" for name, (floor, _) in HEIGHT.items()]


def summary(name: str) -> str:
    """The first sentence of a module's docstring."""
    fixed = {"kernels": "Triton kernels, one file an op.", "_C": "The compiled extension (csrc/)."}
    path = ROOT / f"{name}.py" if (ROOT / f"{name}.py").exists() else ROOT / name / "__init__.py"
    if name in fixed:
        return fixed[name]
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(doc.split("\n\n")[0].split())


def test_no_module_bears_the_name_of_a_public_function() -> None:
    import emocore

    functions = {n for n in emocore.__all__ if callable(getattr(emocore, n))}
    assert not functions & {part for part, _ in parts()}


def test_import_is_light() -> None:
    """`import emocore` loads neither torch nor anything heavy; using a name loads what it needs and no transformers."""
    code = (
        "import sys, emocore; heavy = {'torch', 'h5py', 'transformers', 'numpy', 'triton'} & set(sys.modules);"
        "assert not heavy, heavy;"
        "emocore.Moments; assert 'transformers' not in sys.modules and 'h5py' not in sys.modules;"
        "import torch; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_every_public_name_is_there() -> None:
    import emocore

    for name in emocore.__all__:
        assert getattr(emocore, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = emocore.nonsense
    assert set(emocore.__all__) <= set(dir(emocore))
