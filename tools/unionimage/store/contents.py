"""What is in the store, and by what name: read, named, held and removed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from unionimage import config as configuration
from unionimage.changeset.limits import Limits
from unionimage.digest import Digest, chain_ids
from unionimage.errors import Conflict, NotFound, UserError
from unionimage.reference import Reference
from unionimage.store import holds
from unionimage.store.blobs import Blobs
from unionimage.store.database import Database
from unionimage.store.files import new_id, remove
from unionimage.store.locks import FileLock
from unionimage.store.model import Image, Layer

_DIRECTORIES = ("blobs/sha256", "diff", "layers", "recipes", "staging", "partial", "locks")
_HEX = frozenset("0123456789abcdef")


class Contents:
    """The contents of an open store (`Store`). All threads of a process may use one.

    Attributes:
        root: its directory.
        config: the configuration file's settings.
        limits, dedupe: as configured; may be set for the commands that follow.
        blobs: content by digest.
        database: its tables, see `schema`; colleagues in this package only.
    """

    def __init__(self, root: Path, config: configuration.Config) -> None:
        self.root = root
        self.config = config
        self.thread_lock = threading.RLock()
        self.limits = Limits(config.layer_size, config.layer_entries)
        self.dedupe = config.dedupe
        _prepare(root)
        self.database = Database(root / "store.db")
        self.blobs = Blobs(root, self.database)

    def close(self) -> None:
        self.database.close()

    # --- places

    def diff_path(self, diff_id: Digest) -> Path:
        """The directory of a layer's files, whether it is there or not."""
        return self.root / "diff" / diff_id.hex

    def recipe_path(self, diff_id: Digest) -> Path:
        return self.root / "recipes" / diff_id.hex

    def partial_path(self, digest: Digest) -> Path:
        """Where a layer is kept while it comes in, also when that breaks off."""
        return self.root / "partial" / digest.hex

    def chain_path(self, chain_id: Digest) -> Path:
        """The text file that lists the layers of a chain, the nearest (topmost) first."""
        return self.root / "layers" / chain_id.hex

    # --- layers

    def find_layer(self, diff_id: Digest) -> Layer | None:
        row = self.database.row(
            "SELECT diff_id, tar_size, size, entries, recipe FROM layers WHERE diff_id = ?",
            (diff_id,),
        )
        return None if row is None else self._layer(row)

    def layer(self, diff_id: Digest) -> Layer:
        """Raises NotFound."""
        found = self.find_layer(diff_id)
        if found is None:
            raise NotFound(f"there is no layer {diff_id} in the store")
        return found

    def has_layer(self, diff_id: Digest) -> bool:
        return self.find_layer(diff_id) is not None

    def layers(self) -> list[Layer]:
        query = "SELECT diff_id, tar_size, size, entries, recipe FROM layers ORDER BY diff_id"
        return [self._layer(row) for row in self.database.rows(query)]

    def layer_blobs(self, diff_id: Digest) -> dict[str, tuple[Digest, int]]:
        """The compressed blobs of a layer: compression -> digest and size."""
        rows = self.database.rows(
            "SELECT compression, digest, size FROM layer_blobs JOIN blobs USING (digest)"
            " WHERE diff_id = ? ORDER BY digest DESC",
            (diff_id,),
        )
        return {compression: (Digest(digest), size) for compression, digest, size in rows}

    def known_forms(self, diff_id: Digest, compression: str) -> list[tuple[Digest, int]]:
        """Digest and size of compressed forms that a layer was seen in, the latest first.

        Their blobs need not be here. A few at most.
        """
        rows = self.database.rows(
            "SELECT digest, size FROM forms WHERE diff_id = ? AND compression = ?"
            " ORDER BY seen DESC LIMIT 3",
            (diff_id, compression),
        )
        return [(Digest(digest), size) for digest, size in rows]

    def layer_of_blob(self, digest: Digest) -> Digest | None:
        """The diffID of a layer blob that is here."""
        row = self.database.row("SELECT diff_id FROM layer_blobs WHERE digest = ?", (digest,))
        return None if row is None else Digest(row[0])

    def chain_directories(self, diff_ids: Sequence[Digest]) -> list[Path]:
        """The layers' directories, TOP FIRST as in `lowerdir=`; `diff_ids` are base first.

        The order is turned round here and nowhere else.
        """
        return [self.diff_path(diff_id) for diff_id in reversed(diff_ids)]

    def write_chains(self, diff_ids: Sequence[Digest], staging: Path) -> None:
        """Write the text file of each chain that ends in one of these layers."""
        chain = chain_ids(diff_ids)
        for count, chain_id in enumerate(chain, 1):
            path = self.chain_path(chain_id)
            if not path.exists():
                staging.mkdir(mode=0o700, exist_ok=True)
                staged = staging / f"chain-{new_id()}"
                names = [directory.name for directory in self.chain_directories(diff_ids[:count])]
                staged.write_text("".join(name + "\n" for name in names))
                os.rename(staged, path)

    def _layer(self, row: tuple[Any, ...]) -> Layer:
        diff_id = Digest(row[0])
        return Layer(diff_id, row[1], row[2], row[3], bool(row[4]), self.diff_path(diff_id))

    # --- images

    def images(self, *, all: bool = False) -> list[Image]:
        """The images, the newest first.

        Args:
            all: also those without a name that others were made from (a build's steps).
        """
        query = "SELECT id FROM images"
        if not all:
            query += (
                " WHERE EXISTS (SELECT 1 FROM names WHERE image = id)"
                " OR NOT EXISTS (SELECT 1 FROM images AS child WHERE child.parent = images.id)"
            )
        found = self._load([row[0] for row in self.database.rows(query)])
        return sorted(found, key=lambda image: (image.created, image.added), reverse=True)

    def image_by_id(self, identity: Digest) -> Image:
        """Raises NotFound."""
        found = self._load([identity])
        if not found:
            raise NotFound(f"there is no image {identity} in the store")
        return found[0]

    def find(self, name: str) -> Image | None:
        """The image of a name, as `image`, or None. Raises UserError for an ambiguous id."""
        identity = self._find_name(name)
        if identity is None:
            identity = self._find_id(name)
        if identity is None:
            return None
        return self.image_by_id(Digest(identity))

    def image(self, name: str) -> Image:
        """The image of NAME[:TAG], NAME@DIGEST, an id, or the first digits of one.

        Raises:
            NotFound: there is none.
            UserError: several ids begin like this, or it can be no name at all.
        """
        found = self.find(name)
        if found is None:
            raise NotFound(f"no such image: {name}; 'unionfuse images' lists those that are here")
        return found

    def touch(self, image: Image) -> None:
        """Note that an image was used now."""
        with self.database.write() as database:
            database.execute("UPDATE images SET used = ? WHERE id = ?", (time.time(), image.id))

    def children(self, image: Image) -> list[Digest]:
        """The images that were made from it here."""
        rows = self.database.rows("SELECT id FROM images WHERE parent = ?", (image.id,))
        return [Digest(row[0]) for row in rows]

    def reference(self, name: str) -> Reference:
        """A name that a user typed, with the configuration's short names put in full."""
        reference = Reference.parse(name)
        first = reference.familiar_repository
        if (full := self.config.short_names.get(first)) is not None and name.startswith(first):
            return Reference.parse(full + name[len(first) :])
        return reference

    def _find_name(self, name: str) -> str | None:
        try:
            reference = self.reference(name).with_default_tag()
        except UserError:
            return None
        if reference.digest is not None:
            row = self.database.row(
                "SELECT image FROM digests WHERE name = ?",
                (f"{reference.repository}@{reference.digest}",),
            )
            return None if row is None else str(row[0])
        candidates = [str(reference)]
        if "/" not in reference.familiar_repository:  # podman's name for what was built there
            candidates.append(f"localhost/{reference.familiar}")
        for candidate in candidates:
            row = self.database.row("SELECT image FROM names WHERE name = ?", (candidate,))
            if row is not None:
                return str(row[0])
        return None

    def _find_id(self, name: str) -> str | None:
        digits = name.removeprefix("sha256:")
        if not digits or len(digits) > 64 or not _HEX.issuperset(digits):
            return None
        rows = self.database.rows(
            "SELECT id FROM images WHERE id GLOB ? LIMIT 2", (f"sha256:{digits}*",)
        )
        if len(rows) > 1:
            raise UserError(f"several images have ids that begin with {name}; give more digits")
        if not rows and len(digits) == 64:
            rows = self.database.rows(
                "SELECT id FROM images WHERE manifest = ?", (f"sha256:{digits}",)
            )
        return str(rows[0][0]) if rows else None

    def _load(self, identities: Sequence[str]) -> list[Image]:
        """Several images in a few queries."""
        database = self.database
        marks = ",".join("?" * len(identities)) if len(identities) <= 100 else ""
        where = f"IN ({marks})" if marks else "IS NOT NULL"
        wanted = tuple(identities) if marks else ()
        names: dict[str, list[Reference]] = {}
        for name, image in database.rows(
            f"SELECT name, image FROM names WHERE image {where}", wanted
        ):
            names.setdefault(image, []).append(Reference.parse(name))
        digests: dict[str, list[Reference]] = {}
        query = f"SELECT name, image FROM digests WHERE image {where}"
        for name, image in database.rows(query, wanted):
            digests.setdefault(image, []).append(Reference.parse(name))
        layers: dict[str, list[Layer]] = {}
        for image, *row in database.rows(
            "SELECT image, diff_id, tar_size, size, entries, recipe FROM image_layers"
            f" JOIN layers USING (diff_id) WHERE image {where} ORDER BY image, position",
            wanted,
        ):
            layers.setdefault(image, []).append(self._layer(tuple(row)))
        rows = database.rows(
            f"SELECT id, manifest, parent, created, added, used FROM images WHERE id {where}",
            wanted,
        )
        chosen = set(identities)
        return [
            Image(
                Digest(identity),
                Digest(manifest) if manifest else None,
                Digest(parent) if parent else None,
                created,
                added,
                used,
                tuple(sorted(names.get(identity, ()))),
                tuple(sorted(digests.get(identity, ()))),
                tuple(layers.get(identity, ())),
                self.blobs,
            )
            for identity, manifest, parent, created, added, used in rows
            if identity in chosen
        ]

    # --- names

    def tag(self, image: Image, name: Reference) -> Image:
        """Give an image a name, which another loses that has it."""
        if name.digest is not None:
            raise UserError(f"a name with a digest cannot be given: {name.familiar}")
        with self.database.write() as database:
            self._require(image)
            database.execute(
                "INSERT OR REPLACE INTO names VALUES (?, ?)",
                (str(name.with_default_tag()), image.id),
            )
            return self.image_by_id(image.id)

    def note_digest(self, image: Image, name: Reference, manifest: Digest | None = None) -> None:
        """Note that an image has this repository@digest (after a push).

        Args:
            manifest: the digest of its manifest, held as a blob by the caller's lease.
        """
        with self.database.write() as database:
            database.execute("INSERT OR REPLACE INTO digests VALUES (?, ?)", (str(name), image.id))
            if manifest is not None:
                database.execute(
                    "UPDATE images SET manifest = ? WHERE id = ? AND manifest IS NULL",
                    (manifest, image.id),
                )

    def untag(self, name: Reference) -> None:
        """Take a name away; the image stays. Raises NotFound."""
        with self.database.write() as database:
            cursor = database.execute("DELETE FROM names WHERE name = ?", (str(name),))
            if cursor.rowcount == 0:
                raise NotFound(f"no such image: {name.familiar}")

    def delete_image(self, image: Image) -> None:
        """Delete an image with all its names; its layers go with the next `collect`.

        Raises:
            Conflict: a container or a mount uses it.
        """
        with self.database.write() as database:
            users = self.users(image)
            if users:
                raise Conflict(
                    f"image {image.id.short} is used by {', '.join(users)}; remove that first"
                )
            database.execute("DELETE FROM images WHERE id = ?", (image.id,))

    def _require(self, image: Image) -> None:
        if self.database.row("SELECT 1 FROM images WHERE id = ?", (image.id,)) is None:
            raise NotFound(f"image {image.id.short} was removed meanwhile")

    # --- holds

    def hold(self, owner: str, image: Image) -> None:
        """Keep an image for an owner (`container:ID`), beyond the life of this process."""
        with self.database.write() as database:
            self._require(image)
            database.execute(
                "INSERT OR IGNORE INTO holds VALUES (?, 'image', ?)", (owner, image.id)
            )

    def hold_layers(self, owner: str, diff_ids: Iterable[Digest]) -> None:
        """Keep layers for an owner, beyond the life of this process. Raises NotFound."""
        with self.database.write() as database:
            for diff_id in diff_ids:
                self.layer(diff_id)
                database.execute(
                    "INSERT OR IGNORE INTO holds VALUES (?, 'layer', ?)", (owner, diff_id)
                )

    def release(self, owner: str) -> None:
        """End all that an owner holds."""
        holds.release_in(self.database, owner)

    def users(self, image: Image) -> list[str]:
        """Owners that hold an image, leases aside: `container:ID`, `mount:DIR`."""
        rows = self.database.rows(
            "SELECT owner FROM holds WHERE kind = 'image' AND key = ?"
            " AND owner NOT LIKE 'lease:%' ORDER BY owner",
            (image.id,),
        )
        return [owner.replace(":", " ", 1) for (owner,) in rows]

    def end_lease(self, identity: str, lock: FileLock) -> None:
        """Called by the lease itself."""
        remove(self.root / "staging" / identity)
        with self.database.write() as database:
            database.execute("DELETE FROM holds WHERE owner = ?", (f"lease:{identity}",))
            database.execute("DELETE FROM leases WHERE id = ?", (identity,))
        lock.release()


def _prepare(root: Path) -> None:
    if (root / _DIRECTORIES[-1]).is_dir():
        return
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in _DIRECTORIES:
        (root / name).mkdir(mode=0o700, parents=True, exist_ok=True)
