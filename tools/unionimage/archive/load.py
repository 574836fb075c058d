"""Archives → images in the store: docker's archive (three forms) and the OCI image layout.

Sources: docker's image spec v1.2 (manifest.json, repositories, VERSION/json/layer.tar); OCI
image-spec, image-layout.md; containerd's annotation `io.containerd.image.name`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from unionimage.archive import legacy
from unionimage.archive.sources import DirectorySource, FileSource, Source, StreamSource
from unionimage.changeset import compression as compressions
from unionimage.digest import Digest, Readable
from unionimage.errors import BadContent, UserError
from unionimage.image_config import ImageConfig
from unionimage.progress import Reporter, Silent
from unionimage.reference import Reference
from unionimage.spec import (
    INDEXES,
    MANIFESTS,
    Descriptor,
    Index,
    Manifest,
    Platform,
    parse_manifest,
)
from unionimage.store import Image, Lease, platforms

_REF_NAME = "org.opencontainers.image.ref.name"
_FULL_NAME = "io.containerd.image.name"


def load(
    lease: Lease,
    path: Path | None,
    stream: BinaryIO | None = None,
    report: Reporter | None = None,
    *,
    every_platform: bool = False,
) -> list[Image]:
    """Load every image of an archive; each with the names that the archive gives it.

    Args:
        every_platform: of an index all images that are in the archive; else this machine's.
        path: a file (compressed or not) or an OCI layout directory.
        stream: read instead of a file, once from front to end.

    Raises:
        BadContent: it is no image archive, or a damaged or hostile one. Nothing was added.
        UserError: it cannot be read.
    """
    report = report or Silent()
    if path is not None and path.is_dir():
        return load_source(lease, DirectorySource(path, lease, report), every_platform)
    if path is not None:
        with open(path, "rb", buffering=0) as file:
            if compressions.sniff(file.read(6)) == "none" and file.seekable():
                file.seek(0)
                return load_source(lease, FileSource(file, lease, report), every_platform)
        with open(path, "rb", buffering=0) as file:
            return _load_stream(lease, file, report, every_platform)
    assert stream is not None
    return _load_stream(lease, stream, report, every_platform)


def _load_stream(
    lease: Lease, stream: Readable, report: Reporter, every_platform: bool
) -> list[Image]:
    peekable = compressions.Peekable(stream)
    kind = compressions.sniff(peekable.peek(6))
    plain = compressions.decompress(peekable, kind, "archive")
    return load_source(lease, StreamSource(plain, lease, report), every_platform)


def load_source(lease: Lease, source: Source, every_platform: bool = False) -> list[Image]:
    """Load from a source whose form is found out here."""
    if source.text("index.json") is not None and source.text("oci-layout") is not None:
        return _load_layout(lease, source, every_platform)
    if (data := source.text("manifest.json")) is not None:
        return [_load_docker(lease, source, one) for one in _docker_manifests(data)]
    if any(name.endswith("/layer.tar") for name in source.names()):
        return [_named(*loaded) for loaded in legacy.load(lease, source)]
    raise BadContent("no image in the archive: neither manifest.json nor index.json is there")


# --- docker's archive


def _docker_manifests(data: bytes) -> list[dict[str, Any]]:
    try:
        table = json.loads(data)
    except (ValueError, RecursionError):
        raise BadContent("manifest.json in the archive is not JSON") from None
    if not isinstance(table, list) or not all(isinstance(one, dict) for one in table):
        raise BadContent("manifest.json in the archive is not a list of images")
    for one in table:
        layers = one.get("Layers") or []
        names = [one.get("Config"), *layers] if isinstance(layers, list) else [None]
        tags = one.get("RepoTags") or []
        if not all(isinstance(name, str) for name in [*names, *tags]):
            raise BadContent("manifest.json in the archive names no config or layers")
    return table


def _load_docker(lease: Lease, source: Source, table: dict[str, Any]) -> Image:
    data = source.text(table["Config"])
    if data is None:
        raise BadContent(f"the archive lacks {table['Config']}")
    config = ImageConfig.from_json(data)
    layers = table.get("Layers") or []
    if len(layers) != len(config.diff_ids):
        raise BadContent(
            f"the archive has {len(layers)} layers for an image of {len(config.diff_ids)}"
        )
    for name, diff_id in zip(layers, config.diff_ids, strict=True):
        source.layer(name, diff_id, None, None)
    names = _references(table.get("RepoTags") or [])
    return _named(lease.add_image(data, names=names), names)


def _named(image: Image, names: Sequence[Reference]) -> Image:
    return image._replace(names=tuple(names))


def _references(names: Sequence[str]) -> list[Reference]:
    return [Reference.parse(name).with_default_tag() for name in names]


# --- the OCI layout


def _load_layout(lease: Lease, source: Source, every_platform: bool) -> list[Image]:
    data = source.text("index.json")
    assert data is not None
    index = Index.from_json(data)
    tags = _docker_tags(source)
    images = []
    for descriptor in index.manifests:
        if descriptor.media_type in INDEXES:
            images += _load_index(lease, source, descriptor, tags, every_platform)
        elif descriptor.media_type not in MANIFESTS:
            raise BadContent(f"{descriptor.media_type!r} in index.json is no image")
        elif descriptor in index.images():
            images.append(_load_manifest(lease, source, descriptor, descriptor, tags))
    if not images:
        raise BadContent(f"the archive has no image for platform {Platform.host()}")
    return images


def _load_index(
    lease: Lease,
    source: Source,
    named: Descriptor,
    tags: dict[str, list[str]],
    every_platform: bool,
) -> list[Image]:
    """The image of an index that is for this machine, or all that are in the archive."""
    data = _blob(source, named)
    index = parse_manifest(data, named.media_type)
    if not isinstance(index, Index):
        raise BadContent(f"blob {named.digest} is not the index it should be")
    if not every_platform:
        return [_load_manifest(lease, source, index.select(Platform.host()), named, tags)]
    nameless = named._replace(annotations={})
    images = [
        _load_manifest(lease, source, one, nameless, {})
        for one in index.images()
        if source.text(_blob_name(one.digest)) is not None
    ]
    if not images:
        raise BadContent("the archive has none of the images of its index")
    kept = lease.add_bytes(data)
    names = _names(named)
    for name in names:
        platforms.note(lease.store, name, kept, images)
    return [_named(lease.store.image_by_id(image.id), names) for image in images]


def _load_manifest(
    lease: Lease,
    source: Source,
    descriptor: Descriptor,
    named: Descriptor,
    tags: dict[str, list[str]],
) -> Image:
    data = _blob(source, descriptor)
    manifest = parse_manifest(data, descriptor.media_type)
    if not isinstance(manifest, Manifest):
        raise BadContent(f"blob {descriptor.digest} is not the manifest it should be")
    config_bytes = _blob(source, manifest.config)
    config = ImageConfig.from_json(config_bytes)
    if len(manifest.layers) != len(config.diff_ids):
        raise BadContent(
            f"the manifest has {len(manifest.layers)} layers, its config {len(config.diff_ids)}"
        )
    for layer, diff_id in zip(manifest.layers, config.diff_ids, strict=True):
        source.layer(_blob_name(layer.digest), diff_id, layer.digest, layer.size)
    names = _names(named) or _references(tags.get(manifest.config.digest, []))
    return _named(lease.add_image(config_bytes, manifest=data, names=names), names)


def _names(descriptor: Descriptor) -> list[Reference]:
    """The names that an index gives an image. A bare tag says nothing of a repository."""
    full = descriptor.annotations.get(_FULL_NAME)
    name = full or descriptor.annotations.get(_REF_NAME, "")
    if not full and "/" not in name and ":" not in name:
        return []
    try:
        return [Reference.parse(name).with_default_tag()]
    except UserError:
        return []


def _docker_tags(source: Source) -> dict[str, list[str]]:
    """Config digest -> names, from the manifest.json that newer dockers write beside the layout."""
    data = source.text("manifest.json")
    if data is None:
        return {}
    return {
        f"sha256:{os.path.basename(one['Config']).removesuffix('.json')}": one.get("RepoTags") or []
        for one in _docker_manifests(data)
    }


def _blob_name(digest: Digest) -> str:
    return f"blobs/sha256/{digest.hex}"


def _blob(source: Source, descriptor: Descriptor) -> bytes:
    data = source.text(_blob_name(descriptor.digest))
    if data is None:
        raise BadContent(f"the archive lacks blob {descriptor.digest}")
    if len(data) != descriptor.size or Digest.of(data) != descriptor.digest:
        raise BadContent(f"blob {descriptor.digest} in the archive is damaged")
    return data
