"""Mending a layer that is known by its recipe alone.

Contents that its directory lost are looked for in the other layers. A recipe holds no digest of
each file, only the whole archive has one; so what is found is tried, and believed when the archive
comes out right.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from unionfuse import syscalls
from unionimage.changeset import recipe as recipes
from unionimage.changeset.paths import RESOLVE_IN_ROOT, PieceStream
from unionimage.digest import Readable, VerifyingReader
from unionimage.errors import BadContent
from unionimage.store.contents import Contents
from unionimage.store.model import Layer
from unionimage.tuples import NamedTuple

_MOST_TRIALS = 64


class Lost(NamedTuple):
    """A file whose content is not there, or may be another; `sure` tells which."""

    path: bytes
    size: int
    sure: bool


def lost(store: Contents, layer: Layer) -> list[Lost]:
    """The files of a layer that are missing, of another kind or size, or changed since it was made.

    Raises:
        BadContent: the recipe itself is damaged or missing.
    """
    found = []
    try:
        recipe = open(store.recipe_path(layer.diff_id), "rb")  # noqa: SIM115 (closed below)
    except FileNotFoundError:
        raise BadContent("its recipe is missing") from None
    row = store.database.row("SELECT created FROM layers WHERE diff_id = ?", (layer.diff_id,))
    made = row[0] if row else 0.0
    with recipe, _Files(str(layer.directory)) as files:
        for path, size in recipes.files(recipe):
            status = files.status(path)
            if status is None or not stat.S_ISREG(status.st_mode) or status.st_size != size:
                found.append(Lost(path, size, True))
            elif status.st_ctime > made:
                found.append(Lost(path, size, False))
    return found


@contextmanager
def mended_tar(store: Contents, layer: Layer, found: list[Lost]) -> Iterator[Readable]:
    """The archive of a layer, with contents from other layers in place of what it lost.

    Raises:
        BadContent: it cannot be had; names the files whose content is nowhere.
    """
    places = [[*_elsewhere(store, layer, one)] for one in found]
    if nowhere := [one for one, there in zip(found, places, strict=True) if one.sure and not there]:
        raise BadContent(f"no other layer has {_listed(nowhere)}")
    for instead in itertools.islice(_trials(found, places), _MOST_TRIALS):
        with _tar(store, layer, instead) as stream:
            try:
                VerifyingReader(stream, layer.diff_id, layer.tar_size).drain()
            except BadContent:
                continue
        with _tar(store, layer, instead) as stream:
            yield VerifyingReader(stream, layer.diff_id, layer.tar_size)
            return
    raise BadContent(
        f"no other layer has {_listed(found)} as it was"
        if found
        else "a file of it has changed, and which cannot be told"
    )


def _trials(found: list[Lost], places: list[list[recipes.Place]]) -> Iterator[recipes.Instead]:
    """What to take from elsewhere: what is surely lost; all; and each place for each in turn."""
    pairs = [(one, there) for one, there in zip(found, places, strict=True) if there]
    sure = {one.path: there[0] for one, there in pairs if one.sure}
    yield sure
    yield {one.path: there[0] for one, there in pairs}
    for one, there in pairs:
        for place in there:
            yield {**sure, one.path: place}


@contextmanager
def _tar(store: Contents, layer: Layer, instead: recipes.Instead) -> Iterator[Readable]:
    with ExitStack() as stack:
        # Where all of it is lost, all comes from elsewhere.
        here = layer.directory if layer.directory.is_dir() else store.root
        directory = os.open(here, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, directory)
        recipe = stack.enter_context(open(store.recipe_path(layer.diff_id), "rb"))
        yield PieceStream(recipes.archive(recipe, directory, instead))


def _elsewhere(store: Contents, layer: Layer, one: Lost) -> Iterator[recipes.Place]:
    """Files of other layers that may have the content: of that path, or noted as the same."""
    rows = store.database.rows(
        "SELECT other.diff_id, other.path FROM files AS own JOIN files AS other"
        " USING (hash, size) WHERE own.diff_id = ? AND own.path = ? AND other.diff_id != ?",
        (layer.diff_id, one.path, layer.diff_id),
    )
    places = [(str(store.diff_path(diff_id)), path) for diff_id, path in rows]
    places += [(str(each.directory), one.path) for each in store.layers() if each != layer]
    for directory, path in dict.fromkeys(places):
        with _Files(directory) as files:
            status = files.status(path)
        if status is not None and stat.S_ISREG(status.st_mode) and status.st_size == one.size:
            yield directory, path


class _Files:
    """The files of a layer's directory, by paths that lead nowhere else."""

    def __init__(self, directory: str) -> None:
        try:
            self._root = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            self._root = -1  # all of it is lost

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        if self._root >= 0:
            os.close(self._root)

    def status(self, path: bytes) -> os.stat_result | None:
        """What lies at a path; None for nothing."""
        if self._root < 0:
            return None
        try:
            file = syscalls.openat2(self._root, path, os.O_PATH | os.O_NOFOLLOW, RESOLVE_IN_ROOT)
        except OSError:
            return None
        try:
            return os.fstat(file)
        finally:
            os.close(file)


def _listed(found: list[Lost]) -> str:
    names = [repr(os.fsdecode(one.path)) for one in found[:3]]
    more = len(found) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
