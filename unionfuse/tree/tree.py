"""The merged tree: nodes, lookup, listing, node ids and inode numbers. It reads and never writes.

A node is made when somebody first asks for its name and goes when the kernel has forgotten it.
What lies below a directory is a `View` that never changes; what upper has on top is
`Directory.changes`. Callers hold the union's lock.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

from unionfuse import syscalls
from unionfuse.layers import whiteout
from unionfuse.layers.layer import LayerStack, Place
from unionfuse.layers.owners import Owners
from unionfuse.layers.upperdir import UpperDirectory
from unionfuse.options import MountOptions
from unionfuse.tree import view
from unionfuse.tree._tables import Tables
from unionfuse.tree.farewell import farewell
from unionfuse.tree.inodes import InodeNumbers
from unionfuse.tree.journal import FIRST_FRESH_ID, Journal
from unionfuse.tree.links import Links
from unionfuse.tree.merging import Merging
from unionfuse.tree.node import (
    FIRST_NEW_COOKIE,
    WHITEOUT,
    Directory,
    Node,
    Order,
)
from unionfuse.tree.origins import Origins
from unionfuse.tree.redirects import Redirects
from unionfuse.tree.young import Young

if TYPE_CHECKING:
    from unionfuse.index.lookup import LookupIndex

ROOT_ID = 1
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


def failure(number: int) -> OSError:
    """An OSError of this errno."""
    return OSError(number, os.strerror(number))


def _unknown(number: int) -> Node:
    raise failure(errno.ESTALE)


class Tree:
    """All nodes of one mount.

    Attributes:
        nodes: by id; a node that the kernel knows, or that is open, is in here.
        root: never forgotten.
        upper: None for a mount without one.
        index: what the lower layers look like merged, made in advance; None without one.
        tables: what the lower layers look like merged in directories that the index does not have,
            and which names differ from it in those that it has.
        changed: called with a node of the index that is found to differ from it.
        indexed_ids: how many ids are the index's: the first ones.
        revive: makes a node anew whose id is known, but not in `nodes` (see revival.py).
        journal: what the next daemon must know, should this one be killed.
        inodes: makes the inode numbers that users see.
        links: the nodes of files with several names.
        young: files of upper that are not in `nodes` yet, though the kernel knows them.
    """

    def __init__(
        self,
        stack: LayerStack,
        upper: UpperDirectory | None,
        options: MountOptions,
        index: LookupIndex | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.stack = stack
        self.index = index
        self.indexed_ids = index.count if index is not None else 0
        self.changed: Callable[[Node], None] = lambda _node: None
        self.upper = upper
        self.options = options
        self.owners = Owners(options)
        # A lower file never changes, and who finds one wants its attributes next: one stat.
        self._just_seen: tuple[Node | None, os.stat_result | None] = (None, None)
        self.journal = journal if journal is not None else Journal()
        self.revive: Callable[[int], Node] = _unknown
        self.links = Links()
        self.inodes = InodeNumbers(stack, upper, options.xino != "off")
        self.redirects = Redirects(stack, options.redirect_dir != "nofollow")
        self.origins = Origins(stack, self.inodes)
        self.nodes: dict[int, Node] = {}
        self.young = Young()
        self._leaves_tables = False
        self.tables = Tables([layer.descriptor for layer in stack.layers])
        if self.journal.notes is not None:
            self.tables.note_in(self.journal.notes)
            self.journal.tables = self.tables
        self.merging = Merging(stack, index, self.tables, self.journal, self.inodes, self.redirects)
        self.root = self._make_root()

    def _make_root(self) -> Directory:
        root = Directory()
        root.id = ROOT_ID
        root.lookups = 1
        root.lowers = tuple(Place(layer, b"") for layer in self.stack.layers)
        root.record = ROOT_ID if self.index is not None else 0
        if self.upper is not None:
            root.in_upper = True
            marks = whiteout.read_marks(self.upper.descriptor, b"")
            if marks.opaque:
                root.lowers, root.opaque, root.record = (), True, 0
        root.ino = self._directory_inode(root)
        self.nodes[ROOT_ID] = root
        return root

    # --- where things lie ----------------------------------------------------------------

    def node(self, number: int) -> Node:
        """The node with this id. Raises ESTALE for one that is not known."""
        node = self.nodes.get(number)
        return node if node is not None else self.revive(number)

    def is_indexed(self, node: Node) -> bool:
        """Whether a node has an id of the index: the kernel's lookups of it are not counted."""
        return node.id <= self.indexed_ids

    def directory(self, number: int) -> Directory:
        """The directory with this id. Raises ENOTDIR, ESTALE."""
        node = self.nodes.get(number)
        if node is None:
            node = self.revive(number)
        if not isinstance(node, Directory):
            raise failure(errno.ENOTDIR)
        return node

    def upper_directory(self, directory: Directory) -> int:
        """The O_PATH descriptor of a directory in upper; the cache owns it."""
        assert self.upper is not None
        if directory is self.root:
            return self.upper.descriptor
        if directory.unnamed >= 0:
            return directory.unnamed
        assert directory.id
        key = ("upper", directory.id)
        descriptor = self.stack.cache.get(key)
        if descriptor is None:
            if not directory.names:
                raise failure(errno.ENOENT)
            path = self.path(directory)
            descriptor = syscalls.open_beneath(self.upper.descriptor, path, _DIRECTORY)
            self.stack.cache.put(key, descriptor)
        return descriptor

    def path(self, node: Node) -> bytes:
        """The path of a node from the root of the mount, by its first name."""
        components = []
        while node.names:
            parent, name = node.names[0]
            components.append(name)
            node = parent
        return b"/".join(reversed(components))

    def location(self, node: Node) -> tuple[int, bytes]:
        """Where a node lies on disk: a directory descriptor and a name, empty for itself.

        Raises:
            OSError: ENOENT for a deleted node that nothing is left of.
        """
        if node.unnamed >= 0:
            return node.unnamed, b""
        if isinstance(node, Directory):
            if node.in_upper:
                return self.upper_directory(node), b""
            if not node.lowers:
                raise failure(errno.ENOENT)
            place = node.lowers[0]
            return place.layer.directory(place.path), b""
        if not node.in_upper:
            if node.lower is None:
                raise failure(errno.ENOENT)
            return node.lower.layer.directory(node.lower.path), node.lower.name
        if node.index_name:
            assert self.upper is not None
            return self.upper.index, node.index_name
        for parent, name in node.names:
            if self.is_physical(parent, name):
                return self.upper_directory(parent), name
        raise failure(errno.ENOENT)

    def is_physical(self, parent: Directory, name: bytes) -> bool:
        """Whether upper itself has this name (and not as a whiteout)."""
        changes = parent.changes
        return changes is not None and changes.get(name, WHITEOUT) != WHITEOUT

    def data_location(self, node: Node) -> tuple[int, bytes]:
        """Where a regular file's data lies: for a metacopy that is not where the node lies."""
        if node.lower is not None and (node.metacopy or not node.in_upper):
            return self.redirects.data(node.lower)
        return self.location(node)

    # --- lookup --------------------------------------------------------------------------

    def load(self, directory: Directory) -> None:
        """Read what a directory holds, once."""
        if directory.view is not None:
            return
        if directory.deleted and directory is not self.root:
            directory.view, directory.changes, directory.order = view.EMPTY_VIEW, {}, Order()
            return
        below = self.merging.view(directory)
        if directory.in_upper:
            found = view.scan(self.upper_directory(directory))
            changes = dict(found.kinds)
            changes.update(dict.fromkeys(found.whiteouts, WHITEOUT))
            self.begin_changes(directory, below, changes)
        # What upper adds or hides the table was told; without any it lists what is below.
        self.tables.open(directory.id, changed=not directory.lowers)
        directory.lowers = tuple(below.places())
        directory.view = below

    def load_for_listing(self, number: int) -> None:
        """Have a table of a directory, with a node of it only where that is necessary."""
        if not self.merging.merge_below(number):
            self.load(self.directory(number))

    def load_empty(self, directory: Directory) -> None:
        """A directory has just been made in upper: nothing is to be read."""
        directory.view = self.merging.view(directory)
        self.begin_changes(directory, directory.view, {})
        self.tables.open(directory.id, changed=True)

    def begin_changes(
        self, directory: Directory, below: view.View, changes: dict[bytes, int]
    ) -> None:
        """Lay upper's names over a directory's view."""
        directory.changes = changes
        directory.order = Order()
        if directory.record and self.index is not None:
            self.tables.lay_over_index(directory.id)
        for name, kind in changes.items():
            self.tables.ask(directory.id, name)
            if kind != WHITEOUT and below.get(name) is None:
                directory.order.add(name)

    def note(self, directory: Directory, name: bytes, kind: int) -> None:
        """Note what upper has under a name in a directory: a kind, or WHITEOUT."""
        assert directory.changes is not None
        self.tables.ask(directory.id, name)
        directory.changes[name] = kind

    def below(self, directory: Directory, name: bytes) -> view.Stub | None:
        """What the lower layers have under a name, whatever upper says."""
        if directory.view is None:
            self.load(directory)
            assert directory.view is not None
        return directory.view.get(name)

    def find(self, directory: Directory, name: bytes) -> Node:
        """The node under a name. Raises ENOENT, ENAMETOOLONG, or what reading it raises."""
        child = directory.children.get(name)
        if child is not None:
            return child
        if len(name) > 255:
            raise failure(errno.ENAMETOOLONG)
        if directory.view is None:
            self.load(directory)
            assert directory.view is not None
        kind = directory.changes.get(name) if directory.changes else None
        if kind is not None:
            if kind == WHITEOUT:
                raise failure(errno.ENOENT)
            return self._from_upper(directory, name)
        stub = directory.view.get(name)
        if stub is None:
            raise failure(errno.ENOENT)
        return self._from_lower(directory, name, stub)

    def exists(self, directory: Directory, name: bytes) -> bool:
        """Whether the merged tree shows a name; cheaper than `find`."""
        if name in directory.children:
            return True
        if directory.view is None:
            self.load(directory)
            assert directory.view is not None
        kind = directory.changes.get(name) if directory.changes else None
        return directory.view.get(name) is not None if kind is None else kind != WHITEOUT

    def _from_lower(self, directory: Directory, name: bytes, stub: view.Stub) -> Node:
        assert directory.view is not None
        if stub.kind == stat.S_IFDIR:
            child = Directory()
            child.lowers = tuple(view.child_places(directory.view, stub, name))
            child.record = stub.record
            child.ino = self._directory_inode(child)
            return self._adopt_lower(child, directory, name, stub)
        if stub.record and stub.record in self.nodes:
            return self.alias(self.nodes[stub.record], directory, name)
        top = directory.view.places()[stub.positions[0]]
        place = Place(top.layer, top.path, name)
        status, key = self._lower_status(place, stub)
        if key is not None:
            known = self.links.lower(key) or self._indexed(place)
            if known is not None:
                known.record = known.record or stub.record
                return self.alias(known, directory, name)
        node = Node(stub.kind)
        node.lower = place
        node.record = stub.record
        node.ino = status.st_ino if stub.record else self.inodes.of(status)
        self._just_seen = (node, status)
        if key is not None:  # its other names lead here only as long as it is here
            self.links.remember_lower(node, key)
            return self.adopt(node, directory, name)
        return self._adopt_lower(node, directory, name, stub)

    def _adopt_lower(self, node: Node, directory: Directory, name: bytes, stub: view.Stub) -> Node:
        if stub.number and stub.number not in self.nodes and not self.journal.has(stub.number):
            node.id, node.tabled = stub.number, True
        self.adopt(node, directory, name)
        if self._leaves_tables:
            self.leave_table(node)
        return node

    def leave_table(self, node: Node) -> None:
        """Take a node into our own hands: it is about to differ from what its table says of it."""
        if node.tabled:
            node.tabled = False
            node.lookups += self.tables.take(node.id)
            self.journal.name(node)

    def leave_all_tables(self) -> None:
        """Have the journal know by name what tables have ids for: the layers are to change."""
        self.tables.stop()
        self._leaves_tables = True
        for number in self.tables.counted():
            try:
                node = self.node(number)
            except OSError as error:
                # After a crash all names of a table count as known, also those that the kernel
                # cannot know by these ids: hard links, and what was taken and has gone since.
                if error.errno != errno.ESTALE:
                    raise
            else:
                self.leave_table(node)
        self.journal.drop_all_tables()

    def _lower_status(
        self, place: Place, stub: view.Stub
    ) -> tuple[os.stat_result, tuple[int, int] | None]:
        """Attributes of a lower file, and what its other names are known by if it has any."""
        if stub.record and self.index is not None:
            noted = cast(os.stat_result, self.index.status(stub.record))
            return noted, (-1, stub.record) if noted.st_nlink > 1 else None
        status = view.entry_status(place.layer.directory(place.path), place.name)
        return status, (status.st_dev, status.st_ino) if status.st_nlink > 1 else None

    def _indexed(self, place: Place) -> Node | None:
        """The upper file that another name of this lower file was copied up to, if any."""
        if self.upper is None or not self.upper.index_names:
            return None
        origin = self.origins.of(place)
        index_name = origin.hex().encode("ascii")
        if not origin or index_name not in self.upper.index_names:
            return None
        status = view.entry_status(self.upper.index, index_name)
        node = self.links.upper(status)
        return node or self._make_upper_node(self.upper.index, index_name, status, place)

    def _from_upper(self, directory: Directory, name: bytes) -> Node:
        young = self.young.adopt_name(directory, name)
        if young is not None:
            return young
        parent = self.upper_directory(directory)
        status = view.entry_status(parent, name)
        if stat.S_ISDIR(status.st_mode):
            return self._upper_directory_node(directory, name, parent)
        known = self.links.upper(status)
        if known is not None:
            return self.alias(known, directory, name)
        stub = self.below(directory, name)
        place = self._file_below(directory, name)
        node = self._make_upper_node(parent, name, status, place, directory)
        node.record = stub.record if stub is not None else 0
        return self.adopt(node, directory, name)

    def _file_below(self, directory: Directory, name: bytes) -> Place | None:
        stub = self.below(directory, name)
        if stub is None or stub.kind != stat.S_IFREG:
            return None
        assert directory.view is not None
        top = directory.view.places()[stub.positions[0]]
        return Place(top.layer, top.path, name)

    def _make_upper_node(
        self,
        parent: int,
        name: bytes,
        status: os.stat_result,
        below: Place | None,
        directory: Directory | None = None,
    ) -> Node:
        node = Node(stat.S_IFMT(status.st_mode))
        node.in_upper = True
        marks = whiteout.read_marks(parent, name)
        if marks.metacopy:
            node.metacopy = True
            if marks.redirect is not None and directory and marks.redirect[:1] != b"/":
                below = self._file_below(directory, marks.redirect)
            elif marks.redirect is not None:
                inside = below.inside() if below else name
                below = self.redirects.file(view.redirect_target(marks.redirect, inside), 0)
            if below is None:
                raise failure(errno.EIO)
            node.lower = below
        node.ino = marks.inode or self.origins.inode(marks.origin) or self.inodes.of(status)
        self._take_index_name(node, marks, status)
        if status.st_nlink > 1 or node.index_name:
            self.links.remember_upper(node, status)
        return node

    def _take_index_name(self, node: Node, marks: whiteout.Marks, status: os.stat_result) -> None:
        assert self.upper is not None
        index_name = marks.origin.hex().encode("ascii")
        if not index_name or index_name not in self.upper.index_names:
            return
        node.index_name = index_name
        offset = marks.nlink[1:]
        if not offset[1:].isdigit():
            return
        node.link_offset = int(offset)
        if marks.nlink.startswith(b"L"):
            links = self.origins.links(marks.origin)
            node.link_offset = (links or status.st_nlink) + int(offset) - status.st_nlink
        if status.st_nlink + node.link_offset <= 0:
            node.link_offset = 0  # cannot be: fs/overlayfs/util.c, ovl_get_nlink, does so, too

    def linked_records(self) -> list[int]:
        """The index's records of lower files that work/index has a copy of."""
        if self.index is None or self.upper is None:
            return []
        inodes = set()
        for name in self.upper.index_names:
            marks = whiteout.read_marks(self.upper.index, name)
            inodes.add(marks.inode or self.origins.inode(marks.origin))
        return self.index.records_with_inodes(inodes) if inodes else []

    def _upper_directory_node(self, directory: Directory, name: bytes, parent: int) -> Directory:
        child = Directory()
        child.in_upper = True
        marks = whiteout.read_marks(parent, name)
        child.opaque = marks.opaque
        child.redirect = marks.redirect
        if not marks.opaque:
            child.lowers = tuple(self._lowers_of_upper(directory, name, marks.redirect))
        stub = self.below(directory, name)
        if stub is not None and child.lowers and marks.redirect is None:
            child.record = stub.record
        self.adopt(child, directory, name, number=0)
        if child.lowers:
            child.ino = marks.inode or self._directory_inode(child)
        else:  # not through its own descriptor: that is cached by its id, which it has yet to get
            child.ino = marks.inode or self.inodes.of(view.entry_status(parent, name))
        self.number(child)
        return child

    def _lowers_of_upper(
        self, directory: Directory, name: bytes, redirect: bytes | None
    ) -> Sequence[Place]:
        if redirect is not None:
            if self.options.redirect_dir == "nofollow":
                raise failure(errno.EPERM)
            if redirect.startswith(b"/"):
                return self.redirects.resolve(redirect.strip(b"/"), 0)
            name = redirect
        stub = self.below(directory, name)
        if stub is None or stub.kind != stat.S_IFDIR:
            return ()
        assert directory.view is not None
        return view.child_places(directory.view, stub, name)

    # --- nodes come and go ---------------------------------------------------------------

    def adopt(self, node: Node, parent: Directory, name: bytes, number: int = -1) -> Node:
        """Put a new node under a name and give it an id (unless `number` is 0: later)."""
        node.names.append((parent, name))
        parent.children[name] = node
        if number:
            self.number(node)
        return node

    def alias(self, node: Node, parent: Directory, name: bytes) -> Node:
        """Put a known node under one more of its names, which may be its only one again."""
        nameless = node.deleted
        if (parent, name) not in node.names:
            node.names.append((parent, name))
        parent.children[name] = node
        if not node.id:
            self.number(node)
        elif nameless:
            self.journal.name(node)
            self.close_unnamed(node)
        elif len(node.names) > 1:
            self.journal.also(node)
        return node

    def number(self, node: Node) -> None:
        """Give a node its id: the index's record of it, or its inode number where that is free."""
        if node.tabled:
            self.nodes[node.id] = node
            self.tables.made(node.id, True)
            return
        number = self.journal.claim(node)
        others = self.journal.names(number) if number else []
        if not number:
            number = self._free_number(node)
        elif isinstance(node, Directory) and node.lowers and number <= self.indexed_ids:
            node.record = number  # it has moved, and what it merges is still what the index says
        node.id = number
        self.nodes[number] = node
        for above, name in others:
            self._find_other_name(node, above, name)
        if node.names and (number > self.indexed_ids or others):
            self.journal.name(node)
        if node.in_upper and number <= self.indexed_ids:
            self.changed(node)

    def _find_other_name(self, node: Node, above: int, name: bytes) -> None:
        """Put a hard link that an earlier daemon knew under one more of the names that it had."""
        try:
            parent = self.directory(above)
            if (parent, name) not in node.names and self.exists(parent, name):
                self.find(parent, name)
        except OSError:
            pass  # it is not there any more

    def _free_number(self, node: Node) -> int:
        number = node.ino
        if node.record and self._is_recorded(node):
            number = node.record
        elif number <= max(ROOT_ID, self.indexed_ids) or number >= FIRST_FRESH_ID:
            number = self.journal.fresh_id()
        if number in self.nodes or self.journal.has(number):
            number = self.journal.fresh_id()
        return number

    def _is_recorded(self, node: Node) -> bool:
        """Whether a node is what the index means: not another file that upper has in its place."""
        assert self.index is not None
        return not node.in_upper or self.index.status(node.record).st_ino == node.ino

    def close_unnamed(self, node: Node) -> None:
        """Close the descriptor of a deleted node."""
        if node.unnamed >= 0:
            os.close(node.unnamed)
            node.unnamed = -1
            self.journal.let_go(node.id)

    def about_to_lose_last_name(self, node: Node) -> None:
        """Write down what will be left of a node without its name, should nobody else know."""
        if node.tabled:
            self.leave_table(node)
        if node.unnamed >= 0:
            self.journal.keep(node)
        self.journal.going(node, farewell)

    def nameless(self, node: Node) -> None:
        """Write down what a node is that never had a name, or has lost it."""
        self.about_to_lose_last_name(node)
        self.journal.gone(node)

    def without_name(self, kind: int, index_name: bytes) -> Node:
        """A bare node for a file that no name leads to (but perhaps one in work/index)."""
        if index_name and self.upper is not None:
            status = view.entry_status(self.upper.index, index_name)
            return self._make_upper_node(self.upper.index, index_name, status, None)
        return Directory() if kind == stat.S_IFDIR else Node(kind)

    # --- what lies on disk ---------------------------------------------------------------

    def status(self, node: Node) -> os.stat_result:
        """lstat of what a node is on disk."""
        seen, status = self._just_seen
        if seen is node and not node.in_upper and status is not None:
            self._just_seen = (None, None)
            return status
        if node.record and not node.in_upper and node.unnamed < 0 and self.index is not None:
            return cast(os.stat_result, self.index.status(node.record))
        directory, name = self.location(node)
        if name:
            return os.stat(name, dir_fd=directory, follow_symlinks=False)
        return os.stat(directory)

    def _directory_inode(self, directory: Directory) -> int:
        if directory.record and self.index is not None:
            ino: int = self.index.status(directory.record).st_ino
            return ino
        if directory.lowers:
            place = directory.lowers[0]
            return self.inodes.of(os.stat(place.layer.directory(place.path)))
        return self.inodes.of(os.stat(self.upper_directory(directory)))

    # --- listing -------------------------------------------------------------------------

    def names_after(self, directory: Directory, cookie: int) -> Iterator[tuple[bytes, int]]:
        """(name, cookie) of what a directory shows behind a cookie, without `.` and `..`."""
        self.load(directory)
        assert directory.view is not None
        changes = directory.changes or {}
        if cookie < FIRST_NEW_COOKIE:
            for name, old_cookie in directory.view.after(cookie):
                if changes.get(name) != WHITEOUT:
                    yield name, old_cookie
        if directory.order is not None:
            for new_cookie, name in directory.order.after(cookie):
                yield name, new_cookie

    def is_empty(self, directory: Directory) -> bool:
        """Whether a directory shows nothing but `.` and `..`."""
        return next(self.names_after(directory, 0), None) is None
