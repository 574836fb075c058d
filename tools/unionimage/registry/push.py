"""Push: an image from the store into a registry.

A blob that the repository has is skipped, one that another repository of the same registry has is
mounted from there, all others are sent, side by side. Layers made here are compressed now, and
only where the registry has none of the forms that they were seen in.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property

from unionimage.digest import Digest
from unionimage.progress import Reporter, Task
from unionimage.reference import Reference
from unionimage.registry.client import Repository
from unionimage.registry.errors import RegistryError, RegistryStatusError
from unionimage.registry.outgoing import AS_IT_IS, Outgoing, Wanted
from unionimage.registry.session import Session
from unionimage.spec import Descriptor, Index, Manifest, parse_manifest
from unionimage.store import Image, Lease, Store
from unionimage.store.platforms import Platforms
from unionimage.tuples import NamedTuple


class Pushed(NamedTuple):
    """What a push did."""

    reference: Reference
    digest: Digest
    size: int  # bytes of the manifest


def push(
    store: Store,
    session: Session,
    image: Image,
    reference: Reference,
    report: Reporter,
    wanted: Wanted = AS_IT_IS,
) -> Pushed:
    """Push one image under the tag of `reference`.

    Raises:
        UserError: the registry refuses or cannot be reached; what was sent stays there, unnamed.
    """
    assert reference.tag is not None
    with store.lease(f"push {reference.familiar}") as lease:
        sending = _Sending(store, session, lease, reference, report, wanted)
        return sending.image(image, reference.tag)[0]


def push_platforms(
    store: Store,
    session: Session,
    named: Platforms,
    reference: Reference,
    report: Reporter,
    wanted: Wanted = AS_IT_IS,
) -> Pushed:
    """Push the images of all platforms that a name stands for, and an index of them under the tag.

    The index is the one that came where all of its images are here and go as they came.

    Raises:
        UserError: as for `push`.
    """
    assert reference.tag is not None
    with store.lease(f"push {reference.familiar}") as lease:
        sending = _Sending(store, session, lease, reference, report, wanted)
        described = []
        for image in named.images:
            report.line(f"Platform: {image.config.platform}")
            described.append(sending.image(image, None)[1]._replace(platform=image.config.platform))
        data = named.data
        media_type = named.index.media_type
        if {one.digest for one in described} != {one.digest for one in named.index.manifests}:
            media_type = wanted.index_type or media_type
            data = Index(media_type, tuple(described)).to_json()
        sending.publish(reference.tag, media_type, data, been_there=True)  # or little is lost
        return Pushed(reference, Digest.of(data), len(data))


class _Sending:
    """What the images of one push have in common."""

    def __init__(
        self,
        store: Store,
        session: Session,
        lease: Lease,
        reference: Reference,
        report: Reporter,
        wanted: Wanted,
    ) -> None:
        self.repository = session.repository(reference)
        self._store, self._session, self._lease = store, session, lease
        self._reference, self._report, self._wanted = reference, report, wanted
        self._sources = _Sources(store, reference)

    def image(self, image: Image, tag: str | None) -> tuple[Pushed, Descriptor]:
        """Send an image, and its manifest under a tag, or by its digest alone."""
        reference, wanted, repository = self._reference, self._wanted, self.repository
        made = Outgoing(self._store, self._lease, image, wanted)
        keys = made.keys()
        tasks = [
            (position, self._report.task(image.diff_ids[position].short, "Preparing"))
            for position in {key: n for n, key in enumerate(keys)}.values()
        ]
        try:
            blobs = self._session.side_by_side(
                lambda job: _push_layer(made, repository, self._sources, *job), tasks
            )
        except RegistryStatusError as error:
            raise _explain(error, reference) from error
        layers = dict(zip((keys[position] for position, _ in tasks), blobs, strict=True))
        manifest_type, data = made.manifest([layers[key] for key in keys])
        _push_config(repository, data, image)
        digest = Digest.of(data)
        by_digest = Reference(reference.registry, reference.path, None, digest)
        been_there = by_digest in image.digests
        self.publish(tag or digest, manifest_type, data, been_there)
        if not been_there or image.manifest_digest is None:
            # A form that was asked for this once does not become the image's own.
            manifest = self._lease.add_bytes(data) if wanted.anything else None
            self._store.note_digest(image, by_digest, manifest)
        return Pushed(reference, digest, len(data)), Descriptor.of(manifest_type, data)

    def publish(
        self, reference: str | Digest, media_type: str, data: bytes, been_there: bool
    ) -> None:
        """Send a manifest or index; only asks whether it is there if it has `been_there` before.

        What it names has to be there: registries lose blobs, and keep the manifest that names them.
        """
        repository = self.repository
        if been_there:
            with suppress(RegistryStatusError):  # what cannot be asked for can be sent
                if repository.manifest_digest(reference, push=True) == Digest.of(data):
                    return
        repository.put_manifest(reference, media_type, data)


class _Sources:
    """Other repositories of the same registry that a layer is known to be in."""

    def __init__(self, store: Store, reference: Reference) -> None:
        self._store, self._reference = store, reference

    def of(self, diff_id: Digest) -> list[str]:
        """At most three repositories to try."""
        return list(self._paths.get(diff_id, ()))[:3]

    @cached_property
    def _paths(self) -> dict[Digest, dict[str, None]]:
        found: dict[Digest, dict[str, None]] = {}
        for image in self._store.images(all=True):
            for name in (*image.names, *image.digests):
                same = name.registry == self._reference.registry
                if same and name.path != self._reference.path:
                    for diff_id in image.diff_ids:
                        found.setdefault(diff_id, {})[name.path] = None
        return found


def _push_layer(
    made: Outgoing, repository: Repository, sources: _Sources, position: int, task: Task
) -> Descriptor:
    known = made.known(position)
    there = _find_there(made, repository, sources, position, known, task)
    if there is not None:
        return there
    blob = made.layer(position)
    if blob not in known:
        there = _find_there(made, repository, sources, position, [blob], task)
        if there is not None:
            return there
    task.status("Pushing", blob.size)
    repository.upload(blob.digest, blob.size, lambda: made.open_layer(position, blob), task.advance)
    task.done("Pushed")
    return blob


def _find_there(
    made: Outgoing,
    repository: Repository,
    sources: _Sources,
    position: int,
    blobs: list[Descriptor],
    task: Task,
) -> Descriptor | None:
    """The first of these blobs that the repository has, or can take over from another one."""
    for blob in blobs:
        if repository.has_blob(blob.digest):
            task.done("Layer already exists")
            return blob
    for source in sources.of(made.image.diff_ids[position]):
        for blob in blobs:
            if repository.mount(blob.digest, source):
                task.done(f"Mounted from {source}")
                return blob
    return None


def _push_config(repository: Repository, manifest: bytes, image: Image) -> None:
    parsed = parse_manifest(manifest)
    assert isinstance(parsed, Manifest)
    if not repository.has_blob(parsed.config.digest):
        config = parsed.config
        repository.upload(config.digest, config.size, lambda: io.BytesIO(image.config_bytes))


def _explain(error: RegistryStatusError, reference: Reference) -> RegistryError:
    if error.status in (401, 403):
        return RegistryError(
            f"push access to {reference.familiar_repository} is denied",
            error.reason,
            "use unionfuse login",
        )
    return error


def tags_to_push(image_names: Iterable[Reference], reference: Reference) -> list[Reference]:
    """Every local tag of the repository that `reference` names, in order."""
    same = {
        name._replace(digest=None)
        for name in image_names
        if (name.registry, name.path) == (reference.registry, reference.path) and name.tag
    }
    return sorted(same, key=str)
