"""Pull: an image from a registry into the store.

Layers are fetched side by side and streamed into the store, which verifies and unpacks them as they
come; what is there is not fetched, and what a broken pull left is continued.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from unionimage.digest import Digest
from unionimage.errors import BadContent, UserError
from unionimage.image_config import ImageConfig
from unionimage.progress import Reporter, Task
from unionimage.reference import Reference
from unionimage.registry.client import RawManifest, Repository
from unionimage.registry.errors import RegistryError, RegistryStatusError
from unionimage.registry.session import Session
from unionimage.spec import Descriptor, Index, Manifest, Platform, compression_of, parse_manifest
from unionimage.store import Image, Lease, Store, platforms
from unionimage.tuples import NamedTuple

_T = TypeVar("_T")


class Pulled(NamedTuple):
    """What a pull did. `digest` is of what the tag points at, be it a manifest or an index."""

    reference: Reference
    image: Image
    digest: Digest
    is_new: bool


class _Found(NamedTuple):
    """An image in a repository, chosen for a platform, with its config verified."""

    repository: Repository
    top_digest: Digest
    raw: RawManifest
    manifest: Manifest
    config_bytes: bytes
    config: ImageConfig

    def layers(self) -> Iterator[tuple[Descriptor, Digest]]:
        """Each different layer once: the blob and its diffID."""
        pairs = zip(self.manifest.layers, self.config.diff_ids, strict=True)
        yield from {diff_id: (layer, diff_id) for layer, diff_id in pairs}.values()


def pull(
    store: Store,
    session: Session,
    reference: Reference,
    report: Reporter,
    platform: Platform | None = None,
) -> Pulled:
    """Pull one image, by tag or digest.

    Args:
        reference: with a tag or a digest; with both, the tag is not given, as with docker.
        platform: which image of an index; this machine's if None.

    Raises:
        UserError: the registry or what it sent cannot be used; the store is as it was.
    """
    wanted = reference.digest or reference.tag
    assert wanted is not None
    report.line(f"{wanted}: Pulling from {reference.path}")
    if (unchanged := _unchanged(store, session, reference, platform)) is not None:
        return unchanged
    found = _find(session, reference, wanted, platform)
    with store.lease(f"pull {reference.familiar}") as lease:
        before = store.find(str(reference)) if reference.tag else None
        is_new = before is None or before.id != found.manifest.config.digest
        missing = [pair for pair in found.layers() if lease.use_layer(pair[1]) is None]
        if missing:
            _fetch_layers(session, found, missing, lease, report)
        by_digest = Reference(reference.registry, reference.path, None, found.top_digest)
        image = lease.add_image(
            found.config_bytes,
            manifest=found.raw.data,
            names=[] if reference.digest else [reference],
            digests=[by_digest],
        )
    return Pulled(reference, image, found.top_digest, is_new)


def pull_platforms(
    store: Store, session: Session, reference: Reference, report: Reporter
) -> Pulled:
    """Pull the image of every platform that an index has; its name then stands for all of them.

    Where the tag is of one image alone, that is pulled.
    """
    wanted = reference.digest or reference.tag
    assert wanted is not None
    top = _from_any(session, reference, lambda source: source.manifest(wanted))
    index = parse_manifest(top.data, top.media_type)
    if not isinstance(index, Index):
        return pull(store, session, reference, report)
    if not index.images():
        raise BadContent(f"{reference.familiar}: the index has no image")
    with store.lease(f"pull {reference.familiar}") as lease:
        before = store.find(str(reference)) if reference.tag else None
        images = []
        for one in index.images():
            report.line(f"Platform: {one.platform or 'unknown'}")
            by_digest = Reference(reference.registry, reference.path, None, one.digest)
            images.append(pull(store, session, by_digest, report).image)
        if reference.digest is None:
            image = platforms.note(store, reference, lease.add_bytes(top.data), images)
        else:
            image = images[0]
        store.note_digest(
            image, Reference(reference.registry, reference.path, None, top.digest), None
        )
        is_new = before is None or before.id != image.id
        return Pulled(reference, store.image_by_id(image.id), top.digest, is_new)


def pull_all(
    store: Store,
    session: Session,
    reference: Reference,
    report: Reporter,
    platform: Platform | None = None,
) -> Iterator[Pulled]:
    """Pull every tag of a repository, one after the other, as the results are asked for."""
    tags = list(session.repository(reference).tags())
    if not tags:
        raise RegistryError(reference.familiar_repository, "has no tags", "check the name")
    for tag in tags:
        yield pull(store, session, reference._replace(tag=tag, digest=None), report, platform)


def _unchanged(
    store: Store, session: Session, reference: Reference, platform: Platform | None
) -> Pulled | None:
    """The image that is here already, if the registry still means it by this name.

    It is asked by HEAD alone, which public registries do not count as a pull.
    """
    image = store.find(str(reference))
    digest = reference.digest
    try:
        if image is None or not image.config.platform.satisfies(platform or Platform.host()):
            return None
        if digest is None and reference.tag:
            digest = session.sources(reference)[0].manifest_digest(reference.tag)
    except UserError:
        return None  # a pull will say more
    known = Reference(reference.registry, reference.path, None, digest)
    if digest is None or known not in image.digests:
        return None
    store.touch(image)
    return Pulled(reference, image, digest, is_new=False)


def _find(
    session: Session, reference: Reference, wanted: str | Digest, platform: Platform | None
) -> _Found:
    return _from_any(
        session, reference, lambda source: _find_in(source, reference, wanted, platform)
    )


def _from_any(session: Session, reference: Reference, get: Callable[[Repository], _T]) -> _T:
    """From the first source that has it: mirrors may fail, the registry may not."""
    *mirrors, home = session.sources(reference)
    for mirror in mirrors:
        try:
            return get(mirror)
        except UserError:
            continue
    try:
        return get(home)
    except RegistryStatusError as error:
        raise _explain(error, reference) from error


def _find_in(
    repository: Repository, reference: Reference, wanted: str | Digest, platform: Platform | None
) -> _Found:
    top = raw = repository.manifest(wanted)
    parsed = parse_manifest(raw.data, raw.media_type)
    if isinstance(parsed, Index):
        chosen = parsed.select(platform or Platform.host())
        raw = repository.manifest(chosen.digest)
        if len(raw.data) != chosen.size:
            raise BadContent(f"{repository}: manifest {chosen.digest} has not {chosen.size} bytes")
        parsed = parse_manifest(raw.data, raw.media_type)
        if isinstance(parsed, Index):
            raise BadContent(f"{repository}: the index {top.digest} holds another index")
    for layer in parsed.layers:
        compression_of(layer.media_type)
    config_bytes = repository.small_blob(parsed.config)
    config = ImageConfig.from_json(config_bytes)
    if len(config.diff_ids) != len(parsed.layers):
        raise BadContent(
            f"{repository}: the manifest has {len(parsed.layers)} layers, "
            f"its config {len(config.diff_ids)}"
        )
    if platform is not None and not config.platform.satisfies(platform):
        raise UserError(
            f"{reference.familiar}: was found but does not match the specified platform: "
            f"wanted {platform}, actual {config.platform}"
        )
    return _Found(repository, top.digest, raw, parsed, config_bytes, config)


def _fetch_layers(
    session: Session,
    found: _Found,
    missing: Sequence[tuple[Descriptor, Digest]],
    lease: Lease,
    report: Reporter,
) -> None:
    """Fetch the missing layers side by side; the others are shown too, as docker does."""
    jobs = []
    for layer, diff_id in found.layers():
        if (layer, diff_id) in missing:
            task = report.task(layer.digest.short, "Pulling fs layer", layer.size)
            jobs.append((layer, diff_id, task))
        else:
            report.task(layer.digest.short, "Already exists").done("Already exists")
    session.side_by_side(lambda job: _fetch_layer(session, found.repository, lease, *job), jobs)


def _fetch_layer(
    session: Session,
    repository: Repository,
    lease: Lease,
    layer: Descriptor,
    diff_id: Digest,
    task: Task,
) -> None:
    offset = lease.resume_offset(layer.digest)
    try:
        _stream_layer(repository, lease, layer, diff_id, task, offset)
    except BadContent:
        if not offset or session.stopped.is_set():
            raise
        # What an earlier pull left may be what is wrong.
        task.advance(-offset)
        _stream_layer(repository, lease, layer, diff_id, task, 0)
    task.done("Pull complete")


def _stream_layer(
    repository: Repository,
    lease: Lease,
    layer: Descriptor,
    diff_id: Digest,
    task: Task,
    offset: int,
) -> None:
    task.status("Resuming" if offset else "Downloading")
    task.advance(offset)
    with repository.blob(layer, task.advance, offset) as reader:
        lease.add_layer(
            reader,
            diff_id=diff_id,
            digest=layer.digest,
            size=layer.size,
            offset=offset,
            resumable=True,
        )


def _explain(error: RegistryStatusError, reference: Reference) -> UserError:
    """Docker's words for an image that is not there, or not for us."""
    if error.status == 404 and "MANIFEST_UNKNOWN" in error.codes:
        return RegistryError(f"manifest for {reference.familiar}", "not found", "check the tag")
    if error.status in (401, 403, 404):
        return RegistryError(
            f"pull access denied for {reference.familiar_repository}",
            "repository does not exist or may require 'unionfuse login'",
        )
    return error
