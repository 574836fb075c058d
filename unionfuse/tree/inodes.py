"""Inode numbers that are unique in one mount, over all the file systems that layers lie on."""

from __future__ import annotations

import os

from unionfuse.layers.layer import LayerStack
from unionfuse.layers.upperdir import UpperDirectory


class InodeNumbers:
    """Turns (device, inode) of the layers into one number that is unique in the mount.

    With one file system below the numbers are its own. With several, the number of the file
    system, counted from the base layer so that a layer added on top changes nothing, goes into
    high bits. That is what overlayfs calls xino.
    """

    _SHIFT = 53

    def __init__(self, stack: LayerStack, upper: UpperDirectory | None, mix: bool) -> None:
        self._mix = mix
        self._devices: dict[int, int] = {}
        for device in stack.devices:
            self._index(device)
        for layer in reversed(stack.layers):
            self._index(os.stat(layer.descriptor).st_dev)
        if upper is not None:
            self._index(upper.device)

    def _index(self, device: int) -> int:
        return self._devices.setdefault(device, len(self._devices))

    def devices(self) -> list[int]:
        """The file systems (st_dev) in the order of their numbers."""
        return list(self._devices)

    def of(self, status: os.stat_result) -> int:
        """The st_ino to show."""
        if self._devices.get(status.st_dev) == 0:
            return status.st_ino  # it is mixed with nothing
        return status.st_ino ^ self.bits(status.st_dev)

    def bits(self, device: int) -> int:
        """What a file system's inode numbers are mixed with."""
        index = self._devices.get(device)
        if index is None:
            index = self._index(device)
        return index << self._SHIFT if self._mix else 0
