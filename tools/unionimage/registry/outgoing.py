"""An image as it leaves the store: which blob stands for each layer, and under which manifest.

What came from elsewhere leaves as it came, byte for byte, so that digests stay the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

from unionimage.digest import Digest, Readable
from unionimage.spec import (
    DOCKER_CONFIG,
    DOCKER_LAYER,
    DOCKER_LAYER_GZIP,
    DOCKER_LAYER_ZSTD,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_LAYER_GZIP,
    OCI_LAYER_ZSTD,
    OCI_MANIFEST,
    Descriptor,
    Manifest,
    parse_manifest,
)
from unionimage.store import Image, Lease, Store
from unionimage.tuples import NamedTuple

LAYER_TYPES = {
    (OCI_MANIFEST, "none"): OCI_LAYER,
    (DOCKER_MANIFEST, "none"): DOCKER_LAYER,
    (OCI_MANIFEST, "gzip"): OCI_LAYER_GZIP,
    (OCI_MANIFEST, "zstd"): OCI_LAYER_ZSTD,
    (DOCKER_MANIFEST, "gzip"): DOCKER_LAYER_GZIP,
    (DOCKER_MANIFEST, "zstd"): DOCKER_LAYER_ZSTD,
}


class Wanted(NamedTuple):
    """How the image shall look in the registry; None: as it came, else OCI with gzip."""

    manifest_type: str | None = None
    compression: str | None = None

    @property
    def anything(self) -> bool:
        return self.manifest_type is None and self.compression is None

    @property
    def index_type(self) -> str | None:
        """The kind of index that goes with such manifests; None: any."""
        return {OCI_MANIFEST: OCI_INDEX, DOCKER_MANIFEST: DOCKER_LIST}.get(self.manifest_type or "")


AS_IT_IS = Wanted()


class Outgoing:
    """An image as it is sent: under its own manifest, or a new one."""

    def __init__(self, store: Store, lease: Lease, image: Image, wanted: Wanted) -> None:
        self.store, self.lease, self.image, self.wanted = store, lease, image, wanted
        self.original = self._original() if wanted.anything else None

    def keys(self) -> Sequence[Digest]:
        """For each layer, base first, what tells its blob from others: equal ones are sent once."""
        if self.original is not None:
            return [layer.digest for layer in self.original[1].layers]
        return self.image.diff_ids

    def known(self, position: int) -> list[Descriptor]:
        """The blobs that a layer may be in a registry as, so far as they are known already.

        They need not be in the store: `layer` makes sure of one.
        """
        if self.original is not None:
            return [self.original[1].layers[position]]
        compression, media_type = self._form()
        diff_id = self.image.diff_ids[position]
        if compression == "none":
            return [Descriptor(media_type, diff_id, self.store.layer(diff_id).tar_size)]
        known = self.store.known_forms(diff_id, compression)
        return [Descriptor(media_type, digest, size) for digest, size in known]

    def layer(self, position: int) -> Descriptor:
        """The blob of a layer; compresses it if it has none yet."""
        compression, media_type = self._form()
        if self.original is not None or compression == "none":
            return self.known(position)[0]
        diff_id = self.image.diff_ids[position]
        return Descriptor(media_type, *self.lease.compress_layer(diff_id, compression))

    def _form(self) -> tuple[str, str]:
        """Compression and media type of layers that do not leave as they came."""
        compression = self.wanted.compression or "gzip"
        return compression, LAYER_TYPES[self.wanted.manifest_type or OCI_MANIFEST, compression]

    def open_layer(self, position: int, blob: Descriptor) -> AbstractContextManager[Readable]:
        """The bytes of a layer's blob; an uncompressed one may exist only as its files.

        A compressed blob is *not* verified here: whoever receives it verifies it.
        """
        if self.store.blobs.has(blob.digest):
            return open(self.store.blobs.path(blob.digest), "rb")
        return self.store.layer_tar(self.image.diff_ids[position])

    def manifest(self, layers: Iterable[Descriptor]) -> tuple[str, bytes]:
        """Media type and bytes of the manifest."""
        if self.original is not None:
            return self.original[1].media_type, self.original[0]
        media_type = self.wanted.manifest_type or OCI_MANIFEST
        config_type = DOCKER_CONFIG if media_type == DOCKER_MANIFEST else OCI_CONFIG
        config = Descriptor.of(config_type, self.image.config_bytes)
        return media_type, Manifest(media_type, config, tuple(layers)).to_json()

    def _original(self) -> tuple[bytes, Manifest] | None:
        """The manifest that the image came with, if all its blobs can still be had."""
        if self.image.manifest_digest is None:
            return None
        data = self.image.manifest_bytes()
        manifest = parse_manifest(data) if data else None
        if not isinstance(manifest, Manifest) or len(manifest.layers) != len(self.image.diff_ids):
            return None
        for layer, diff_id in zip(manifest.layers, self.image.diff_ids, strict=True):
            if layer.digest != diff_id and not self.lease.use_blob(layer.digest):
                return None
        return (data, manifest) if data else None
