"""Verify a store, and repair what can be repaired from what is left.

A blob is read and hashed. A layer's tar is made again (from its recipe or blob), unpacked beside it
and compared with it file by file: contents, owners, modes, times, xattrs. Lists, names and
references are compared with the configs they come from.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unionfuse.layers import whiteout
from unionimage.changeset.unpack import unpack
from unionimage.digest import CHUNK, Digest, Readable, chain_ids
from unionimage.errors import UserError
from unionimage.image_config import ImageConfig
from unionimage.spec import Manifest
from unionimage.store import cleanup, mend
from unionimage.store.files import hide, remove
from unionimage.store.indexes import index_path
from unionimage.store.layer_tar import open_layer_tar
from unionimage.store.model import Layer

if TYPE_CHECKING:
    from unionimage.store.lease import Lease
    from unionimage.store.store import Store


_GET_AGAIN = "load or pull the image again after 'rmi'"


class Problem:
    """Something that is damaged.

    Attributes:
        what: names it and says how.
        images: titles of the images it touches.
        repaired: it is right again.
        remedy: what else to do.
    """

    def __init__(self, what: str, images: Sequence[str] = (), remedy: str = "") -> None:
        self.what = what
        self.images = list(images)
        self.repaired = False
        self.remedy = remedy


def check(store: Store, *, repair: bool = False) -> Iterator[Problem]:
    """Verify everything, and yield each problem as it is found.

    Args:
        repair: unpack damaged layers again, write damaged lists anew, remove leftovers.
    """
    cleanup.end_dead_leases(store)
    with store.lease("check") as lease:
        checker = _Checker(store, lease, repair)
        yield from checker.database()
        yield from checker.blobs()
        yield from checker.layers()
        yield from checker.images()
        yield from checker.chains()
        yield from checker.indexes()
        yield from checker.leftovers()


class _Checker:
    def __init__(self, store: Store, lease: Lease, repair: bool) -> None:
        self._store = store
        self._lease = lease
        self._repair = repair
        self._images = store.images(all=True)
        self._bad_blobs: set[Digest] = set()

    def database(self) -> Iterator[Problem]:
        for (text,) in self._store.database.rows("PRAGMA integrity_check"):
            if text != "ok":
                yield Problem(f"database: {text}", remedy="restore store.db from a copy")
        for row in self._store.database.rows("PRAGMA foreign_key_check"):
            yield Problem(f"database: a row of {row[0]} refers to nothing in {row[2]}")

    def blobs(self) -> Iterator[Problem]:
        rows = self._store.database.rows("SELECT digest FROM blobs ORDER BY digest")
        for (text,) in rows:
            digest = Digest(text)
            try:
                with self._store.blobs.open(digest) as blob:
                    blob.drain()
            except UserError as error:
                if not self._store.blobs.has(digest):
                    continue  # removed meanwhile
                self._bad_blobs.add(digest)
                yield self._bad_blob(digest, error.message)

    def _bad_blob(self, digest: Digest, message: str) -> Problem:
        """A compressed layer whose files are whole can do without its blob, but not be the same."""
        layer = self._store.layer_of_blob(digest)
        images = [
            image.title
            for image in self._images
            if digest in (image.id, image.manifest_digest) or layer in image.diff_ids
        ]
        return Problem(message, images, remedy=_GET_AGAIN)

    def layers(self) -> Iterator[Problem]:
        for layer in self._store.layers():
            if self._lease.use_layer(layer.diff_id) is None:
                continue  # removed meanwhile
            images = [image.title for image in self._images if layer.diff_id in image.diff_ids]
            name = f"layer {layer.diff_id.short}"
            try:
                fresh = self._unpack_again(layer)
            except UserError as error:
                yield from self._mend(layer, Problem(f"{name}: {error}", images))
                continue
            difference = self._difference(layer, fresh)
            if difference is not None:
                problem = Problem(f"{name}: {difference}", images)
                if self._repair:
                    self._replace(layer, fresh, problem)
                yield problem
            remove(fresh)

    def _unpack_again(self, layer: Layer) -> Path:
        """The layer as it should be: from its recipe, or where that fails from a blob."""
        try:
            return self._unpack(layer)
        except UserError:
            if not layer.recipe or not self._store.layer_blobs(layer.diff_id):
                raise
            return self._unpack(layer._replace(recipe=False))

    def _unpack(self, layer: Layer) -> Path:
        with open_layer_tar(self._store, layer) as archive:
            return self._unpack_tar(archive)

    def _unpack_tar(self, archive: Readable) -> Path:
        fresh = self._lease.scratch()
        opened = os.open(fresh, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            unpack(archive, opened, limits=self._store.limits)
            while archive.read(CHUNK):
                pass
        finally:
            os.close(opened)
        return fresh

    def _mend(self, layer: Layer, problem: Problem) -> Iterator[Problem]:
        """A layer whose directory lost contents that only it had, unless another layer has them."""
        if not layer.recipe:
            problem.remedy = _GET_AGAIN
            yield problem
            return
        try:
            found = mend.lost(self._store, layer)
            problem.what += "".join(
                f"; {os.fsdecode(one.path)!r} {'is damaged' if one.sure else 'was changed'}"
                for one in found[:5]
            ) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
            with mend.mended_tar(self._store, layer, found) as archive:
                if self._repair:
                    fresh = self._unpack_tar(archive)
                    self._replace(layer, fresh, problem)
                    remove(fresh)
                else:
                    problem.remedy = "another layer has the same: use --repair"
        except UserError as error:
            problem.remedy = f"{error}: {_GET_AGAIN}"
        yield problem

    @staticmethod
    def _difference(layer: Layer, fresh: Path) -> str | None:
        if not layer.directory.is_dir():
            return "its directory is missing"
        return _compare(os.fsencode(layer.directory), os.fsencode(fresh), b"")

    def _replace(self, layer: Layer, fresh: Path, problem: Problem) -> None:
        mounted = self._store.database.rows(
            "SELECT target FROM mounts WHERE instr(layers, ?)", (layer.diff_id,)
        )
        if mounted:
            problem.remedy = f"unmount {mounted[0][0]}, then repair"
            return
        with self._store.database.write():
            if layer.directory.exists():
                hide(layer.directory, self._lease.scratch())
            os.rename(fresh, layer.directory)
        problem.repaired = True

    def images(self) -> Iterator[Problem]:
        for image in self._images:
            if self._bad_blobs & {image.id, image.manifest_digest}:
                continue
            try:
                config = ImageConfig.from_json(image.config_bytes)
                data = image.manifest_bytes()
                manifest = Manifest.from_json(data) if data else None
            except UserError as error:
                if self._store.find(image.id) is not None:
                    yield Problem(f"image {image.id.short}: {error}", [image.title])
                continue
            if config.diff_ids != image.diff_ids:
                yield Problem(
                    f"image {image.id.short}: its layers are not its config's", [image.title]
                )
            if manifest is not None and manifest.config.digest != image.id:
                yield Problem(f"image {image.id.short}: its manifest is another's", [image.title])

    def chains(self) -> Iterator[Problem]:
        for image in self._images:
            if self._store.find(image.id) is None:
                continue
            for count, chain_id in enumerate(chain_ids(image.diff_ids), 1):
                below = self._store.chain_directories(image.diff_ids[:count])
                wanted = "".join(f"{directory.name}\n" for directory in below)
                path = self._store.chain_path(chain_id)
                found = path.read_text(errors="replace") if path.is_file() else None
                if found == wanted:
                    continue
                problem = Problem(
                    f"{path}: {'missing' if found is None else 'wrong'}", [image.title]
                )
                if self._repair:
                    path.unlink(missing_ok=True)
                    self._store.write_chains(image.diff_ids, self._lease.scratch())
                    problem.repaired = True
                yield problem

    def indexes(self) -> Iterator[Problem]:
        """An index that is not what its layers say is made again at the next mount."""
        from unionfuse.index.check import damage, differences
        from unionfuse.index.lookup import LookupIndex, LookupIndexError
        from unionfuse.layers.layer import LayerStack

        for image in self._images:
            for count, chain_id in enumerate(chain_ids(image.diff_ids), 1):
                path = index_path(self._store, chain_id)
                if not path.exists():
                    continue
                directories = self._store.chain_directories(image.diff_ids[:count])
                try:
                    index = LookupIndex.open(os.fspath(path))
                    stack = LayerStack.open([os.fsencode(one) for one in directories])
                    try:
                        faults = [*damage(index)] or [*differences(index, stack.layers)]
                    finally:
                        stack.close()
                        index.close()
                except LookupIndexError as error:
                    faults = [error.reason]
                if faults:
                    problem = Problem(f"{path}: {faults[0]}", [image.title])
                    if self._repair:
                        path.unlink(missing_ok=True)
                        problem.repaired = True
                    yield problem

    def leftovers(self) -> Iterator[Problem]:
        with self._store.database.write() as database:
            for path in cleanup.orphans(self._store, database):
                problem = Problem(f"{path}: nothing knows it")
                if self._repair:
                    remove(hide(path, self._lease.scratch()))
                    problem.repaired = True
                yield problem


_COMPARED = ("st_mode", "st_uid", "st_gid", "st_rdev", "st_mtime_ns")


def _compare(layer: bytes, fresh: bytes, path: bytes) -> str | None:
    """The first difference between two trees, or None."""
    names, wanted = set(os.listdir(layer)), set(os.listdir(fresh))
    for name in sorted(names ^ wanted):
        shown = os.fsdecode(path + b"/" + name)
        return f"{shown!r} is {'missing' if name in wanted else 'too much'}"
    for name in sorted(names):
        one, other = layer + b"/" + name, fresh + b"/" + name
        difference = _compare_entry(one, other, path + b"/" + name)
        if difference is not None:
            return difference
    return None


def _compare_entry(one: bytes, other: bytes, path: bytes) -> str | None:
    shown = repr(os.fsdecode(path))
    was, now = os.lstat(other), os.lstat(one)
    if _is_whiteout(other, was) and _is_whiteout(one, now):
        return None  # nothing else about it is in the tar
    for key in _COMPARED:
        if getattr(was, key) != getattr(now, key):
            return f"{shown} has another {key[3:].removesuffix('_ns')}"
    if not stat.S_ISLNK(was.st_mode) and _xattrs(one) != _xattrs(other):
        return f"{shown} has other xattrs"
    if stat.S_ISLNK(was.st_mode) and os.readlink(one) != os.readlink(other):
        return f"{shown} links elsewhere"
    if stat.S_ISREG(was.st_mode) and (was.st_size != now.st_size or not _same(one, other)):
        return f"{shown} has other contents"
    return _compare(one, other, path) if stat.S_ISDIR(was.st_mode) else None


def _is_whiteout(path: bytes, status: os.stat_result) -> bool:
    """In whatever form: the store may have been copied to another kind of file system."""
    if stat.S_ISREG(status.st_mode) and not status.st_size:
        parent, _, name = path.rpartition(b"/")
        directory = os.open(parent, os.O_PATH | os.O_DIRECTORY)
        try:
            return whiteout.read_marks(directory, name).whiteout
        finally:
            os.close(directory)
    return whiteout.is_whiteout(status)


def _xattrs(path: bytes) -> dict[str, bytes]:
    return {
        name: os.getxattr(path, name, follow_symlinks=False)
        for name in os.listxattr(path, follow_symlinks=False)
    }


def _same(one: bytes, other: bytes) -> bool:
    with open(one, "rb", buffering=0) as first, open(other, "rb", buffering=0) as second:
        while True:
            data = first.read(CHUNK)
            if data != second.read(CHUNK):
                return False
            if not data:
                return True
