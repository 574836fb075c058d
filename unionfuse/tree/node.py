"""Nodes of the merged tree, and the small values that the doors and the union exchange."""

from __future__ import annotations

import stat
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from unionfuse.layers.layer import Place
from unionfuse.tree.view import View
from unionfuse.wire._attributes import Attributes


class Caller(NamedTuple):
    """Who asks: numeric ids as the kernel sends them, and the umask of a call that creates."""

    uid: int
    gid: int
    pid: int = 0
    umask: int = 0


class Changes(NamedTuple):
    """What a setattr changes; None leaves a field as it is. Times are as `utimens` takes them.

    `kill_privileges` drops set-uid and set-gid bits, `kill_capabilities` file capabilities.
    """

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    kill_privileges: bool = False
    kill_capabilities: bool = False


class Entry(NamedTuple):
    """The answer to a lookup: a node id, its attributes, and for how many seconds they hold."""

    node: int
    attributes: Attributes
    attr_valid: float


class Node:
    """A file of any kind but a directory.

    Attributes:
        id: the FUSE node id.
        ino: the st_ino shown to users; 0 until it was first looked at.
        kind: the type bits of the mode (stat.S_IFMT).
        names: where the merged tree shows it; several for hard links, none once deleted.
        lower: where its content comes from while it is not in upper (and, for a metacopy, still).
        in_upper: it has been copied up or was created there.
        metacopy: in upper without its data, which `lower` still has.
        index_name: its name in work/index, for lower hard links that were copied up.
        link_offset: what to add to the real link count (overlayfs's nlink note).
        lookups: how many times the kernel was given the id.
        opened: open handles.
        record: its number in the lookup index; 0 without one.
        tabled: a table of merged directories has its id, counts its lookups, and is all it takes
            to make the node anew.
        unnamed: an O_PATH descriptor of a deleted file that is still in use; -1 for none.
        mappable: was opened for reading and writing, as who maps it shared must: a map may outlive
            the descriptor, and change the times at any moment.
        last: attributes of a deleted node that nothing else can tell.
        copying: held by the one thread that copies it up.
        lower_key, upper_key: under what the tree finds it as a file with several links.
    """

    __slots__ = (
        "copying",
        "id",
        "in_upper",
        "index_name",
        "ino",
        "kind",
        "last",
        "link_offset",
        "lookups",
        "lower",
        "lower_key",
        "mappable",
        "metacopy",
        "names",
        "opened",
        "record",
        "tabled",
        "unnamed",
        "upper_key",
    )

    def __init__(self, kind: int) -> None:
        self.id = 0
        self.ino = 0
        self.kind = kind
        self.names: list[tuple[Directory, bytes]] = []
        self.lower: Place | None = None
        self.in_upper = False
        self.metacopy = False
        self.index_name = b""
        self.link_offset = 0
        self.lookups = 0
        self.opened = 0
        self.record = 0
        self.tabled = False
        self.unnamed = -1
        self.mappable = False
        self.last: Attributes | None = None
        self.copying: threading.Lock | None = None
        self.lower_key: tuple[int, int] | None = None
        self.upper_key = 0

    @property
    def is_directory(self) -> bool:
        return False

    @property
    def is_regular(self) -> bool:
        return self.kind == stat.S_IFREG

    @property
    def deleted(self) -> bool:
        """No name leads here any more (the root, which never had one, asks for care)."""
        return not self.names and not self.index_name


class Directory(Node):
    """A directory of the merged tree.

    Attributes:
        lowers: the lower directories that it merges, topmost first.
        view: the merged content of `lowers`; None until somebody looks inside.
        changes: name -> what upper has there: a kind (S_IFMT bits), or WHITEOUT; only where
            `in_upper`, None until somebody looks inside.
        children: the nodes that are alive below, by name.
        order: cookies of names that only upper has, in order of appearance.
        redirect: the redirect that upper's directory carries.
        default_acl: whether new files inherit an ACL; None for not known.
    """

    __slots__ = (
        "changes",
        "children",
        "default_acl",
        "lowers",
        "opaque",
        "order",
        "redirect",
        "view",
    )

    def __init__(self) -> None:
        super().__init__(stat.S_IFDIR)
        self.lowers: tuple[Place, ...] = ()
        self.view: View | None = None
        self.changes: dict[bytes, int] | None = None
        self.children: dict[bytes, Node] = {}
        self.order: Order | None = None
        self.opaque = False
        self.redirect: bytes | None = None
        self.default_acl: bool | None = None

    @property
    def is_directory(self) -> bool:
        return True


WHITEOUT = 0
"""In `Directory.changes`: the name is deleted."""

FIRST_NEW_COOKIE = 1 << 40
"""Cookies of names that lower layers have stay below this one."""


class Order:
    """Cookies for names that only upper has: a hash of the name, so that they stay the same.

    A listing goes on where it was after the directory has been forgotten and read again, and
    after another daemon has taken over. Two names with one hash take neighbouring cookies.
    """

    __slots__ = ("_cookies", "_names", "_sorted")

    def __init__(self) -> None:
        self._names: dict[int, bytes] = {}
        self._cookies: dict[bytes, int] = {}
        self._sorted: list[int] | None = []  # None: to be sorted when it is asked for

    def add(self, name: bytes) -> None:
        if name in self._cookies:
            return
        cookie = FIRST_NEW_COOKIE + (xxh3_64_intdigest(name) >> 2)
        while cookie in self._names:
            cookie += 1
        self._cookies[name] = cookie
        self._names[cookie] = name
        self._sorted = None

    def discard(self, name: bytes) -> None:
        cookie = self._cookies.pop(name, None)
        if cookie is not None:
            del self._names[cookie]
            if self._sorted is not None:
                del self._sorted[bisect_left(self._sorted, cookie)]

    def after(self, cookie: int) -> Iterator[tuple[int, bytes]]:
        """(cookie, name) of every name whose cookie is greater; changes end the iteration."""
        if self._sorted is None:
            self._sorted = sorted(self._names)
        first = bisect_right(self._sorted, cookie)
        for number in islice(self._sorted, first, None):
            yield number, self._names[number]
