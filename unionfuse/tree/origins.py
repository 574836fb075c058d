"""Origins: which lower file a copy in upper came from, by file handle, as overlayfs notes it.

They keep st_ino the same over a copy-up and a remount, and hard links together.
"""

from __future__ import annotations

import os

from unionfuse import syscalls
from unionfuse.layers import whiteout
from unionfuse.layers.layer import LayerStack, Place
from unionfuse.tree.inodes import InodeNumbers


class Origins:
    """Makes origin marks and follows them, for one stack."""

    def __init__(self, stack: LayerStack, inodes: InodeNumbers) -> None:
        self._stack = stack
        self._inodes = inodes

    def of(self, place: Place) -> bytes:
        """The origin mark of a lower file; empty where its file system has no file handles."""
        try:
            directory = place.layer.directory(place.path)
            kind, handle = syscalls.file_handle(directory, place.name)
        except OSError:
            return b""
        return whiteout.encode_origin(kind, handle, place.layer.filesystem_uuid())

    def _open(self, origin: bytes) -> int:
        """The lower file behind an origin mark, -1 where it cannot be told."""
        decoded = whiteout.decode_origin(origin)
        if decoded is None:
            return -1
        kind, handle, uuid = decoded
        for layer in self._stack.layers:
            if layer.filesystem_uuid() == uuid:
                try:
                    return layer.open_by_handle(kind, handle)
                except OSError:
                    return -1
        return -1

    def inode(self, origin: bytes) -> int:
        """The st_ino shown for the lower file behind an origin mark; 0 where it cannot be told."""
        descriptor = self._open(origin)
        if descriptor < 0:
            return 0
        try:
            return self._inodes.of(os.stat(descriptor))
        finally:
            os.close(descriptor)

    def links(self, origin: bytes) -> int:
        """The link count of the lower file that an origin mark names; 0 where it is not found."""
        descriptor = self._open(origin)
        if descriptor < 0:
            return 0
        try:
            return os.stat(descriptor).st_nlink
        finally:
            os.close(descriptor)
