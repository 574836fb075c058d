"""Files that somebody else has made in upper, and keeps to himself until they are asked about.

The tree asks here before it takes a file of upper for one that nobody knows. `Young` has none; the
express lane's are in express/lending.py. Callers hold the union's lock.
"""

from __future__ import annotations

from unionfuse.tree.node import Directory, Entry, Node


class Young:
    """There are no such files."""

    def __len__(self) -> int:
        return 0

    def opened(self) -> int:
        """How many of them are open."""
        return 0

    def adopt(self, number: int) -> bool:
        """Make an ordinary node of the file that has this id; False for none."""
        return False

    def adopt_name(self, directory: Directory, name: bytes) -> Node | None:
        """Make an ordinary node of the file that has this name; None for none."""
        return None

    def adopt_inside(self, directory: Directory) -> None:
        """Make ordinary nodes of all files in a directory."""

    def listed(self, directory: Directory, name: bytes) -> Entry | None:
        """What a listing says of the file that has this name: type and inode number.

        The kernel knows the rest, or the file would not be here; so it counts as no lookup.
        """
        return None
