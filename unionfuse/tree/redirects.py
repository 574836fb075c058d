"""Redirects: where directories and metacopies that were renamed go on in the layers below."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

from unionfuse.layers import whiteout
from unionfuse.layers.layer import LayerStack, Place
from unionfuse.tree import view


class Redirects:
    """Follows redirects through one stack of lower layers. It knows nothing of upper.

    Arguments:
        followed: False with `redirect_dir=nofollow`: one that is met is EPERM, as on overlayfs.
    """

    def __init__(self, stack: LayerStack, followed: bool) -> None:
        self._layers = stack.layers
        self._followed = followed

    def resolve(self, path: bytes, first: int) -> Sequence[Place]:
        """The directories that layers from number `first` on have at a path of their own.

        Raises:
            OSError: EPERM with `redirect_dir=nofollow`, as on overlayfs.
        """
        if not self._followed:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        places: Sequence[Place] = [Place(layer, b"") for layer in self._layers[first:]]
        for name in path.split(b"/"):
            if not places or not name:
                return places
            merged = view.merge(places, self.resolve)
            stub = merged.get(name)
            if stub is None or stub.kind != stat.S_IFDIR:
                return ()
            places = view.child_places(merged, stub, name)
        return places

    def file(self, path: bytes, first: int) -> Place | None:
        """The regular file that layers from number `first` on show at a path of their own."""
        parent, _, name = path.strip(b"/").rpartition(b"/")
        places = self.resolve(parent, first)
        if not places:
            return None
        merged = view.merge(places, self.resolve)
        stub = merged.get(name)
        if stub is None or stub.kind != stat.S_IFREG:
            return None
        place = merged.places()[stub.positions[0]]
        return Place(place.layer, place.path, name)

    def data(self, place: Place) -> tuple[int, bytes]:
        """Follow metacopies through lower layers down to the data."""
        last = self._layers[-1].number
        while place.layer.number < last:
            directory = place.layer.directory(place.path)
            marks = whiteout.read_marks(directory, place.name)
            if not marks.metacopy:
                break
            path = view.path_below(place.layer, place.inside())
            below = self.file(path, place.layer.number + 1)
            if below is None:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            place = below
        return place.layer.directory(place.path), place.name
