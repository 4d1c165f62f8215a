"""The activation store when the disk is full or the system says no: the last commit stays whole."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emocore import ActivationStore, activations, generations, shards, store
from emocore.errors import StoreError


def rows(start: int, n: int) -> Tensor:
    return torch.arange(start, start + n).float().unsqueeze(1).expand(n, 256).contiguous()


def whole(path: Path, n: int) -> None:
    """Exactly the first n rows are there, and every count and checksum fits."""
    assert torch.equal(activations(path)["a"].rows, rows(0, n))
    store.verify(path)


# --- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A volume of 4 MiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)], capture_output=True)
    if done.returncode:
        pytest.skip("no right to mount a small volume")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def fill(kept: ActivationStore) -> None:
    for start in range(500, 2500, 100):
        kept.at("a").update(rows(start, 100))
    kept.commit()


def test_a_full_disk(small_disk: Path) -> None:
    """A typed error with errno, the last commit whole, exact counts; and on it goes when there is space."""
    folder, ballast = small_disk / "acts", small_disk / "ballast"
    with ActivationStore(folder) as kept:
        feed = kept.at("a")
        feed.update(rows(0, 500))
        kept.commit()
        ballast.write_bytes(bytes(3 << 20))
        for _ in range(2):  # it stays full
            with pytest.raises(StoreError, match=r"No space left on device \(errno 28\)"):
                fill(kept)
            whole(folder, 500)
            assert feed.ledger.rows.accumulated == 500
        counts = feed.ledger.rows
        assert counts.formed == counts.accumulated + counts.dropped + counts.pending
        assert len(list(folder.glob("rows-*"))) == 1
        ballast.unlink()
        feed.update(rows(500, 700))
    whole(folder, 1200)
    assert activations(folder).ledger["a"].rows.dropped == counts.dropped > 0


# --- every step of a commit fails once


STEPS = ("os.ftruncate", "os.pwrite", "os.rename", "generations.publish", "os.fsync")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_of_a_commit_fails(step: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number))

    with ActivationStore(tmp_path) as kept:
        kept.at("a").update(rows(0, 10))
        kept.commit()
        kept.at("a").update(rows(10, 10))
        with monkeypatch.context() as broken:
            module, name = step.split(".")
            broken.setattr({"os": os, "generations": generations}[module], name, fails)
            with pytest.raises(StoreError, match=rf"{os.strerror(number)}.*\(errno {number}\)"):
                kept.commit()
        counts = kept.ledger["a"].rows
        assert (counts.accumulated, counts.dropped, counts.pending) == (10, 10, 0)
        whole(tmp_path, 10)
        assert len(list(tmp_path.glob("rows-*"))) == 1
        kept.at("a").update(rows(10, 5))
    whole(tmp_path, 15)


def test_a_manifest_that_is_published_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the last fsync of the folder fails, the rows are there, and the error says what is at stake."""
    from emocore import publishing

    with ActivationStore(tmp_path) as kept:
        kept.at("a").update(rows(0, 10))

        def fails(folder: Path) -> None:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as broken:
            broken.setattr(publishing, "_sync", fails)
            with pytest.raises(StoreError, match="a power cut may still undo it"):
                kept.commit()
        assert kept.ledger["a"].rows.accumulated == 10
        whole(tmp_path, 10)
        kept.at("a").update(rows(10, 1))
    whole(tmp_path, 11)


def test_a_volume_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_direct", lambda folder, file: None)
    with ActivationStore(tmp_path) as kept:
        kept.at("a").update(rows(0, 999))
    whole(tmp_path, 999)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="Not a directory"):
        ActivationStore(tmp_path / "file" / "acts")


def test_a_fork_takes_nothing_and_harms_nothing(tmp_path: Path) -> None:
    """Use in the child is an error there; it ends without a trace, and the parent goes on."""
    code = (
        "import os, sys, torch; from emocore import ActivationStore; from emocore.errors import StoreError\n"
        "kept = ActivationStore(sys.argv[1]); kept.at('a').update(torch.zeros(3, 2))\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    try: kept.at('a').update(torch.ones(3, 2))\n"
        "    except StoreError as error: sys.exit(7 if 'its child' in str(error) else 1)\n"
        "    sys.exit(2)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
        "kept.at('a').update(torch.ones(2, 2)); kept.close()\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], check=True, timeout=60)
    assert activations(tmp_path)["a"].rows[:, 0].tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("threads", [True, False], ids=["threads", "the interpreter ends"])
def test_every_shard_is_durable_before_any_is_named(
    threads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    did: list[tuple[str, str]] = []

    def watched(name: str, call: Any) -> Any:
        def does(what: Any, *args: Any, **options: Any) -> Any:
            did.append((name, os.path.basename(os.readlink(f"/proc/self/fd/{what}") if name == "fsync" else what)))
            return call(what, *args, **options)

        return does

    def refuses(*args: Any) -> None:
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    with ActivationStore(tmp_path) as kept:
        for name in "abcdefghij":
            kept.at(name).update(rows(0, 10))
        for name in ("fsync", "rename"):
            monkeypatch.setattr(os, name, watched(name, getattr(os, name)))
        if not threads:
            monkeypatch.setattr(ThreadPoolExecutor, "submit", refuses)
        kept.commit()
        files = {f"{shard.file}.open" for shard in kept._manifest.rows} | {"index-00000000-000.safetensors.open"}
        first = next(i for i, (what, _) in enumerate(did) if what == "rename")
        last = max(i for i, (what, _) in enumerate(did) if what == "rename")
        assert {name for what, name in did[:first]} == files
        assert {name for what, name in did[first : last + 1]} == files
        assert did[last + 1] == ("fsync", tmp_path.name)
