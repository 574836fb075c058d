"""Leases: under one, content is added to the store. Until the image that needs it is there, the
lease keeps it from the garbage collector; when the lease ends, or its process does, what no image
uses is garbage.

Everything is staged in a directory of the lease, verified, and then published inside one database
transaction (see `Database`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from unionimage.changeset import compression as compressions
from unionimage.changeset import recipe as recipes
from unionimage.changeset import tar
from unionimage.changeset.limits import Limits
from unionimage.changeset.pack import pack_upper
from unionimage.changeset.paths import PieceStream
from unionimage.changeset.unpack import Unpacked, unpack
from unionimage.digest import CHUNK, Digest, Readable, VerifyingReader
from unionimage.errors import BadContent
from unionimage.image_config import ImageConfig
from unionimage.reference import Reference
from unionimage.spec import Manifest, compression_of
from unionimage.store import dedupe
from unionimage.store.files import publish, spread_trees, sync_file_system
from unionimage.store.layer_tar import open_layer_tar
from unionimage.store.locks import FileLock
from unionimage.store.model import Image, Layer
from unionimage.store.streams import Both, CountingWriter, Progress, Tee, chained

if TYPE_CHECKING:
    import sqlite3

    from unionimage.store.contents import Contents


class Lease:
    """Made by `Store.lease`; a context manager. Its methods may be called from several threads."""

    def __init__(self, store: Contents, identity: str, lock: FileLock) -> None:
        self.store = store
        self.owner = f"lease:{identity}"
        self._identity = identity
        self._lock = lock
        self._staging = store.root / "staging" / identity
        self._count = 0

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Give up what it holds and remove what it staged."""
        self.store.end_lease(self._identity, self._lock)

    def scratch(self) -> Path:
        """A new directory on the store's file system; it goes with the lease."""
        with self.store.thread_lock:
            self._count += 1
            path = self._staging / str(self._count)
            if self._count == 1:
                spread_trees(self.store.root / "staging")
        path.mkdir(mode=0o700, parents=True)
        return path

    # --- what is there already

    def use_layer(self, diff_id: Digest) -> Layer | None:
        """Hold a layer that the store has; None: it has not."""
        with self.store.database.write() as database:
            layer = self.store.find_layer(diff_id)
            if layer is not None:
                self._hold(database, "layer", diff_id)
        return layer

    def use_blob(self, digest: Digest) -> bool:
        """Hold a blob that the store has; False: it has not."""
        with self.store.database.write() as database:
            there = self.store.blobs.has(digest)
            if there:
                self._hold(database, "blob", digest)
        return there

    # --- blobs

    def add_blob(
        self, stream: Readable, digest: Digest | None = None, size: int | None = None
    ) -> tuple[Digest, int]:
        """Store a blob; returns its digest and size.

        Raises:
            BadContent: digest or size are not as promised.
        """
        reader = VerifyingReader(
            stream, digest, size, "blob" if digest is None else f"blob {digest}"
        )
        staged = self.scratch() / "blob"
        with open(staged, "wb") as output:
            while data := reader.read(CHUNK):
                output.write(data)
        self._publish_blob(staged, reader.digest, reader.count)
        return reader.digest, reader.count

    def add_bytes(self, data: bytes) -> Digest:
        """Store a small blob."""
        digest = Digest.of(data)
        if not self.use_blob(digest):
            staged = self.scratch() / "blob"
            staged.write_bytes(data)
            self._publish_blob(staged, digest, len(data))
        return digest

    def _publish_blob(self, staged: Path, digest: Digest, size: int) -> None:
        self._durable()
        with self.store.database.write() as database:
            if not self.store.blobs.has(digest):
                publish(staged, self.store.blobs.path(digest), self._staging)
                database.execute("INSERT INTO blobs VALUES (?, ?)", (digest, size))
            self._hold(database, "blob", digest)

    # --- layers

    def resume_offset(self, digest: Digest) -> int:
        """How many bytes of a compressed layer an `add_layer` that broke off has left here."""
        try:
            return self.store.partial_path(digest).stat().st_size
        except FileNotFoundError:
            return 0

    def add_layer(
        self,
        stream: Readable,
        *,
        diff_id: Digest | None = None,
        digest: Digest | None = None,
        size: int | None = None,
        offset: int = 0,
        resumable: bool = False,
        progress: Progress | None = None,
        limits: Limits | None = None,
    ) -> Layer:
        """Store and unpack a layer. Its compression is found out by looking.

        A compressed layer is kept as it came, an uncompressed one as a recipe.

        Args:
            stream: the layer's blob, or what of it follows `offset`.
            diff_id, digest, size: what it must be; None: whatever it is.
            offset: so many bytes are taken from what `resume_offset` told.
            resumable: the sender can go on at an offset; an uncompressed layer, too, is then kept
                as it comes until all of it is here. A compressed one is in any case.
            progress: is told of bytes read.

        Raises:
            BadContent: damaged, hostile, or another one than promised.
        """
        what = (
            f"layer {(digest or diff_id or Digest.of(b'')).short}" if digest or diff_id else "layer"
        )
        work = self.scratch()
        with ExitStack() as stack:
            if digest is not None:
                stack.callback(FileLock.wait(self._partial_lock(digest)).release)
                if (ready := self._known(digest, diff_id)) is not None:
                    return ready
                blob = self.store.partial_path(digest)
            else:
                blob = work / "blob"
            raw = stack.enter_context(Tee(stream, blob, offset, progress))
            checked = VerifyingReader(raw, digest, size, what)
            peekable = compressions.Peekable(checked)
            compression = compressions.sniff(peekable.peek(6))
            raw.keep = compression != "none" or (resumable and digest is not None)
            plain = VerifyingReader(
                compressions.decompress(peekable, compression, what),
                diff_id,
                None,
                f"{what} unpacked",
            )
            try:
                with _ahead(stream, Both(plain, peekable)) as ahead:
                    unpacked = self._unpack(ahead, work, compression == "none", limits, what)
                    while ahead.read(CHUNK):
                        pass
            except BadContent:
                raw.discard()
                raise
            raw.finish()
            if unpacked.doubtful:
                self._try_recipe(work, plain.digest, what)
            kept = None
            if compression != "none":
                kept = (checked.digest, checked.count, compression)
            elif raw.keep:
                raw.discard()
            return self._publish_layer(work, plain, unpacked, blob, kept)

    def _partial_lock(self, digest: Digest) -> Path:
        return self.store.root / "locks" / f"partial-{digest.hex}"

    def _known(self, digest: Digest, diff_id: Digest | None) -> Layer | None:
        """The layer of that blob, if another command has stored it meanwhile."""
        if digest == diff_id:  # uncompressed
            return self.use_layer(digest)
        row = self.store.database.row("SELECT diff_id FROM layer_blobs WHERE digest = ?", (digest,))
        if row is not None and diff_id in (None, row[0]):
            return self.use_layer(Digest(row[0]))
        return None

    def _unpack(
        self, stream: Readable, work: Path, keep_recipe: bool, limits: Limits | None, what: str
    ) -> Unpacked:
        with ExitStack() as stack:
            directories = []
            for name in ("diff", "displaced"):
                (work / name).mkdir(mode=0o755)
                opened = os.open(work / name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, opened)
                directories.append(opened)
            recipe = None
            if keep_recipe:
                file = stack.enter_context(open(work / "recipe", "wb"))
                recipe = recipes.RecipeWriter(file)
            unpacked = unpack(
                stream,
                directories[0],
                displaced=directories[1],
                recipe=recipe,
                limits=limits or self.store.limits,
                fingerprint_from=dedupe.SMALLEST if dedupe.possible(self.store, work) else None,
                what=what,
            )
            dedupe.share(self.store, directories[0], unpacked.fingerprints)
        if unpacked.replaced:
            self._inline(work, unpacked)
        return unpacked

    @staticmethod
    def _inline(work: Path, unpacked: Unpacked) -> None:
        """Keep in the recipe the contents that are no longer in the directory."""
        displaced = os.open(work / "displaced", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with open(work / "recipe", "rb") as old, open(work / "recipe.new", "wb") as new:
                recipes.inline(old, new, unpacked.replaced, displaced)
        finally:
            os.close(displaced)
        os.rename(work / "recipe.new", work / "recipe")

    def _try_recipe(self, work: Path, diff_id: Digest, what: str) -> None:
        directory = os.open(work / "diff", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with open(work / "recipe", "rb") as recipe:
                pieces = PieceStream(recipes.archive(recipe, directory))
                VerifyingReader(pieces, diff_id).drain()
        except BadContent:
            raise BadContent(f"{what} has entries that contradict each other") from None
        finally:
            os.close(directory)

    def _publish_layer(
        self,
        work: Path,
        plain: VerifyingReader,
        unpacked: Unpacked,
        blob: Path,
        kept: tuple[Digest, int, str] | None,
    ) -> Layer:
        diff_id = plain.digest
        self._durable()
        with self.store.database.write() as database:
            if self.store.find_layer(diff_id) is None:
                publish(work / "diff", self.store.diff_path(diff_id), self._staging)
                if kept is None:
                    publish(work / "recipe", self.store.recipe_path(diff_id), self._staging)
                database.execute(
                    "INSERT INTO layers VALUES (?, ?, ?, ?, ?, ?)",
                    (
                        diff_id,
                        plain.count,
                        unpacked.size,
                        unpacked.entries,
                        kept is None,
                        time.time(),
                    ),
                )
                dedupe.record(database, diff_id, unpacked.fingerprints)
            if kept is not None:
                self._record_blob(database, blob, diff_id, *kept)
            self._hold(database, "layer", diff_id)
        layer = self.store.find_layer(diff_id)
        assert layer is not None
        return layer

    def _record_blob(
        self,
        database: sqlite3.Connection,
        staged: Path,
        diff_id: Digest,
        digest: Digest,
        size: int,
        compression: str,
    ) -> None:
        if not self.store.blobs.has(digest):
            publish(staged, self.store.blobs.path(digest), self._staging)
            database.execute("INSERT INTO blobs VALUES (?, ?)", (digest, size))
        else:
            staged.unlink(missing_ok=True)
        database.execute(
            "INSERT OR IGNORE INTO layer_blobs VALUES (?, ?, ?)", (diff_id, digest, compression)
        )
        database.execute(
            "INSERT OR REPLACE INTO forms VALUES (?, ?, ?, ?, ?)",
            (diff_id, compression, digest, size, time.time()),
        )

    def add_layer_blob(
        self, stream: Readable, layer: Layer, digest: Digest, size: int | None = None
    ) -> None:
        """Keep one more compressed blob of a layer that is here, without unpacking it again.

        Raises:
            BadContent: it is damaged, or not of that layer.
        """
        staged = self.scratch() / "blob"
        what = f"layer {digest.short}"
        with Tee(stream, staged, 0, None) as raw:
            checked = VerifyingReader(raw, digest, size, what)
            peekable = compressions.Peekable(checked)
            compression = compressions.sniff(peekable.peek(6))
            plain = compressions.decompress(peekable, compression, what)
            whole = VerifyingReader(plain, layer.diff_id, layer.tar_size, f"{what}, unpacked,")
            whole.drain()
            checked.drain()
            raw.finish()
        if compression != "none":
            with self.store.database.write() as database:
                self._record_blob(
                    database, staged, layer.diff_id, digest, checked.count, compression
                )
                self._hold(database, "blob", digest)

    def compress_layer(
        self, diff_id: Digest, compression: str, progress: Progress | None = None
    ) -> tuple[Digest, int]:
        """A compressed blob of a layer: digest and size. Made once and kept; one that came is used.

        Args:
            compression: gzip or zstd.
            progress: is told of uncompressed bytes.
        """
        known = self.store.layer_blobs(diff_id).get(compression)
        if known is not None and self.use_blob(known[0]):
            return known
        from unionimage.store.ahead import Ahead

        work = self.scratch() / "blob"
        machine = compressions.compressor(compression)
        counter = CountingWriter()
        with (
            open(work, "wb") as output,
            open_layer_tar(self.store, self.store.layer(diff_id)) as archive,
        ):
            with Ahead(archive) as ahead:
                while data := ahead.read(CHUNK):
                    counter.write(output, machine.compress(data))
                    if progress:
                        progress(len(data))
            counter.write(output, machine.flush())
        digest = counter.digest
        with self.store.database.write() as database:
            self._record_blob(database, work, diff_id, digest, counter.size, compression)
            self._hold(database, "blob", digest)
        return digest, counter.size

    def commit_upper(
        self,
        upper: Path,
        below: Sequence[Digest] = (),
        *,
        newest_ns: int | None = None,
        leave_out: Set[bytes] = frozenset(),
        progress: Progress | None = None,
    ) -> Layer | None:
        """Store the changes in an upper directory as a layer. None: nothing was changed.

        Only `upper` is read, but for the contents of renamed directories (redirect) and of files
        of which only attributes changed (metacopy).

        Args:
            upper: an upper directory of unionfuse, kernel overlayfs or fuse-overlayfs, which must
                not change meanwhile; or a plain directory whose files are to be added.
            below: the layers it lies on, base first.
            newest_ns: later modification times are set to this (SOURCE_DATE_EPOCH).
            leave_out: paths in upper that are no part of the changes.
        """
        from unionimage.chain import Chain  # only needed here, and slow to import

        with Chain([upper, *self.store.chain_directories(below)]) as chain:
            pieces = pack_upper(chain, newest_ns=newest_ns, leave_out=leave_out)
            first = next(pieces)
            if first == tar.END:
                return None
            return self.add_layer(PieceStream(chained(first, pieces)), progress=progress)

    # --- images

    def add_image(
        self,
        config: ImageConfig | bytes,
        *,
        manifest: bytes | None = None,
        names: Iterable[Reference] = (),
        digests: Iterable[Reference] = (),
        parent: Digest | None = None,
    ) -> Image:
        """Make an image of layers that are there. This is the point at which it comes to be.

        Args:
            config: bytes are kept as they are; the image id is their digest.
            manifest: the manifest it came with.
            names: get to this image, also from another one that has them.
            digests: repository@digest it came as.
            parent: the image it was made from here.

        Raises:
            BadContent: config, manifest and layers disagree, or a layer is not there.
        """
        data = config if isinstance(config, bytes) else config.to_json()
        parsed = ImageConfig.from_json(data) if isinstance(config, bytes) else config
        if manifest is not None:
            self._compare(Manifest.from_json(manifest), data, parsed)
        identity = self.add_bytes(data)
        manifest_digest = None if manifest is None else self.add_bytes(manifest)
        names = [name.with_default_tag() for name in names]
        now = time.time()
        with self.store.database.write() as database:
            for diff_id in parsed.diff_ids:
                if self.store.find_layer(diff_id) is None:
                    raise BadContent(
                        f"image {identity.short} needs layer {diff_id}, which is not here"
                    )
            known = self.store.database.row("SELECT 1 FROM images WHERE id = ?", (identity,))
            if known is None:
                self._insert(database, identity, parsed, now)
            database.execute(
                "UPDATE images SET used = ?, manifest = coalesce(?, manifest),"
                " parent = coalesce(?, parent) WHERE id = ?",
                (now, manifest_digest, parent, identity),
            )
            self.store.write_chains(parsed.diff_ids, self._staging)
            database.executemany(
                "INSERT OR REPLACE INTO names VALUES (?, ?)",
                [(str(name), identity) for name in names],
            )
            database.executemany(
                "INSERT OR REPLACE INTO digests VALUES (?, ?)",
                [(str(one), identity) for one in digests],
            )
            return self.store.image_by_id(identity)  # another may remove it right after

    @staticmethod
    def _insert(
        database: sqlite3.Connection, identity: Digest, config: ImageConfig, now: float
    ) -> None:
        database.execute(
            "INSERT INTO images VALUES (?, NULL, NULL, ?, ?, ?, ?)",
            (identity, config.chain_id, config.created, now, now),
        )
        database.executemany(
            "INSERT INTO image_layers VALUES (?, ?, ?)",
            [(identity, n, diff_id) for n, diff_id in enumerate(config.diff_ids)],
        )
        database.executemany(
            "INSERT INTO history VALUES (?, ?, ?, ?, ?, ?, ?)",
            [
                (identity, n, step.created, step.created_by, step.author, step.comment, diff_id)
                for n, (step, diff_id) in enumerate(config.layer_steps(), 1)
            ],
        )

    def _compare(self, manifest: Manifest, config: bytes, parsed: ImageConfig) -> None:
        if manifest.config.digest != Digest.of(config):
            raise BadContent("the manifest names another config")
        if len(manifest.layers) != len(parsed.diff_ids):
            raise BadContent(
                f"the manifest has {len(manifest.layers)} layers, its config {len(parsed.diff_ids)}"
            )
        for layer, diff_id in zip(manifest.layers, parsed.diff_ids, strict=True):
            known = self.store.database.row(
                "SELECT diff_id FROM layer_blobs WHERE digest = ?", (layer.digest,)
            )
            plain = compression_of(layer.media_type) == "none" and layer.digest == diff_id
            if not plain and known is not None and known[0] != diff_id:
                raise BadContent(
                    f"layer {layer.digest} of the manifest is not what the config says"
                )

    # --- helpers

    def _hold(self, database: sqlite3.Connection, kind: str, key: str) -> None:
        database.execute("INSERT OR IGNORE INTO holds VALUES (?, ?, ?)", (self.owner, kind, key))

    def _durable(self) -> None:
        if self.store.config.durable:
            sync_file_system(self.store.root)


def _ahead(source: Readable, stream: Readable) -> AbstractContextManager[Readable]:
    """Read ahead, but for what is made here as it is read: that needs the same processor."""
    if isinstance(source, PieceStream):
        return nullcontext(stream)
    from unionimage.store.ahead import Ahead

    return Ahead(stream)
