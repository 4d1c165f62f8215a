"""Every example in a docstring and in the README runs."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import emocore

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(emocore.__path__, "emocore.")
    if "kernels" not in m.name and not m.name.endswith(("._C", ".__main__"))
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_every_module_says_what_it_is() -> None:
    for name in MODULES:
        assert importlib.import_module(name).__doc__, name


def test_readme_examples_run(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's Python blocks, in order, in one namespace, on the demo's model and a part of the corpus."""
    from emocore.demo import load_model
    from emocore.emotions import corpus

    passages = corpus.neutral
    monkeypatch.setattr(corpus, "topics", lambda folder=None: ["kitchen", "letter"])
    monkeypatch.setattr(corpus, "neutral", lambda part=None: passages(part)[:60])

    model, tokenizer, _ = load_model(None)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    space = {"model": model, "tokenizer": tokenizer}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), space)


def test_readme_names_both_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text
    assert "make test" in text


def test_the_project_speaks_of_itself_alone() -> None:
    """No path of somebody's machine in what ships."""
    for path in [*ROOT.glob("*.md"), *(ROOT / "emocore").rglob("*.py"), *(ROOT / "csrc").glob("*")]:
        assert not re.search(r"/(?:root|home|work)/", path.read_text()), path
