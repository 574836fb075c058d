"""Which nodes are let go, and when. Callers hold the union's lock."""

from __future__ import annotations

from collections import OrderedDict

from unionfuse.tree.journal import FIRST_FRESH_ID
from unionfuse.tree.node import Directory, Node
from unionfuse.tree.tree import Tree

_IDLE_DIRECTORIES = 2048


class Forgetting:
    """Lets go of the nodes of one tree; directories that were used last stay a while."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._idle: OrderedDict[int, Directory] = OrderedDict()

    def release_if_unused(self, node: Node) -> None:
        """Let go of a node that neither the kernel nor anyone else needs, and of its parents."""
        if node.lookups > 0 or node.opened:
            return
        waiting = [node]
        while waiting:
            node = waiting.pop()
            if not self._is_unused(node):
                continue
            if not isinstance(node, Directory) or not self._keep_idle(node):
                waiting += self._let_go(node)

    def _is_unused(self, node: Node) -> bool:
        tree = self._tree
        if node is tree.root or node.lookups > 0 or node.opened or node.id not in tree.nodes:
            return False
        if isinstance(node, Directory):
            tree.young.adopt_inside(node)
            if node.children:
                return False
        if not tree.is_indexed(node):
            return True  # for a node that a table has this takes no more than `lookups` == 0
        # Nobody counts whether the kernel knows a node of the index. What upper has could not be
        # made anew from the index; what is deleted goes when the kernel forgets it, which it
        # does once.
        return node.lookups < 0 if node.deleted else not node.in_upper

    def _keep_idle(self, node: Directory) -> bool:
        """Keep directories that were used last and can be made again: each costs a walk."""
        tree = self._tree
        if node.deleted:
            return False
        if not tree.is_indexed(node) and not (node.tabled and tree.tables.lookups(node.id)):
            return False
        self._idle[node.id] = node
        self._idle.move_to_end(node.id)
        if len(self._idle) > _IDLE_DIRECTORIES:
            _, oldest = self._idle.popitem(last=False)
            if self._is_unused(oldest):
                for parent in self._let_go(oldest):
                    self.release_if_unused(parent)
        return True

    def _let_go(self, node: Node) -> list[Directory]:
        """Forget a node; returns the directories that may not be needed any more either."""
        tree = self._tree
        del tree.nodes[node.id]
        tree.journal.drop(node.id)
        if node.unnamed >= 0:
            tree.close_unnamed(node)
        if node.lower_key is not None or node.upper_key:
            tree.links.forget(node)
        for parent, name in node.names:
            if parent.children.get(name) is node:
                del parent.children[name]
        if node.tabled:
            tree.tables.made(node.id, False)
        elif node.id >= FIRST_FRESH_ID:
            tree.tables.give_back(node.id, not node.in_upper and not node.deleted)
        if isinstance(node, Directory):
            self._idle.pop(node.id, None)
            tree.stack.cache.discard(("upper", node.id))
            tree.tables.release(node.id)
        return [parent for parent, _ in node.names] if node.names else []
