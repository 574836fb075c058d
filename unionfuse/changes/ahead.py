"""Copies that are staged ahead, for who changes the attributes of a whole tree.

A copy is on disk before it is published, and `chmod -R` asks for one file at a time: most of its
time would be spent waiting for the device. So the files that come next in a listing are staged by
a few threads meanwhile, as data is read ahead. How many is earned: none before several files of one
directory have been copied one after the other, then more with each copy that somebody came for.

What is staged is seen by nobody. What nobody comes for is thrown away a second later, and by the
next mount in any case.

Callers hold the union's lock; the threads never take it. All that they have to know of a file is in
its `Original`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import threading
from collections import deque
from collections.abc import Iterator
from itertools import islice

from unionfuse import syscalls
from unionfuse.changes.staging import INLINE_SIZE, Original, Staging
from unionfuse.layers.layer import Place
from unionfuse.layers.upperdir import UpperDirectory
from unionfuse.tree import view
from unionfuse.tree.node import Directory
from unionfuse.tree.tree import Tree

log = logging.getLogger(__name__)

_THREADS = 8
_MOST = 16  # copies of one directory that wait to be fetched
_MOST_OF_ALL = 64
_STREAK = 3  # files of one directory, copied one after the other: then it begins
_STEPS = 64  # names that are looked at each time
_WALKS = 32  # directories whose next name is remembered
_IDLE = 1.0  # seconds
_WORTH_IT = 100e-6  # seconds; who waits less for the device need not look ahead

_WAITS, _RUNS, _DONE, _FAILED, _UNWANTED = range(5)


class _Copy:
    __slots__ = ("original", "staged", "state")

    def __init__(self, original: Original, staged: bytes) -> None:
        self.original = original
        self.staged = staged
        self.state = _WAITS


Walk = Iterator[tuple[bytes, Original] | None]
"""The files of a directory that may be copied, in the order of a listing; None for other names."""


class Ahead:
    """The copies of one mount."""

    def __init__(self, tree: Tree, upper: UpperDirectory, staging: Staging) -> None:
        self._tree = tree
        self._staging = staging
        self.discard, self._free_name = upper.discard, upper.staging_name
        self._lock = threading.Lock()  # of all below; taken last, and never held across a call
        self._to_do = threading.Condition(self._lock)
        self._settled = threading.Condition(self._lock)
        self._copies: dict[tuple[int, bytes], _Copy] = {}  # by directory and name
        self._queue: deque[_Copy] = deque()
        self._threads = 0
        self._idle = 0
        self._closed = False
        self._credit = 0
        self._streak = 0
        self._last = 0  # the directory of the last copy
        self._walks: dict[int, tuple[Directory, Walk]] = {}

    # --- who asks for copies ---------------------------------------------------------------

    def fetch(self, directory: Directory, name: bytes) -> bytes | None:
        """The name of a staged copy, which is the caller's now; None: make one yourself."""
        with self._lock:
            copy = self._copies.pop((directory.id, name), None)
            if copy is None:
                return None
            if copy.state == _WAITS:  # all threads are busy
                self._queue.remove(copy)
                os.close(copy.original.source)
                return None
            self._settled.wait_for(lambda: copy.state != _RUNS)
            if copy.state == _FAILED:
                self._credit = self._streak = 0
                return None
            self._credit = min(self._credit + 2, _MOST)
            return copy.staged

    def follow(self, directory: Directory, is_file: bool) -> None:
        """The attributes of a directory, or of a file in it that was copied, have been changed."""
        if is_file:
            self._streak = self._streak + 1 if directory.id == self._last else 1
            self._last = directory.id
            if not self._credit and self._streak >= _STREAK:
                self._credit = 4
        if not self._credit or self._staging.wait < _WORTH_IT or syscalls.counts_changes():
            return
        with self._lock:
            wanted = self._credit - sum(1 for number, _ in self._copies if number == directory.id)
            wanted = min(wanted, _MOST_OF_ALL - len(self._copies))
        if wanted <= 0:
            return
        with contextlib.suppress(OSError):  # the change that it was for has been made
            for found in islice(self._walk_in(directory), _STEPS):
                if found is not None:
                    self._add(directory, *found)
                    wanted -= 1
                if not wanted:
                    break

    def _add(self, directory: Directory, name: bytes, original: Original) -> None:
        copy = _Copy(original, self._free_name())
        with self._lock:
            self._copies[directory.id, name] = copy
            self._queue.append(copy)
            if self._idle < len(self._queue) and self._threads < _THREADS:
                self._threads += 1
                threading.Thread(target=self._work, name="copy-ahead", daemon=True).start()
            else:
                self._to_do.notify()

    def _walk_in(self, directory: Directory) -> Walk:
        """The walk through a directory, where it was; from the start after it was forgotten."""
        known, walk = self._walks.get(directory.id, (None, None))
        if walk is None or known is not directory:
            if len(self._walks) >= _WALKS:
                del self._walks[next(iter(self._walks))]
            walk = self._walk(directory)
            self._walks[directory.id] = directory, walk
        return walk

    def _walk(self, directory: Directory) -> Walk:
        """The small files of a directory that are as their layer has them, with one name each."""
        self._tree.load(directory)
        below = directory.view
        assert below is not None
        for name, _ in below.after(0):
            stub = below.get(name)
            is_known = (directory.id, name) in self._copies or name in (directory.changes or ())
            if stub is None or stub.kind != stat.S_IFREG or is_known:
                yield None
                continue
            top = below.places()[stub.positions[0]]
            original = self._original(Place(top.layer, top.path, name), stub.record)
            yield None if original is None else (name, original)

    def _original(self, place: Place, record: int) -> Original | None:
        """A file that can be copied ahead; None: it takes more than that."""
        tree = self._tree
        with contextlib.suppress(OSError):
            lies_at = place.layer.directory(place.path), place.name
            if tree.redirects.data(place) != lies_at:
                return None
            source = view.open_entry(*lies_at, os.O_RDONLY)
            status = os.fstat(source)
            if status.st_nlink == 1 and status.st_blocks * 512 <= INLINE_SIZE:
                ino = tree.inodes.of(status)
                if record and tree.index is not None:
                    ino = tree.index.status(record).st_ino
                origin = tree.origins.of(place)
                return Original(status, ino, origin, (source, b""), source, is_itself=True)
            os.close(source)
        return None

    def forget(self) -> None:
        """Throw away what nobody has fetched."""
        self._walks.clear()
        with self._lock:
            unwanted = self._take_all()
        for staged in unwanted:
            self.discard(staged)

    def close(self) -> None:
        """The same, and wait until all threads have ended."""
        with self._lock:
            self._closed = True
            self._to_do.notify_all()
        self.forget()
        with self._lock:
            self._settled.wait_for(lambda: not self._threads)

    def _take_all(self) -> list[bytes]:
        """Have no copies any more; those that are to be discarded. The lock is held."""
        for copy in self._queue:
            os.close(copy.original.source)
        self._queue.clear()
        done = [copy.staged for copy in self._copies.values() if copy.state == _DONE]
        for copy in self._copies.values():
            copy.state = _UNWANTED
        self._credit = self._streak = 0
        self._copies.clear()
        return done

    # --- the threads -----------------------------------------------------------------------

    def _work(self) -> None:
        while (copy := self._next()) is not None:
            done = False
            try:
                self._staging.regular(copy.staged, copy.original)
                done = True
            except Exception as error:
                log.debug("a copy ahead: %s", error)  # who wants it finds out himself
            finally:
                os.close(copy.original.source)
            with self._lock:
                wanted = copy.state == _RUNS
                if wanted:
                    copy.state = _DONE if done else _FAILED
                self._settled.notify_all()
            if not (done and wanted):
                self.discard(copy.staged)

    def _next(self) -> _Copy | None:
        """The next copy to make; None: end."""
        unwanted: list[bytes] = []
        with self._lock:
            self._idle += 1
            while not self._queue:
                if self._closed or not self._to_do.wait(_IDLE):
                    break
            self._idle -= 1
            if self._queue:
                copy = self._queue.popleft()
                copy.state = _RUNS
                return copy
            self._threads -= 1
            if not self._threads:
                unwanted = self._take_all()
            self._settled.notify_all()
        for staged in unwanted:
            self.discard(staged)
        return None
