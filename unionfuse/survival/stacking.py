"""Another stack of layers under a running mount.

Whoever may look into the keeper (its owner, root) finds two small memory files there, `stack` and
`wish`, both JSON. `stack` says which layers there are; it is replaced as a whole. `wish` takes what
they are to be (layers.py writes it, then sends SIGHUP) and the answer. The running daemon checks
the wish, opens new layers and writes down the new stack; then it ends, and the next daemon takes
over with it as after a crash: node ids lead to names, and names to what the new stack has under
them. What the kernel remembers of names and attributes is then taken back.

Callers of `restack` and `refresh` need no lock.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from unionfuse.layers.layer import DescriptorCache, Layer, LayerError, LayerStack, open_layer
from unionfuse.tree.node import Directory, Node
from unionfuse.tree.tree import ROOT_ID, Tree
from unionfuse.wire import protocol

if TYPE_CHECKING:
    from unionfuse.survival.journal import Descriptors, SharedJournal
    from unionfuse.union import Union

STACK = "unionfuse-stack"
WISH = "unionfuse-wish"
_EXPIRE_ONLY = 1  # FUSE_EXPIRE_ONLY: it is looked up again; nothing mounted on it is taken away


class Stack(NamedTuple):
    """Which layers a mount has.

    Attributes:
        keys: their numbers, topmost first; a layer keeps its own for as long as it is there.
        paths: of their directories.
        devices: the file systems in the order in which their inode numbers were spread.
        changed: the kernel has not been told yet.
    """

    keys: list[int]
    paths: list[str]
    devices: list[int]
    changed: bool = False


class Wish(NamedTuple):
    """What the layers are to be. `answer`: empty, then why it is refused, or `DONE`."""

    paths: list[str]
    force: bool
    answer: str = ""


DONE = "done"


def written(name: str, value: Stack | Wish) -> int:
    """A memory file with a value in it."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    write(descriptor, value)
    return descriptor


def keep_stack(stack: Stack, store: Descriptors) -> None:
    """Have the next daemon, and whoever looks, find this stack."""
    record = written(STACK, stack)
    store.keep("stack", record)
    os.close(record)


def write(descriptor: int, value: Stack | Wish) -> None:
    import json  # here: not every daemon that takes over needs it

    data = json.dumps(value._asdict()).encode()
    os.ftruncate(descriptor, len(data))
    os.pwrite(descriptor, data, 0)


def read_stack(descriptor: int) -> Stack:
    import json

    return Stack(**json.loads(os.pread(descriptor, 1 << 24, 0)))


def read_wish(descriptor: int) -> Wish | None:
    """What is wished; None where there is nothing, or no sense in it."""
    import json

    try:
        return Wish(**json.loads(os.pread(descriptor, 1 << 24, 0)))
    except (ValueError, TypeError):
        return None


# --- the daemon that is asked ----------------------------------------------------------------


def restack(union: Union, stack: Stack, wish: Wish, store: Descriptors) -> None:
    """Write down the wished stack, and what must outlive the present one.

    Raises:
        LayerError: a layer cannot be used, or is needed.
    """
    if union.index is not None:
        reason = "the mount has a lookup index, which describes its layers"
        raise LayerError(b"layers", reason, "mount without lookup_index= to change them")
    cache = DescriptorCache()
    opened: list[Layer] = []
    with union.lock:
        try:
            layers = _open(union, stack, wish.paths, cache, opened)
            if union.watcher is not None:
                union.watcher.opens_by_itself(False)
            _part_open_files(union, LayerStack(layers, cache), wish.force)
            union.tree.leave_all_tables()
        except BaseException:
            if union.watcher is not None:
                union.watcher.opens_by_itself(True)
            for layer in opened:
                os.close(layer.descriptor)
            raise
        finally:
            cache.close()
        keys = [layer.key for layer in layers]
        for layer in opened:
            store.keep(kept_name(layer.key), layer.descriptor)
        for key in set(stack.keys) - set(keys):
            store.let_go(kept_name(key))
        keep_stack(Stack(keys, wish.paths, union.tree.inodes.devices(), True), store)


