"""`--squash`: the layers that a build added become one.

Their changesets are replayed, in order, onto a writable mount of the stack below: the union itself
then writes the whiteouts that the one layer needs. Whiteouts: OCI image-spec v1.1, layer.md.
"""

from __future__ import annotations

import contextlib
import os
import shutil

from unionimage.changeset import tar
from unionimage.digest import Readable
from unionimage.dockerfile.extract import Extraction, clean
from unionimage.dockerfile.kitchen import Kitchen
from unionimage.dockerfile.place import Style
from unionimage.image_config import History, ImageConfig

_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"


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
                    _replay(stream, root)
        finally:
            os.close(root)
    layer = kitchen.lease.begin().commit_upper(upper, base.diff_ids)
    steps = len(base.history)
    history = tuple(
        step if number < steps else step._replace(empty_layer=True)
        for number, step in enumerate(built.history)
    )
    merged_config = built._replace(diff_ids=base.diff_ids, history=history)
    note = History(
        created=now, comment=f"merge {len(added)} layers onto {base.chain_id or 'scratch'}"
    )
    return merged_config.with_step(note, None if layer is None else layer.diff_id)


def _replay(stream: Readable, root: int) -> None:
    target = _Replay(root, Style())
    archive = tar.Reader(stream)
    for entry in archive:
        target.add(archive, entry)
    target.finish()


class _Replay(Extraction):
    """Applies a changeset: whiteouts take away, and a file may replace a directory."""

    def add(self, archive: tar.Reader, entry: tar.Entry) -> None:
        parent, _, name = clean(entry.name).rpartition(b"/")
        if name == _OPAQUE:
            self._take_away(parent, None)
        elif name.startswith(_WHITEOUT):
            self._take_away(parent, name.removeprefix(_WHITEOUT))
        else:
            if entry.kind != tar.DIRECTORY:
                self._take_away(parent, name)
            super().add(archive, entry)

    def _take_away(self, path: bytes, name: bytes | None) -> None:
        """Remove a name from a directory, or all that is in it."""
        with contextlib.suppress(FileNotFoundError), self._opened(path) as directory:
            names = map(os.fsencode, os.listdir(directory)) if name is None else [name]
            for each in names:
                _remove(directory, each)


def _remove(directory: int, name: bytes) -> None:
    try:
        os.unlink(name, dir_fd=directory)
    except IsADirectoryError:
        shutil.rmtree(name, dir_fd=directory)
    except FileNotFoundError:
        pass
