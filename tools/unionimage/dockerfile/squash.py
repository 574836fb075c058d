"""`--squash`: the layers that a build added become one.

Their changesets are replayed, in order, onto a writable mount of the stack below: the union itself
then writes the whiteouts that the one layer needs. Whiteouts: OCI image-spec v1.1, layer.md.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tarfile
from dataclasses import replace
from typing import BinaryIO, cast

from unionimage.dockerfile.extract import Extraction
from unionimage.dockerfile.kitchen import Kitchen
from unionimage.dockerfile.place import Style
from unionimage.spec import History, ImageConfig

_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"


def squash(kitchen: Kitchen, base: ImageConfig, built: ImageConfig, now: str) -> ImageConfig:
    """The config of an image with one layer on `base` in place of those that `built` adds.

    The history keeps every step, and says at its end what was merged, as docker's --squash does.
    """
    count = len(base.diff_ids)
    added = built.diff_ids[count:]
    if len(added) < 2:
        return built
    kitchen.enter_private_namespace()
    upper = kitchen.scratch()
    upper.chmod(0o755)
    with kitchen.mounted(base.diff_ids, upper=upper) as merged:
        root = os.open(merged, os.O_PATH | os.O_DIRECTORY)
        try:
            for diff_id in added:
                with kitchen.store.layer_tar(diff_id) as stream:
                    _replay(cast(BinaryIO, stream), root)
        finally:
            os.close(root)
    layer = kitchen.lease.begin().commit_upper(upper, base.diff_ids)
    steps = len(base.history)
    history = tuple(
        step if number < steps else replace(step, empty_layer=True)
        for number, step in enumerate(built.history)
    )
    merged_config = replace(built, diff_ids=base.diff_ids, history=history)
    note = History(
        created=now, comment=f"merge {len(added)} layers onto {base.chain_id or 'scratch'}"
    )
    return merged_config.with_step(note, None if layer is None else layer.diff_id)


def _replay(stream: BinaryIO, root: int) -> None:
    target = _Replay(root, Style())
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            target.add(archive, member)
    target.finish()


class _Replay(Extraction):
    """Applies a changeset: whiteouts take away, a directory's own attributes count."""

    def add(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        parent, _, name = member.name.strip("/").rpartition("/")
        if name == _OPAQUE:
            self._empty(os.fsencode(parent))
        elif name.startswith(_WHITEOUT):
            with self._opened(os.fsencode(parent)) as directory:
                _remove(directory, name.removeprefix(_WHITEOUT))
        else:
            if not member.isdir():
                self._make_way(member.name)
            super().add(archive, member)

    def _make_way(self, path: str) -> None:
        """A file of the changeset replaces a directory that is there."""
        parent, _, name = path.strip("/").rpartition("/")
        with contextlib.suppress(FileNotFoundError), self._opened(os.fsencode(parent)) as directory:
            _remove(directory, name)

    def _empty(self, path: bytes) -> None:
        with contextlib.suppress(FileNotFoundError), self._opened(path) as directory:
            for name in os.listdir(directory):
                _remove(directory, name)


def _remove(directory: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=directory)
    except IsADirectoryError:
        shutil.rmtree(name, dir_fd=directory)
    except FileNotFoundError:
        pass
