"""Power cuts: what the disk may hold after one, by a pessimistic model of what is persistent.

The model is that of a file system with an ordered journal (ext4, XFS):

- Changes of names and attributes become persistent in the order they were made in, each wholly or
  not at all. Any number of the last ones may be missing.
- fsync of a file makes everything persistent up to the last change of its names and attributes, of
  a directory up to the last change in it; syncfs makes everything persistent.
- Data is persistent only once fsync or sync_file_range has waited for it (the latter counts since
  these file systems log a file's size and blocks before the writing ends, see
  unionfuse.layers.ordering). Of a file that was made and whose data was not waited for nothing is
  left but its name.

`Recorder` notes the calls at unionfuse.syscalls; `disks` replays them.
"""

import contextlib
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from harness.mounts import Stack
from unionfuse import syscalls

_DESCRIPTORS = {"directory", "source", "target", "descriptor"}
_DATA = {"pwrite", "copy_range", "ftruncate", "truncate", "fallocate", "clone_file"}
_SYNCS = {"fsync", "write_back", "syncfs"}


@dataclass
class Change:
    """One call that changes names or attributes: paths in place of descriptors."""

    name: str
    args: list[Any]
    inodes: set[int] = field(default_factory=set)  # of what it changes, and of the directories
    made: int = 0  # the inode number of a new file


@dataclass
class Moment:
    """What is persistent at least from some call on: so many changes, and the data of files."""

    changes: int
    data: dict[int, bytes]


class Recorder:
    """Notes what a union does to the disk, from its making to `stop`."""

    def __init__(self, stack: Stack) -> None:
        self.base = os.fsencode(stack.base)
        self.changes: list[Change] = []
        # how many changes had been made when -> what was persistent from then on
        self.moments: list[tuple[int, Moment]] = [(0, Moment(0, {}))]
        self._faults = syscalls._faults
        self._before = self._faults.before
        self._faults.before = self._note  # type: ignore[method-assign]

    def stop(self) -> None:
        self._finish()
        self._faults.before = self._before  # type: ignore[method-assign]

    def _note(self, name: str, args: tuple[Any, ...]) -> None:
        self._finish()
        if name in _DATA:
            return
        if name in _SYNCS:
            waits = name != "write_back" or len(args) < 2 or args[1]
            if waits:
                self._synced(name, args[0])
            return
        change = Change(name, [])
        for parameter, value in zip(_parameters(name), args, strict=False):
            if parameter in _DESCRIPTORS and isinstance(value, int):
                change.inodes.add(os.fstat(value).st_ino)
                change.args.append(self._path(value))
            else:
                change.args.append(value)
        for place in _places(change):
            try:
                change.inodes.add(os.lstat(self.base + b"/" + place).st_ino)
            except FileNotFoundError:
                pass
        self.changes.append(change)

    def _finish(self) -> None:
        """After a call: note what it made."""
        if self.changes and self.changes[-1].name in ("create", "link", "rename", "mkdir"):
            change = self.changes[-1]
            place = self.base + b"/" + _places(change)[-1]
            if os.path.lexists(place):
                found = os.lstat(place)
                change.inodes.add(found.st_ino)
                if change.name == "create":
                    change.made = found.st_ino

    def _synced(self, name: str, descriptor: int) -> None:
        _, last = self.moments[-1]
        count, data = last.changes, dict(last.data)
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode):
            data[status.st_ino] = _content(f"/proc/self/fd/{descriptor}")
        if name == "syncfs":
            count = len(self.changes)
            for part in (b"/upper", b"/work"):
                for directory, _, names in os.walk(self.base + part):
                    for path in (os.path.join(directory, found) for found in names):
                        if stat.S_ISREG(os.lstat(path).st_mode):
                            data[os.lstat(path).st_ino] = _content(path)
        elif name == "fsync":
            touching = [
                number
                for number, change in enumerate(self.changes, 1)
                if status.st_ino in change.inodes
            ]
            count = max(count, *touching, 0)
        self.moments.append((len(self.changes), Moment(count, data)))

    def _path(self, descriptor: int) -> bytes:
        path = os.readlink(b"/proc/self/fd/%d" % descriptor)
        assert path.startswith(self.base + b"/"), path
        return path[len(self.base) + 1 :]


def _content(path: str | bytes) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _parameters(name: str) -> Iterator[str]:
    """The names of a call's parameters, as far as they matter here."""
    known = {
        "link": ["source", "old", "target", "new"],
        "rename": ["source", "old", "target", "new"],
        "symlink": ["text", "directory", "name"],
    }.get(name, ["directory", "name"])
    return chain(known, repeat(""))


def _places(change: Change) -> list[bytes]:
    """The paths that a change is about; of one that makes something, that last."""
    args = change.args
    if change.name in ("link", "rename"):
        return [os.path.join(args[0], args[1]), os.path.join(args[2], args[3])]
    if change.name == "symlink":
        return [os.path.join(args[1], args[2])]
    return [os.path.join(args[0], args[1]).rstrip(b"/")]


def disks(recorder: Recorder, before: Path, where: Path) -> Iterator[tuple[int, int, Moment]]:
    """Make `where` what the disk may be after each power cut; yields (changes made, kept, moment).

    `before` holds upper and work as they were at first.
    """
    total, seen = len(recorder.changes), set()
    for number, (made, moment) in enumerate(recorder.moments):
        end = recorder.moments[number + 1][0] if number + 1 < len(recorder.moments) else total
        for kept in range(moment.changes, end + 1):
            key = kept, number + 1 == len(recorder.moments), tuple(sorted(moment.data.items()))
            if key in seen:
                continue
            seen.add(key)
            parts = [before / name for name in ("upper", "work")]
            for part in parts:
                shutil.rmtree(where / part.name, ignore_errors=True)
            # in one go: hard links between them stay
            subprocess.run(["cp", "-a", *parts, where], check=True)
            _replay(recorder.changes[:kept], moment.data, os.fsencode(where))
            yield made, kept, moment


def _replay(changes: list[Change], data: dict[int, bytes], where: bytes) -> None:
    made: dict[int, int] = {}  # inode number here -> in the record
    for change in changes:
        opened = []
        args = []
        for parameter, value in zip(_parameters(change.name), change.args, strict=False):
            if parameter in _DESCRIPTORS:
                opened.append(os.open(where + b"/" + value, os.O_PATH | os.O_NOFOLLOW))
                value = opened[-1]
            args.append(value)
        with contextlib.suppress(OSError):  # then it failed in the record, too
            result = getattr(syscalls, change.name)(*args)
            if change.name == "create":
                made[os.fstat(result).st_ino] = change.made
                os.close(result)
        for descriptor in opened:
            os.close(descriptor)
    for directory, _, names in os.walk(where):
        for name in names:
            path = os.path.join(directory, name)
            found = os.lstat(path)
            if stat.S_ISREG(found.st_mode) and found.st_ino in made:
                content = data.get(made[found.st_ino], b"")
                times = found.st_atime_ns, found.st_mtime_ns
                with open(path, "wb") as file:
                    file.write(content)
                os.chmod(path, stat.S_IMODE(found.st_mode))  # writing took set-uid bits
                os.utime(path, ns=times)
