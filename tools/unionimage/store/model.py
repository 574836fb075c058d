"""What the store hands out: layers and images. They are snapshots; a change gives a new one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from unionimage.digest import Digest
from unionimage.reference import Reference
from unionimage.tuples import NamedTuple

if TYPE_CHECKING:
    from unionimage.image_config import History, ImageConfig
    from unionimage.spec import Manifest
    from unionimage.store.blobs import Blobs


class Layer(NamedTuple):
    """An unpacked layer.

    Attributes:
        tar_size: bytes of its uncompressed tar.
        size: bytes of its files.
        entries: entries of its tar.
        recipe: whether its tar comes from a recipe; else from a blob.
        directory: its files, ready to be a lower directory.
    """

    diff_id: Digest
    tar_size: int
    size: int
    entries: int
    recipe: bool
    directory: Path


class _Image(NamedTuple):
    id: Digest
    manifest_digest: Digest | None
    parent: Digest | None
    created: str
    added: float
    used: float
    names: tuple[Reference, ...]
    digests: tuple[Reference, ...]
    layers: tuple[Layer, ...]
    blobs: Blobs


class Image(_Image):
    """An image in the store.

    Attributes:
        id: digest of its config.
        manifest_digest: of the manifest it came with or was pushed with; None if it has none.
        parent: the image it was made from here.
        created: RFC 3339 or empty. added, used: seconds since the epoch.
        names: its tags, sorted. digests: repository@digest it was pulled or pushed as.
        layers: base first.
        blobs: where its config and manifest are read from.
    """

    @property
    def diff_ids(self) -> tuple[Digest, ...]:
        return tuple(layer.diff_id for layer in self.layers)

    @property
    def size(self) -> int:
        """Bytes of all files in all layers, docker's SIZE."""
        return sum(layer.size for layer in self.layers)

    @cached_property
    def config_bytes(self) -> bytes:
        return self.blobs.read(self.id)

    @cached_property
    def config(self) -> ImageConfig:
        from unionimage.image_config import ImageConfig  # listings do without it

        return ImageConfig.from_json(self.config_bytes)

    @property
    def chain_id(self) -> Digest | None:
        return self.config.chain_id

    def manifest_bytes(self) -> bytes | None:
        """The manifest as it came, or None."""
        return None if self.manifest_digest is None else self.blobs.read(self.manifest_digest)

    def manifest(self) -> Manifest | None:
        from unionimage.spec import Manifest

        data = self.manifest_bytes()
        return None if data is None else Manifest.from_json(data)

    def steps(self) -> Sequence[tuple[History, Layer | None]]:
        """The history, the oldest first, each step with the layer it made."""
        layers = iter(self.layers)
        return [
            (step, None if diff_id is None else next(layers))
            for step, diff_id in self.config.layer_steps()
        ]

    @property
    def title(self) -> str:
        """How messages name it: its first name, or its short id."""
        return self.names[0].familiar if self.names else self.id.short
