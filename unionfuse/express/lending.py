"""Lends directories to the compiled loop, which makes and deletes files in them, and adopts those.

A directory of upper is lent that hands no ACL down: what is made in it is just what one system call
makes, where no layer has the name. The loop keeps what it has made to itself (_young.pyx) until
somebody asks for more than it can answer. Before that the union hears which names came and went,
and a file that is asked about becomes an ordinary node.
"""

from __future__ import annotations

import os
import resource
import stat

from unionfuse import syscalls
from unionfuse.express._young import YoungFiles, handle_of
from unionfuse.express.passthrough import Passthrough
from unionfuse.tree import farewell
from unionfuse.tree.node import Directory, Entry, Node
from unionfuse.tree.young import Young
from unionfuse.union import Union
from unionfuse.wire._attributes import PACKED_SIZE, Attributes

_NODES = 1 << 16  # ids that are given to the loop at a time


class Lending(Young):
    """What one mount has lent.

    Arguments:
        fuse: the mounted /dev/fuse.
        valid: for how many seconds the kernel may keep names and attributes.
    """

    def __init__(self, fuse: int, union: Union, valid: int) -> None:
        self._union = union
        self._tree = union.tree
        self._passthrough: Passthrough | None = None
        mix = 0
        if self._tree.upper is not None:
            mix = self._tree.inodes.bits(self._tree.upper.device)
        most = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8, 1 << 16)
        notes = self._tree.journal.notes
        self.files = YoungFiles(fuse, valid, mix, most, notes, syscalls.dies_young_at())
        self._tree.journal.young = self.files
        self._tree.young = self

    def use(self, passthrough: Passthrough) -> None:
        """Know who counts the files that the kernel reads and writes by itself."""
        self._passthrough = passthrough
        if passthrough.enabled:
            self.files.pass_files_through()

    def may_have(self, number: int) -> bool:
        """Whether a directory of upper may be lent. The lock is held."""
        directory = self._tree.directory(number)
        assert self._tree.upper is not None
        if os.stat(self._tree.upper_directory(directory)).st_dev != self._tree.upper.device:
            return False
        self._tree.load(directory)
        return not self._union.hands_down_acl(directory)

    def prepare(self, number: int) -> None:
        """Let the union hear of names, and of a node that it is about to be asked about."""
        with self._union.lock:
            self._hear()
            self.adopt(number)
            if self.files.wants_nodes():
                self.files.give_nodes(self._tree.journal.fresh_ids(_NODES), _NODES)

    def _hear(self) -> None:
        for parent, name, is_there in self.files.news():
            directory = self._tree.nodes.get(parent)
            if not isinstance(directory, Directory) or directory.changes is None:
                continue  # nobody has looked inside: it will be read
            assert directory.order is not None
            if is_there:
                self._tree.note(directory, name, stat.S_IFREG)
                directory.order.add(name)
            else:
                directory.changes.pop(name, None)
                directory.order.discard(name)

    # --- what the tree asks -------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.files)

    def opened(self) -> int:
        return self.files.opened()

    def adopt(self, number: int) -> bool:
        taken = self.files.take(number)
        if taken is None:
            return False
        parent, name, inode, lookups, record, flags, left, opened = taken
        tree = self._tree
        node = Node(stat.S_IFREG)
        node.id, node.ino, node.lookups, node.in_upper = number, inode, lookups, True
        node.mappable = flags & os.O_ACCMODE == os.O_RDWR
        tree.nodes[number] = node
        tree.journal.adopted(number, record)
        if left is not None:
            node.last = farewell.read(left).last
        else:
            directory = tree.directory(parent)
            node.names.append((directory, name))
            directory.children[name] = node
            if directory.changes is not None and name not in directory.changes:
                assert directory.order is not None
                tree.note(directory, name, stat.S_IFREG)
                directory.order.add(name)
        if opened is not None:
            descriptor, backing, handle_record = opened
            handle = handle_of(number)
            tree.journal.adopted_handle(handle, handle_record)
            self._union.files.adopt(handle, node, descriptor, flags)
            if self._passthrough is not None:
                self._passthrough.adopt(number, handle, backing)
        return True

    def adopt_name(self, directory: Directory, name: bytes) -> Node | None:
        number = self.files.named(directory.id, name)
        return self._tree.nodes[number] if number and self.adopt(number) else None

    def adopt_inside(self, directory: Directory) -> None:
        for number in self.files.inside(directory.id):
            self.adopt(number)

    def listed(self, directory: Directory, name: bytes) -> Entry | None:
        inode = self.files.inode(directory.id, name)
        if not inode:
            return None
        shown = Attributes.unpacked(bytes(PACKED_SIZE))
        shown.ino, shown.mode = inode, stat.S_IFREG
        return Entry(0, shown, 0.0)
