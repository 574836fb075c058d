"""The value types of OCI images and of docker's schema 2: parsed, immutable, written canonically.

Everything here is a view of JSON that came from somewhere: digests are always of the bytes as they
came, so those are kept in the store and never written again from these values. What is not known
here is ignored; of configs, which are changed and written anew, it is kept (image_config.py).

Sources: OCI image-spec v1.1 (descriptor.md, manifest.md, image-index.md); docker image manifest v2
schema 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unionimage.digest import Digest
from unionimage.errors import BadContent
from unionimage.json_object import NO_MAP, dump, load_object, member, string_map, strings
from unionimage.tuples import NamedTuple

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP = OCI_LAYER + "+gzip"
OCI_LAYER_ZSTD = OCI_LAYER + "+zstd"
OCI_FOREIGN = "application/vnd.oci.image.layer.nondistributable.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_LAYER_GZIP = DOCKER_LAYER + ".gzip"
DOCKER_LAYER_ZSTD = DOCKER_LAYER + ".zstd"
DOCKER_FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar"

MANIFESTS = (OCI_MANIFEST, DOCKER_MANIFEST)
INDEXES = (OCI_INDEX, DOCKER_LIST)
CONFIGS = (OCI_CONFIG, DOCKER_CONFIG)


def compression_of(media_type: str) -> str:
    """`gzip`, `zstd` or `none` of a layer's media type.

    Raises:
        BadContent: a foreign layer, an encrypted one, or no layer at all.
    """
    if media_type.startswith((OCI_FOREIGN, DOCKER_FOREIGN)):
        raise BadContent(f"layers of type {media_type} are not distributed with their image")
    base, _, suffix = media_type.partition("+")
    if base == OCI_LAYER and suffix in ("", "gzip", "zstd"):
        return suffix or "none"
    if media_type.startswith(DOCKER_LAYER) and media_type[len(DOCKER_LAYER) :] in (
        "",
        ".gzip",
        ".zstd",
    ):
        return media_type[len(DOCKER_LAYER) + 1 :] or "none"
    raise BadContent(f"layers of type {media_type!r} are not supported")


class Platform(NamedTuple):
    """What an image runs on. Empty strings mean: not said."""

    os: str
    architecture: str
    variant: str = ""
    os_version: str = ""

    @classmethod
    def parse(cls, text: str) -> Platform:
        """`linux/arm64/v8`, `linux/amd64`, `arm64` (then linux). Raises BadContent."""
        parts = text.lower().split("/")
        if not all(parts) or len(parts) > 3:
            raise BadContent(f"{text!r} is not a platform (OS/ARCH[/VARIANT])")
        if len(parts) == 1:
            parts = [parts[0], host_architecture()[0]] if parts[0] == "linux" else ["linux", *parts]
        architecture, variant = normal_architecture(parts[1])
        return cls(parts[0], architecture, parts[2] if len(parts) == 3 else variant)

    @classmethod
    def host(cls) -> Platform:
        return cls("linux", *host_architecture())

    @classmethod
    def from_object(cls, table: Mapping[str, Any]) -> Platform:
        return cls(
            member(table, "os", str, "", "platform"),
            member(table, "architecture", str, "", "platform"),
            member(table, "variant", str, "", "platform"),
            member(table, "os.version", str, "", "platform"),
        )

    def to_object(self) -> dict[str, Any]:
        table = {"architecture": self.architecture, "os": self.os}
        if self.os_version:
            table["os.version"] = self.os_version
        if self.variant:
            table["variant"] = self.variant
        return table

    def satisfies(self, wanted: Platform) -> bool:
        """True if what is wanted is this; a variant is compared only where one is wanted."""
        if (self.os, self.architecture) != (wanted.os, wanted.architecture):
            return False
        if self.architecture == "arm64" and {self.variant, wanted.variant} <= {"", "v8"}:
            return True
        return not wanted.variant or self.variant == wanted.variant

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


_ARCHITECTURES = {
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "armv8l": ("arm64", ""),
    "armv7l": ("arm", "v7"),
    "armhf": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "armel": ("arm", "v6"),
    "i386": ("386", ""),
    "i686": ("386", ""),
}


def normal_architecture(name: str) -> tuple[str, str]:
    """Go's name and variant of an architecture (containerd, platforms/database.go)."""
    return _ARCHITECTURES.get(name, (name, ""))


def host_architecture() -> tuple[str, str]:
    import os

    return normal_architecture(os.uname().machine)


