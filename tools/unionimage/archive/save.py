"""Images in the store → one archive. The same images saved twice are the same bytes.

Layers and configs go out with the digests they came in with: a layer whose compressed blob was
kept leaves an OCI archive in that form, any other as the plain tar. Docker's archive has plain
tars.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from unionimage.changeset import tar
from unionimage.digest import CHUNK, Digest, Readable
from unionimage.errors import UserError
from unionimage.json_object import dump
from unionimage.progress import Reporter, Silent, Task
from unionimage.reference import Reference
from unionimage.spec import (
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_LAYER_GZIP,
    OCI_LAYER_ZSTD,
    OCI_MANIFEST,
    Descriptor,
    Index,
    Manifest,
)
from unionimage.store import Image, Layer, Store, platforms
from unionimage.store.platforms import Platforms
from unionimage.tuples import NamedTuple

FORMATS = ("docker-archive", "oci-archive", "oci-dir")

_COMPRESSED = {"gzip": OCI_LAYER_GZIP, "zstd": OCI_LAYER_ZSTD}
_LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
_ONE_NAME = "org.opencontainers.image.ref.name"
_FULL_NAME = "io.containerd.image.name"


class Wanted(NamedTuple):
    """An image to save, and the names it has in the archive."""

    image: Image
    names: tuple[Reference, ...]


class _Sink(Protocol):
    """Where members go."""

    def add(self, name: str, data: bytes) -> None: ...

    def stream(self, name: str, stream: Readable, size: int, task: Task) -> None: ...


def save(
    store: Store,
    wanted: Sequence[Wanted],
    form: str,
    output: BinaryIO | Path,
    report: Reporter | None = None,
) -> None:
    """Write images to an archive.

    Args:
        form: one of FORMATS.
        output: an open file, or for `oci-dir` a directory that does not exist or is empty.

    Raises:
        BadContent: the store is damaged.
    """
    report = report or Silent()
    if isinstance(output, Path):
        _save_layout(store, wanted, _Directory(output), report)
        return
    sink = _Archive(output)
    if form == "docker-archive":
        _save_docker(store, wanted, sink, report)
    else:
        _save_layout(store, wanted, sink, report)
    sink.finish()


# --- docker's archive


def _save_docker(store: Store, wanted: Sequence[Wanted], sink: _Sink, report: Reporter) -> None:
    done: set[Digest] = set()
    for one in wanted:
        for layer in one.image.layers:
            if layer.diff_id not in done:
                done.add(layer.diff_id)
                _plain(store, layer, f"{layer.diff_id.hex}.tar", sink, report)
    for identity in dict.fromkeys(one.image.id for one in wanted):
        sink.add(f"{identity.hex}.json", store.blobs.read(identity))
    manifest = [
        {
            "Config": f"{one.image.id.hex}.json",
            "RepoTags": [name.familiar for name in one.names] or None,
            "Layers": [f"{diff_id.hex}.tar" for diff_id in one.image.diff_ids],
        }
        for one in wanted
    ]
    sink.add("manifest.json", dump(manifest))
    repositories: dict[str, dict[str, str]] = {}
    for one in wanted:
        for name in one.names:
            tags = repositories.setdefault(name.familiar_repository, {})
            tags[name.tag or ""] = (one.image.diff_ids or (one.image.id,))[-1].hex
    sink.add("repositories", dump(repositories))


def _plain(store: Store, layer: Layer, name: str, sink: _Sink, report: Reporter) -> None:
    task = report.task(layer.diff_id.short, "Saving", layer.tar_size)
    with store.layer_tar(layer.diff_id) as stream:
        sink.stream(name, stream, layer.tar_size, task)
    task.done("Saved")


# --- the OCI layout


def _save_layout(store: Store, wanted: Sequence[Wanted], sink: _Sink, report: Reporter) -> None:
    sink.add("oci-layout", _LAYOUT)
    layout = _Layout(store, sink, report)
    listed: list[Descriptor] = []
    for one in wanted:
        if not one.names:
            listed.append(layout.image(one.image))
        for name in one.names:
            named = platforms.of(store, name)
            described = layout.image(one.image) if named is None else layout.platforms(named)
            annotations = {_FULL_NAME: str(name), _ONE_NAME: str(name)}
            listed.append(described._replace(annotations=annotations))
    sink.add("index.json", Index(OCI_INDEX, tuple(listed)).to_json())


class _Layout:
    """Puts blobs into an OCI layout, each once."""

    def __init__(self, store: Store, sink: _Sink, report: Reporter) -> None:
        self._store, self._sink, self._report = store, sink, report
        self._done: set[Digest] = set()

    def image(self, image: Image) -> Descriptor:
        """An image with its layers; the descriptor of its manifest."""
        data, manifest = manifest_of(self._store, image)
        for layer, descriptor in zip(image.layers, manifest.layers, strict=True):
            if descriptor.digest not in self._done:
                self._done.add(descriptor.digest)
                _layer_blob(self._store, layer, descriptor, self._sink, self._report)
        for blob in (self._store.blobs.read(image.id), data):
            self._blob(blob)
        described = Descriptor.of(manifest.media_type, data)
        return described._replace(platform=image.config.platform)

    def platforms(self, named: Platforms) -> Descriptor:
        """The images of all platforms that a name stands for, and their index."""
        described = [self.image(one) for one in named.images]
        data, media_type = named.data, named.index.media_type
        if {one.digest for one in described} != {one.digest for one in named.index.manifests}:
            media_type = OCI_INDEX
            data = Index(media_type, tuple(described)).to_json()
        self._blob(data)
        return Descriptor.of(media_type, data)

    def _blob(self, data: bytes) -> None:
        if (digest := Digest.of(data)) not in self._done:
            self._done.add(digest)
            self._sink.add(_blob_name(digest), data)


def manifest_of(store: Store, image: Image) -> tuple[bytes, Manifest]:
    """The manifest under which an image leaves the store as OCI: the one it came with where all its
    blobs are here, else one of the blobs and plain tars that are."""
    data = image.manifest_bytes()
    if data is not None:
        manifest = Manifest.from_json(data)
        if manifest.media_type == OCI_MANIFEST and all(
            store.blobs.has(layer.digest) or layer.digest == diff_id
            for layer, diff_id in zip(manifest.layers, image.diff_ids, strict=True)
        ):
            return data, manifest
    config = Descriptor(OCI_CONFIG, image.id, store.blobs.size(image.id))
    manifest = Manifest(OCI_MANIFEST, config, tuple(_describe(store, one) for one in image.layers))
    return manifest.to_json(), manifest


def _describe(store: Store, layer: Layer) -> Descriptor:
    for compression, (digest, size) in sorted(store.layer_blobs(layer.diff_id).items()):
        return Descriptor(_COMPRESSED[compression], digest, size)
    return Descriptor(OCI_LAYER, layer.diff_id, layer.tar_size)


def _layer_blob(
    store: Store, layer: Layer, descriptor: Descriptor, sink: _Sink, report: Reporter
) -> None:
    name = _blob_name(descriptor.digest)
    if descriptor.digest == layer.diff_id:
        _plain(store, layer, name, sink, report)
        return
    task = report.task(layer.diff_id.short, "Saving", descriptor.size)
    with store.blobs.open(descriptor.digest) as blob:
        sink.stream(name, blob, descriptor.size, task)
    task.done("Saved")


def _blob_name(digest: Digest) -> str:
    return f"blobs/sha256/{digest.hex}"


# --- sinks


class _Archive:
    """A tar whose members have no owner and no time."""

    def __init__(self, output: BinaryIO) -> None:
        self._output = output

    def add(self, name: str, data: bytes) -> None:
        self._output.write(_header(name, len(data)) + data + tar.padding(len(data)))

    def stream(self, name: str, stream: Readable, size: int, task: Task) -> None:
        self._output.write(_header(name, size))
        for data in _pieces(stream):
            self._output.write(data)
            task.advance(len(data))
        self._output.write(tar.padding(size))

    def finish(self) -> None:
        self._output.write(tar.END)
        self._output.flush()


class _Directory:
    """A directory, in which each file appears whole. `index.json` comes last."""

    def __init__(self, path: Path) -> None:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} is there already and not an empty directory")
        (path / "blobs/sha256").mkdir(parents=True, exist_ok=True)
        self._path = path

    def add(self, name: str, data: bytes) -> None:
        self._write(name, [data])

    def stream(self, name: str, stream: Readable, size: int, task: Task) -> None:
        def pieces() -> Iterator[bytes]:
            for data in _pieces(stream):
                task.advance(len(data))
                yield data

        self._write(name, pieces())

    def _write(self, name: str, pieces: Iterator[bytes] | list[bytes]) -> None:
        staged = self._path / (name + ".part")
        with open(staged, "wb") as output:
            for data in pieces:
                output.write(data)
        os.rename(staged, self._path / name)


def _header(name: str, size: int) -> bytes:
    return tar.header(tar.Entry(name.encode(), tar.FILE, 0o644, size=size))


def _pieces(stream: Readable) -> Iterator[bytes]:
    while data := stream.read(CHUNK):
        yield data
