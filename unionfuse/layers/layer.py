"""Layers: the directories that a union is made of, opened once and entered by descriptor.

A layer's descriptor is a private, read-only clone of its mount where the caller may make one
(CAP_SYS_ADMIN, Linux 5.12): what is mounted inside a layer, the union itself included, does not
show in it, and no mistake of ours can write to it. Elsewhere it is the directory itself, entered
without crossing mounts.
"""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from unionfuse import syscalls

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class LayerError(Exception):
    """A layer, upper or work directory cannot be used: which, why, and what to do about it."""

    def __init__(self, path: bytes, reason: str, remedy: str) -> None:
        super().__init__(f"{os.fsdecode(path)}: {reason}; {remedy}")
        self.path, self.reason, self.remedy = path, reason, remedy


class DescriptorCache:
    """Directory descriptors, least recently used ones closed first.

    A descriptor that `get` returns is good until the next `put`: callers hold the union's lock.
    """

    def __init__(self, capacity: int = 512) -> None:
        self._capacity = capacity
        self._open: OrderedDict[Hashable, int] = OrderedDict()

    def get(self, key: Hashable) -> int | None:
        descriptor = self._open.get(key)
        if descriptor is not None:
            self._open.move_to_end(key)
        return descriptor

    def put(self, key: Hashable, descriptor: int) -> None:
        self._open[key] = descriptor
        # Two directories are in use at once in a rename or link: never close the newest few.
        if len(self._open) > self._capacity:
            os.close(self._open.popitem(last=False)[1])

    def discard(self, key: Hashable) -> None:
        descriptor = self._open.pop(key, None)
        if descriptor is not None:
            os.close(descriptor)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


class Layer:
    """One directory of the stack.

    Attributes:
        path: as the user wrote it, for messages and `user.unionfuse.layer`.
        descriptor: O_PATH, the root of the layer.
        number: 0 is the topmost lower layer; the upper is -1.
        protected: the descriptor is a read-only clone.
        key: stays the same when layers above come or go.
    """

    __slots__ = ("_cache", "descriptor", "key", "number", "path", "protected", "uuid")

    def __init__(
        self,
        path: bytes,
        descriptor: int,
        number: int,
        protected: bool,
        cache: DescriptorCache,
        key: int | None = None,
    ) -> None:
        self.path = path
        self.descriptor = descriptor
        self.number = number
        self.key = number if key is None else key
        self.protected = protected
        self._cache = cache
        self.uuid: bytes | None = None

    def directory(self, path: bytes) -> int:
        """An O_PATH descriptor of a directory in this layer; the cache owns it.

        Arguments:
            path: relative to the layer, without links; empty for the layer's root.
        """
        if not path:
            return self.descriptor
        key = (self.number, path)
        descriptor = self._cache.get(key)
        if descriptor is None:
            descriptor = syscalls.open_beneath(self.descriptor, path, _DIRECTORY)
            self._cache.put(key, descriptor)
        return descriptor

    def _readable(self) -> int:
        return os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.descriptor)

    def filesystem_uuid(self) -> bytes:
        """The UUID of the layer's file system, asked for once."""
        if self.uuid is None:
            readable = self._readable()
            try:
                self.uuid = syscalls.filesystem_uuid(readable)
            finally:
                os.close(readable)
        return self.uuid

    def open_by_handle(self, kind: int, handle: bytes) -> int:
        """An O_PATH descriptor of the file that a handle means in this layer's file system.

        Raises:
            OSError: ESTALE for a file that is gone, EPERM without CAP_DAC_READ_SEARCH.
        """
        readable = self._readable()
        try:
            return syscalls.open_by_handle(readable, kind, handle)
        finally:
            os.close(readable)


class Place(NamedTuple):
    """Where something lies in a lower layer: `name` in the directory `path` of `layer`.

    For a directory that a layer contributes, `name` is empty and `path` is its own.
    """

    layer: Layer
    path: bytes
    name: bytes = b""

    def inside(self) -> bytes:
        """The path from the root of the layer."""
        if not self.name:
            return self.path
        return self.path + b"/" + self.name if self.path else self.name


class LayerStack:
    """All lower layers, topmost first, and the cache of descriptors that they share.

    Attributes:
        devices: file systems that inode numbers were spread over earlier in this mount, in order.
    """

    def __init__(
        self, layers: Sequence[Layer], cache: DescriptorCache, devices: Sequence[int] = ()
    ) -> None:
        self.layers = tuple(layers)
        self.cache = cache
        self.devices = tuple(devices)

    @classmethod
    def open(
        cls,
        paths: Sequence[bytes],
        descriptors: Sequence[int] = (),
        keys: Sequence[int] = (),
        devices: Sequence[int] = (),
    ) -> LayerStack:
        """Open layer directories.

        Arguments:
            paths: topmost first, as `lowerdir=` lists them; relative to the working directory.
            descriptors: of the same layers, opened already; the stack owns them from here on.
            keys: of the same layers; their numbers unless given.
            devices: see `LayerStack`.

        Raises:
            LayerError: a path is missing, unreadable or no directory.
        """
        cache = DescriptorCache()
        layers: list[Layer] = []
        try:
            for number, path in enumerate(paths):
                if descriptors:
                    descriptor, protected = descriptors[number], True
                else:
                    descriptor, protected = open_layer(path)
                key = keys[number] if keys else number
                path = os.path.abspath(path)
                layers.append(Layer(path, descriptor, number, protected, cache, key))
        except BaseException:
            for layer in layers:
                os.close(layer.descriptor)
            raise
        return cls(layers, cache, devices)

    def close(self) -> None:
        self.cache.close()
        for layer in self.layers:
            os.close(layer.descriptor)


def open_directory(path: bytes, role: str) -> int:
    """An O_PATH descriptor of a directory that the user named.

    Raises:
        LayerError: with `role` (such as "the lower layer") in the reason.
    """
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        raise LayerError(path, f"{role} does not exist", "create it or correct the path") from None
    except OSError as error:
        raise LayerError(path, f"{role} cannot be opened: {error.strerror}", "check it") from None
    if not stat.S_ISDIR(os.stat(descriptor).st_mode):
        os.close(descriptor)
        raise LayerError(path, f"{role} is not a directory", "name a directory")
    return descriptor


def open_layer(path: bytes) -> tuple[int, bool]:
    """A descriptor of a layer's root, and whether it is a read-only clone. Raises LayerError."""
    descriptor = open_directory(path, "the lower layer")
    try:
        readable = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=descriptor)
    except OSError as error:
        os.close(descriptor)
        reason = f"the lower layer cannot be read: {error.strerror}"
        raise LayerError(path, reason, "give yourself the permission to read it") from None
    os.close(readable)
    try:
        clone = syscalls.clone_tree(descriptor)
    except OSError:
        return descriptor, False
    os.close(descriptor)
    return clone, True
