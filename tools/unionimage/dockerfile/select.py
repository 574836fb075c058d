"""Which files COPY and ADD mean, and a digest of them that forgets their times.

A source tree is entered by its descriptor alone: openat2 with RESOLVE_IN_ROOT for what the
Dockerfile names, O_NOFOLLOW below that, so neither `..` nor a symbolic link leads out of it.
Source: Dockerfile reference, "COPY"; Go's filepath.Match for wildcards.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import stat
from collections.abc import Iterable, Iterator
from io import FileIO

from unionfuse import syscalls
from unionimage.dockerfile.ignore import Patterns
from unionimage.dockerfile.parser import DockerfileError
from unionimage.tuples import NamedTuple

CONFINED = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
KEPT_ATTRIBUTES = ("security.capability", "user.", "system.posix_acl_")

_NO_PATTERNS = Patterns(())


class Tree(NamedTuple):
    """A tree to copy from: its open root, what is ignored in it, and whether owners count."""

    root: int
    ignored: Patterns = _NO_PATTERNS
    keeps_owners: bool = False


class Entry(NamedTuple):
    """One thing to copy: where it lies in the tree, and its place below the destination."""

    path: bytes
    place: bytes
    status: os.stat_result


class Found(NamedTuple):
    """What one source names. A directory's entries begin with itself, its place is empty.

    `name` is what a single file is called in a destination that is a directory; a hostile or odd
    source such as `/` has none.
    """

    name: bytes
    is_directory: bool
    entries: tuple[Entry, ...]


def open_in(tree: int, path: bytes, flags: int) -> int:
    """Open a path below a root, following links as if the root were `/`."""
    return syscalls.openat2(tree, path or b".", flags, CONFINED)


def find(
    tree: Tree, sources: Iterable[str], exclude: Patterns, parents: bool, what: str
) -> list[Found]:
    """Find what each source names.

    Args:
        exclude: `--exclude`, matched below each source.
        parents: keep the directories above each file (`--parents`).
        what: how errors call the tree: "the build context", "stage one".

    Raises:
        DockerfileError: a source without wildcards that is not there.
    """
    found: list[Found] = []
    for source in sources:
        pivot, _, rest = source.rpartition("/./") if parents else ("", "", source)
        base = _clean(pivot)
        wanted = _join(base, _clean(rest))
        matches = list(_matches(tree, wanted))
        if not matches and not _has_wildcard(wanted):
            raise DockerfileError(f"{source!r} is not in {what}{_ignored_hint(tree, wanted)}")
        for path in matches:
            one = _collect(tree, path, exclude)
            if one is not None:
                found.append(_with_parents(tree, base, path, one) if parents else one)
    return found


def _clean(source: str) -> bytes:
    """The path without `.`, `..`, doubled slashes and a leading slash."""
    return os.fsencode(posixpath.normpath("/" + source).lstrip("/"))


def _join(base: bytes, rest: bytes) -> bytes:
    return b"/".join(part for part in (base, rest) if part)


def _ignored_hint(tree: Tree, path: bytes) -> str:
    if path and tree.ignored.excludes(os.fsdecode(path)):
        return " (.dockerignore leaves it out)"
    return ""


# ---- wildcards


def _has_wildcard(path: bytes) -> bool:
    return re.search(rb"[*?\[\\]", path) is not None


def _matches(tree: Tree, path: bytes) -> Iterator[bytes]:
    """The paths that a source with wildcards means, in order of their names."""
    if not _has_wildcard(path):
        if _exists(tree, path):
            yield path
        return
    heads = [b""]
    for part in path.split(b"/"):
        if not _has_wildcard(part):
            heads = [_join(head, part) for head in heads]
            continue
        expression = re.compile(_component(part), re.DOTALL)
        heads = [
            _join(head, name)
            for head in heads
            for name in _names(tree, head)
            if expression.fullmatch(os.fsdecode(name))
        ]
    for head in heads:
        if _exists(tree, head):
            yield head


def _component(part: bytes) -> str:
    """One component of a wildcard path as a regular expression; raises DockerfileError."""
    from unionimage.dockerfile.ignore import expression

    text = re.sub(r"\*+", "*", os.fsdecode(part))  # `**` has no meaning of its own here
    return expression(text)


def _names(tree: Tree, path: bytes) -> list[bytes]:
    try:
        directory = open_in(tree.root, path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return []
    try:
        return sorted(map(os.fsencode, os.listdir(directory)))
    finally:
        os.close(directory)


def _exists(tree: Tree, path: bytes) -> bool:
    """Whether a path is there and not ignored, or is a directory with something kept in it."""
    try:
        handle = open_in(tree.root, path, os.O_PATH)
    except OSError:
        return False
    os.close(handle)
    ignored = tree.ignored
    return not path or not ignored.excludes(os.fsdecode(path)) or ignored.may_hold_exceptions()


# ---- walking


def _collect(tree: Tree, path: bytes, exclude: Patterns) -> Found | None:
    """Everything below one source; None where all of it is left out."""
    handle = open_in(tree.root, path, os.O_PATH)  # follows a link that is itself the source
    try:
        status = os.fstat(handle)
        name = path.rpartition(b"/")[2]
        if not stat.S_ISDIR(status.st_mode):
            text = os.fsdecode(path)
            if tree.ignored.excludes(text) or exclude.excludes(os.fsdecode(name)):
                return None
            return Found(name, False, (Entry(path, b"", status),))
        walk = _Walk(tree, exclude)
        below = list(walk.run(handle, path, b""))
        if not below and path and tree.ignored.excludes(os.fsdecode(path)):
            return None
        return Found(name, True, (Entry(path, b"", status), *below))
    finally:
        os.close(handle)


class _Walk:
    """Lists a directory depth first, sorted; a directory comes before what is in it."""

    def __init__(self, tree: Tree, exclude: Patterns) -> None:
        self.ignored = tree.ignored
        self.exclude = exclude

    def run(self, directory: int, path: bytes, place: bytes) -> Iterator[Entry]:
        handle = os.open(b".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
        try:
            for name in sorted(map(os.fsencode, os.listdir(handle))):
                status = os.stat(name, dir_fd=handle, follow_symlinks=False)
                entry = Entry(_join(path, name), _join(place, name), status)
                if stat.S_ISDIR(status.st_mode):
                    yield from self._directory(handle, name, entry)
                elif not stat.S_ISSOCK(status.st_mode) and not self._left_out(entry):
                    yield entry
        finally:
            os.close(handle)

    def _left_out(self, entry: Entry) -> bool:
        return (bool(self.ignored) and self.ignored.excludes(os.fsdecode(entry.path))) or (
            bool(self.exclude) and self.exclude.excludes(os.fsdecode(entry.place))
        )

    def _directory(self, parent: int, name: bytes, entry: Entry) -> Iterator[Entry]:
        left_out = self._left_out(entry)
        if left_out and not self.ignored.has_exceptions and not self.exclude.has_exceptions:
            return
        flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
        handle = os.open(name, flags, dir_fd=parent)
        try:
            below = self.run(handle, entry.path, entry.place)
            if left_out:  # only there to hold what an exception brings back
                first = next(below, None)
                if first is None:
                    return
                yield entry
                yield first
            else:
                yield entry
            yield from below
        finally:
            os.close(handle)


def _with_parents(tree: Tree, base: bytes, path: bytes, found: Found) -> Found:
    """The same below the directories that lead to it, for `--parents`."""
    inner = path[len(base) :].lstrip(b"/")
    entries: list[Entry] = []
    parts = inner.split(b"/")[:-1] if inner else []
    for end in range(len(parts)):
        place = b"/".join(parts[: end + 1])
        above = _join(base, place)
        handle = open_in(tree.root, above, os.O_PATH)
        entries.append(Entry(above, place, os.fstat(handle)))
        os.close(handle)
    moved = [entry._replace(place=_join(inner, entry.place)) for entry in found.entries]
    return Found(b"", True, (*entries, *moved))


# ---- digest


def digest(tree: Tree, found: Iterable[Found]) -> str:
    """A digest of what would be copied: names, kinds, modes, content; no times, no inodes.

    Owners count only where they are kept (`tree.keeps_owners`). Raises OSError for a file that
    cannot be read.
    """
    total = hashlib.sha256()
    links: dict[tuple[int, int], int] = {}
    for each in found:
        total.update(b"source %d %b\0" % (each.is_directory, each.name))
        for entry in each.entries:
            total.update(_describe(tree, entry, links))
    return total.hexdigest()


def _describe(tree: Tree, entry: Entry, links: dict[tuple[int, int], int]) -> bytes:
    status = entry.status
    parts = [b"%o" % status.st_mode, entry.place]
    if tree.keeps_owners:
        parts.append(b"%d:%d" % (status.st_uid, status.st_gid))
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFLNK:
        parts.append(read_link(tree.root, entry.path))
    elif kind == stat.S_IFREG:
        if status.st_nlink > 1:
            number = links.setdefault((status.st_dev, status.st_ino), len(links))
            parts.append(b"link %d" % number)
        with open_file(tree.root, entry) as file:
            parts.append(hashlib.file_digest(file, "sha256").digest())
            parts += [b"%b=%b" % pair for pair in attributes(file.fileno())]
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        parts.append(b"%d" % status.st_rdev)
    return b"".join(b"%d:%b," % (len(part), part) for part in parts)


def open_file(root: int, entry: Entry) -> FileIO:
    """Open a regular file of a tree, the one that was found; its place may not change kind."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    if entry.place == b"":
        flags &= ~os.O_NOFOLLOW  # a source that is itself a link was followed
    descriptor = syscalls.openat2(root, entry.path, flags, CONFINED)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DockerfileError(f"{os.fsdecode(entry.path)}: it changed while it was read")
    return FileIO(descriptor)


def read_link(root: int, path: bytes) -> bytes:
    """The target of a symbolic link in a tree."""
    handle = syscalls.openat2(root, path, os.O_PATH | os.O_NOFOLLOW, CONFINED)
    try:
        return os.readlink(b"", dir_fd=handle)
    finally:
        os.close(handle)


def attributes(descriptor: int) -> list[tuple[bytes, bytes]]:
    """The extended attributes that are copied: capabilities, ACLs, `user.`; in order."""
    try:
        names = os.listxattr(descriptor)
    except OSError:
        return []
    return [
        (os.fsencode(name), os.getxattr(descriptor, name))
        for name in sorted(names)
        if name.startswith(KEPT_ATTRIBUTES)
    ]