def kept_name(key: int) -> str:
    """What a layer's descriptor is kept under."""
    return f"layer-{key}"


def _open(
    union: Union,
    stack: Stack,
    paths: Sequence[str],
    cache: DescriptorCache,
    opened: list[Layer],
) -> list[Layer]:
    """The layers of a new stack; those of them that are opened for it go into `opened`, too."""
    present = dict(zip(stack.paths, union.tree.stack.layers, strict=True))
    free = 1 + max(stack.keys)
    found: list[Layer] = []
    for number, path in enumerate(paths):
        here = present.pop(path, None)
        if here is not None:
            layer = Layer(here.path, here.descriptor, number, here.protected, cache, here.key)
        else:
            descriptor, protected = open_layer(os.fsencode(path))
            key = free + len(opened)
            layer = Layer(os.fsencode(path), descriptor, number, protected, cache, key)
            opened.append(layer)
        found.append(layer)
    return found


def _part_open_files(union: Union, stack: LayerStack, force: bool) -> None:
    """Make open files that the new stack does not show what deleted files are."""
    staying = {layer.key for layer in stack.layers}
    hidden = []
    other = Tree(stack, union.tree.upper, union.options)
    for node in list(union.tree.nodes.values()):
        if not node.opened or isinstance(node, Directory) or node.lower is None or node.deleted:
            continue
        if node.lower.layer.key not in staying and not force:
            remedy = "close it, or say --force: whoever has it open goes on reading it"
            path = os.fsdecode(union.tree.path(node))
            raise LayerError(node.lower.layer.path, f"/{path} of it is open", remedy)
        if not node.in_upper and not _is_same(union.tree, other, node):
            hidden.append(node)
    for node in hidden:
        directory, name = union.tree.data_location(node)
        node.unnamed = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        union.tree.nameless(node)


def _is_same(tree: Tree, other: Tree, node: Node) -> bool:
    """Whether another tree has the same file under a node's name."""
    try:
        found: Node = other.root
        for name in tree.path(node).split(b"/"):
            if not isinstance(found, Directory):
                return False
            found = other.find(found, name)
        return os.path.samestat(other.status(found), tree.status(node))
    except OSError:
        return False


# --- the daemon that takes over --------------------------------------------------------------


def refresh(fuse: int, union: Union, journal: SharedJournal) -> None:
    """Have the kernel look up again all that it knows of names, listings and attributes."""
    known: dict[int, set[bytes]] = {ROOT_ID: set()}
    with union.lock:
        opened = {handle.node for handle in journal.handles()}
        for number, is_directory in journal.ids():
            if is_directory:
                known.setdefault(number, set())
            else:
                _invalidate(fuse, number, data=number not in opened)
            for parent, name in journal.names(number):
                known.setdefault(parent, set()).add(name)
    for number, names in known.items():
        with union.lock:
            try:
                directory = union.tree.directory(number)
                names |= {name for name, _ in union.tree.names_after(directory, 0)}
            except OSError:
                pass  # it is not there any more
        _invalidate(fuse, number, data=True)
        for name in names:
            body = (
                protocol.NOTIFY_INVAL_ENTRY_OUT.pack(number, len(name), _EXPIRE_ONLY) + name + b"\0"
            )
            _notify(fuse, protocol.Notify.INVAL_ENTRY, body)


def _invalidate(fuse: int, number: int, data: bool) -> None:
    body = protocol.NOTIFY_INVAL_INODE_OUT.pack(number, 0 if data else -1, 0)
    _notify(fuse, protocol.Notify.INVAL_INODE, body)


def _notify(fuse: int, code: protocol.Notify, body: bytes) -> None:
    try:
        os.write(fuse, protocol.notification(code, body))
    except OSError:
        pass  # the kernel does not know it (ENOENT), or the mount has ended