class Descriptor(NamedTuple):
    """Names a blob: its type, digest and size in bytes."""

    media_type: str
    digest: Digest
    size: int
    platform: Platform | None = None
    annotations: Mapping[str, str] = NO_MAP
    urls: tuple[str, ...] = ()

    @classmethod
    def of(cls, media_type: str, data: bytes) -> Descriptor:
        """The descriptor of these bytes."""
        return cls(media_type, Digest.of(data), len(data))

    @classmethod
    def from_object(cls, table: Any, what: str = "descriptor") -> Descriptor:
        if not isinstance(table, dict):
            raise BadContent(f"{what} is not a JSON object")
        size = member(table, "size", int, None, what)
        if size < 0:
            raise BadContent(f"{what} has a negative size")
        platform = table.get("platform")
        return cls(
            member(table, "mediaType", str, None, what),
            Digest(member(table, "digest", str, None, what)),
            size,
            Platform.from_object(platform) if isinstance(platform, dict) else None,
            string_map(table, "annotations", what),
            strings(table, "urls", what),
        )

    def to_object(self) -> dict[str, Any]:
        table: dict[str, Any] = {
            "mediaType": self.media_type,
            "digest": self.digest,
            "size": self.size,
        }
        if self.urls:
            table["urls"] = list(self.urls)
        if self.annotations:
            table["annotations"] = dict(self.annotations)
        if self.platform:
            table["platform"] = self.platform.to_object()
        return table


class Manifest(NamedTuple):
    """An image manifest, OCI or docker schema 2 (`media_type` says which)."""

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = NO_MAP

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Raises BadContent if this is no manifest of an image that is supported."""
        table = load_object(data, "manifest")
        if table.get("schemaVersion") != 2:
            raise BadContent(
                "manifest is not of schema version 2; push the image again with a newer tool"
            )
        media_type = member(table, "mediaType", str, OCI_MANIFEST, "manifest")
        if media_type not in MANIFESTS or "manifests" in table:
            raise BadContent(f"manifest type {media_type!r} is not an image")
        config = Descriptor.from_object(table.get("config"), "manifest: config")
        if config.media_type not in CONFIGS:
            raise BadContent(f"{config.media_type!r} is no image config: this is another artifact")
        layers = member(table, "layers", list, [], "manifest")
        return cls(
            media_type,
            config,
            tuple(Descriptor.from_object(layer, "manifest: layer") for layer in layers),
            string_map(table, "annotations", "manifest"),
        )

    def to_json(self) -> bytes:
        table: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": self.media_type,
            "config": self.config.to_object(),
            "layers": [layer.to_object() for layer in self.layers],
        }
        if self.annotations:
            table["annotations"] = dict(self.annotations)
        return dump(table)


class Index(NamedTuple):
    """An OCI image index or docker manifest list: one manifest for each platform."""

    media_type: str
    manifests: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = NO_MAP

    @classmethod
    def from_json(cls, data: bytes) -> Index:
        table = load_object(data, "index")
        media_type = member(table, "mediaType", str, OCI_INDEX, "index")
        if table.get("schemaVersion") != 2 or media_type not in INDEXES or "layers" in table:
            raise BadContent(f"{media_type!r} is not an image index")
        manifests = member(table, "manifests", list, None, "index")
        return cls(
            media_type,
            tuple(Descriptor.from_object(one, "index: manifest") for one in manifests),
            string_map(table, "annotations", "index"),
        )

    def to_json(self) -> bytes:
        table: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": self.media_type,
            "manifests": [one.to_object() for one in self.manifests],
        }
        if self.annotations:
            table["annotations"] = dict(self.annotations)
        return dump(table)

    def images(self) -> tuple[Descriptor, ...]:
        """The manifests of images; attestations, whose platform is `unknown`, are left out."""
        return tuple(
            one for one in self.manifests if one.platform is None or one.platform.os != "unknown"
        )

    def select(self, wanted: Platform) -> Descriptor:
        """The manifest for a platform, an exact variant first. Raises BadContent if none fits."""
        fitting = [one for one in self.manifests if one.platform and one.platform.satisfies(wanted)]
        if not fitting and len(self.manifests) == 1 and self.manifests[0].platform is None:
            return self.manifests[0]
        if not fitting:
            there = ", ".join(sorted({str(one.platform) for one in self.manifests if one.platform}))
            raise BadContent(f"no image for platform {wanted}; there are: {there or 'none'}")
        exact = [one for one in fitting if one.platform and one.platform.variant == wanted.variant]
        return (exact or fitting)[0]


def parse_manifest(data: bytes, media_type: str = "") -> Manifest | Index:
    """Parse a manifest or an index, whichever it is. Raises BadContent."""
    table = load_object(data, "manifest")
    named = table.get("mediaType") or media_type
    if named in INDEXES or (named not in MANIFESTS and "manifests" in table):
        return Index.from_json(data)
    return Manifest.from_json(data)
