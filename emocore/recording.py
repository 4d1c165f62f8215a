"""Recording: the activation store, a sink for many hook points that streams their rows to durable shards.

Rows are pending until a commit has made them durable: it seals the open shards, then publishes the next manifest. What
fails before that leaves the last commit as it was, and the rows since then are counted as dropped.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from . import __version__
from .errors import ArgumentError, StoreError
from .feeds import Feed
from .folders import Folder
from .generations import advance, generations, newest, path_of
from .intake import Intake, Part
from .labels import label_names
from .ledger import Ledger
from .manifest import DTYPES, Manifest, check_files
from .outflow import Arrival
from .places import Growing, table
from .publishing import UnsyncedError
from .registers import Register
from .ring import Policy, Ring, block, drop
from .sealing import Sealing
from .shards import Draft
from .sinks import Whose

RING_BYTES = 64 << 20  # of the ring that a store makes for itself: what a cache holds is written faster
SLOT_BYTES = 2 << 20
MOST_NAME = 2048  # of a hook point, in the header of its shards
POLICIES = {"block": block, "drop": drop}


class ActivationStore:
    """Streams the rows of any number of hook points to the folder `path`, or goes on where a store there ended.

    A sink for `capture`, which gives every hook point `at(hook_point)`. `labels` are the names of label ids; `dtype` is
    what rows are stored as, by default their own; `policy` is what happens when the disk is slower than the rows:
    "block", "drop" or `ring.sample(p, seed)`. A shard ends with the forward that fills its `shard_rows` or
    `shard_bytes`, and all hook points are then committed, as by `commit()` and `close()`. Several processes give each
    its `rank` of `world`, and `store.join` makes one store of theirs. `model` names what the rows came from.
    Raises ArgumentError, and StoreError where the folder cannot be written, is damaged, or has a writer.

    >>> import tempfile; folder = tempfile.mkdtemp()
    >>> with ActivationStore(folder, labels=["calm", "sad"]) as store:
    ...     store.at("layers.0").update(torch.ones(2, 3), labels=["sad", None])
    >>> store.ledger["layers.0"].rows.accumulated
    2
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        labels: int | Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        policy: str | Policy = "block",
        shard_rows: int | None = None,
        shard_bytes: int = 1 << 29,
        model: str | None = None,
        rank: int = 0,
        world: int = 1,
        ring: Ring | None = None,
    ) -> None:
        if dtype is not None and dtype not in DTYPES.values():
            raise ArgumentError("dtype", expected=" or ".join(DTYPES), got=dtype)
        if not 0 <= rank < world:
            raise ArgumentError("rank", expected=f"0 .. {world - 1}", got=rank)
        if shard_bytes < 1 or (shard_rows is not None and shard_rows < 1):
            raise ArgumentError("shard_rows, shard_bytes", expected="at least 1", got=(shard_rows, shard_bytes))
        self.path = Path(path) / f"rank-{rank:05}" if world > 1 else Path(path)
        if isinstance(policy, str) and policy not in POLICIES:
            raise ArgumentError("policy", expected=f"{' or '.join(POLICIES)}, or a sample", got=repr(policy))
        self._dtype, self._shard_rows, self._shard_bytes = dtype, shard_rows or sys.maxsize, shard_bytes
        self._ring, self._own_ring = ring, ring is None
        self.lock = threading.RLock()
        self._feeds: dict[str, Feed] = {}
        self._placed: list[Feed] = []  # by their place in the manifest
        self._full = False
        self._folder, self._pid, self._open = Folder(self.path), os.getpid(), True
        self._intake = Intake(POLICIES[policy] if isinstance(policy, str) else policy, self._folder)
        try:
            self._resume(label_names(labels), model, rank, world)
        except BaseException:
            self._folder.close()
            raise

    # --- what is there

    def _resume(self, labels: tuple[str, ...], model: str | None, rank: int, world: int) -> None:
        found = newest(self.path)
        before = found.manifest if found else Manifest(labels=labels, rank=rank, world=world)
        self.labels = tuple(before.labels)
        for name, given, held in (
            ("labels", labels or self.labels, self.labels),
            ("rank, world", (rank, world), (before.rank, before.world)),
            ("model", model or before.model, before.model or model),
            ("path", before.ranks, None),
        ):
            if given != held:
                raise ArgumentError(f"{name}: another store is in {self.path}", expected=held, got=given)
        check_files(self._folder.handle, before)
        # where a newer manifest is damaged, it may have listed what this one does not
        self.swept, self._number = self._folder.sweep(before.layouts(), sealed=not (found and found.damaged))
        self._published = found is not None
        self._manifest = replace(
            before,
            generation=max(generations(self.path), default=0),
            model=model or before.model,
            versions={"emocore": __version__, "torch": str(torch.__version__)},
        )
        self._register = Register(before.sequences, rank, world)
        for point in before.points:
            feed = Feed(self, point.hook_point, self._dtype, point)
            self._feeds[point.hook_point] = feed
            self._placed.append(feed)

    @property
    def ledger(self) -> dict[str, Ledger]:
        """Ledger by hook point: `accumulated` rows are durable, `pending` ones are not yet."""
        self._fetch()
        return {name: feed.ledger for name, feed in self._feeds.items()}

    @property
    def generation(self) -> int:
        """The number of the last manifest; 0 before the first."""
        return self._manifest.generation

    # --- rows come in

    def at(self, hook_point: str) -> Feed:
        """The sink of one hook point, the same one every time; raises ArgumentError for another dtype than it has."""
        self._check()
        with self.lock:
            self._check()
            if hook_point not in self._feeds:
                if not 1 <= len(json.dumps(hook_point)) - 2 <= MOST_NAME:
                    raise ArgumentError("hook point", expected=f"1 to {MOST_NAME} letters", got=hook_point[:80])
                self._feeds[hook_point] = Feed(self, hook_point, self._dtype, None)
            feed = self._feeds[hook_point]
            if self._dtype not in (None, feed.dtype):
                raise ArgumentError(f"dtype: of {hook_point!r} in {self.path}", expected=feed.dtype, got=self._dtype)
            return feed

    def take(self, feed: Feed, rows: Tensor, finite: bool, places: Callable[[Register], Tensor]) -> None:
        """Take rows [N, D] that the feed's ledger counts as formed, with their places; what is kept is pending then."""
        self._check()
        with self.lock:
            self._check()
            rows, good = feed.fit(rows, finite)
            try:
                self._append([self._intake.pick(feed, rows, good, places(self._register))])
            finally:
                self._register.forget()

    def receive(self, arrivals: Sequence[Arrival], whose: Sequence[Whose]) -> None:
        """Take finite rows of many feeds at once, and count them: formed, and dropped where they could not be taken."""
        with self.lock:
            due = []
            for sink, rows, _ in arrivals:
                due.append((sink.ledger.rows, sink.ledger.rows.missing))
                sink.ledger.rows.add(formed=len(rows))
            try:
                self._check()
                where = torch.cat([table(0), *(self._register.places(one) for one in whose)])
                parts = []
                for feed, rows, kept in arrivals:
                    rows, good = feed.fit(rows, True)
                    parts.append(self._intake.pick(feed, rows, good, where if kept is None else where[kept]))
                self._append(parts)
            except BaseException:
                for counts, before in due:
                    counts.add(dropped=counts.missing - before)
                raise
            finally:
                self._register.forget()

    def _append(self, parts: Sequence[Part]) -> None:
        self._placed += [part.feed for part in parts if part.feed not in self._placed]
        parts = [part for part in parts if len(part.rows)]
        try:
            with self._folder.said():
                for feed, *_ in parts:
                    if feed.draft is None:
                        feed.draft = self._draft("rows", self._placed.index(feed))
        except StoreError:
            self._abandon()
            raise
        failed: BaseException | None = None
        for (feed, _, where), offered in zip(parts, self._intake.offer(parts), strict=True):
            if isinstance(offered, BaseException):
                failed = failed if isinstance(failed, StoreError) else offered
                continue
            feed.ledger.rows.add(pending=offered.taken, dropped=offered.dropped)
            if offered.taken:
                where = where if offered.taken == len(where) else where[: offered.taken]
                self._place(feed, where)
                self._register.keep(where)
                feed.pending += offered.taken
                self._full |= feed.pending_bytes >= self._shard_bytes or feed.pending >= self._shard_rows
        if isinstance(failed, StoreError):
            self._abandon()
        if failed is not None:
            raise failed

    @property
    def waits(self) -> bool:
        """Whether rows wait for room where they are; else they are dropped."""
        return self._intake.policy.waits

    def discard(self) -> None:
        """Drop what is pending: it is not to be trusted."""
        with self.lock:
            self._abandon()

    def _place(self, feed: Feed, where: Tensor) -> None:
        """Say whose the next rows of a feed are, in one table with the feeds that got the same ones."""
        if feed.pending == 0:
            known = (f.growing for f in self._placed if f.pending)
            feed.growing = next((g for g in known if g.extend(0, where)), feed.growing)
        if not feed.growing.extend(feed.pending, where):
            feed.growing = Growing(feed.growing.first(feed.pending))
            feed.growing.extend(feed.pending, where)

    def _draft(self, kind: str, place: int) -> Draft:
        if self._ring is None:
            slots = max(RING_BYTES // SLOT_BYTES, 2 * len(self._feeds))
            self._ring = Ring(slots=slots, slot_bytes=min(SLOT_BYTES, max(RING_BYTES // slots >> 20, 1) << 20))
        return Draft(self._folder.handle, f"{kind}-{self._number:08}-{place:03}.safetensors", self._ring)

    # --- and become durable

    def settle(self) -> None:
        """Commit where a shard is full: no forward is half handed over."""
        with self.lock:
            if self._full:
                self._commit()

    def commit(self) -> int:
        """Make all pending rows durable and return the number of the manifest that lists them.

        Rows that a capture still has on its device are fetched before. Raises StoreError naming path and errno; the
        last commit is then as it was, and what was pending is dropped.
        """
        self._fetch()
        return self._commit()

    def _fetch(self) -> None:
        """Fetch what captures hold on their devices, not while the store is held: another thread brings it."""
        failed: BaseException | None = None
        for collect in {collect for feed in list(self._feeds.values()) for collect in list(feed.residents)}:
            try:
                collect()
            except BaseException as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def _commit(self) -> int:
        self._check()
        with self.lock:
            self._check()
            points = tuple(feed.point() for feed in self._placed)
            if self._published and points == self._manifest.points and not any(f.pending for f in self._placed):
                return self.generation
            sealing = Sealing(self._placed, list(self._register.requests), self._draft)
            generation = self.generation + 1
            try:
                with self._folder.said():
                    sealing.finish()
                    sealing.name()
                    self._folder.sync()
                    manifest = replace(
                        self._manifest,
                        generation=generation,
                        points=points,
                        sequences=self._register.sequences,
                        rows=(*self._manifest.rows, *sealing.rows),
                        indexes=(*self._manifest.indexes, *sealing.indexes.values()),
                    )
                    advance(self.path, manifest)
            except BaseException as error:
                # a StoreError tells itself; where anything else came between, the folder does
                stands = not isinstance(error, StoreError) and path_of(self.path, generation).exists()
                if stands or isinstance(error, UnsyncedError):
                    self._adopt(manifest)
                else:
                    sealing.abandon()
                    self._abandon()
                raise
            self._adopt(manifest)
            return generation

    def _adopt(self, manifest: Manifest) -> None:
        self._manifest, self._published = manifest, True
        self._next_shards(kept=True)

    def _abandon(self) -> None:
        """Drop all that is pending, and what was written of it."""
        for feed in self._placed:
            if feed.draft is not None:
                feed.draft.abandon()
        self._next_shards(kept=False)

    def _next_shards(self, kept: bool) -> None:
        for feed in self._placed:
            feed.begin_shard(kept)
        self._register.clear()
        self._number += 1
        self._full = False

    def close(self) -> None:
        """Commit, and let another writer in; the store then takes nothing more."""
        if self._open and self._pid != os.getpid():
            self._check()  # says so; a lock may have been held when the process was forked
        try:
            if self._open:
                self._fetch()
        finally:
            self._shut()

    def _shut(self) -> None:
        with self.lock:
            if not self._open:
                return
            try:
                self._commit()
            finally:
                self._open = False
                self._intake.close()
                if self._ring is not None and self._own_ring:
                    with contextlib.suppress(StoreError):  # of what was abandoned: the rest is flushed
                        self._ring.close()
                self._folder.close()

    def _check(self) -> None:
        if not self._open:
            raise StoreError(f"{self.path}: this store is closed", way_out="Open it again to go on.")
        if self._pid != os.getpid():
            raise StoreError(
                f"{self.path}: opened in process {self._pid}, used in its child {os.getpid()}",
                way_out="Open a store in the child, with a rank= of its own.",
            )

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
