"""One repository in a registry, as the OCI distribution specification v1.1 defines it.

Manifests are verified here against their digest, blobs against their size. The digest of a blob is
verified by who takes the stream (`small_blob` here, the store's lease), so that it is computed
once.
`pull` and `push` decide what to move; this module knows how.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from urllib.parse import quote, urlencode, urljoin, urlsplit

from unionimage.digest import CHUNK, MAX_JSON, Digest, Readable
from unionimage.errors import BadContent, UserError
from unionimage.json_object import load_object
from unionimage.reference import Reference
from unionimage.registry.auth import Authorizer, parse_challenges
from unionimage.registry.blob import BlobReader, Progress
from unionimage.registry.errors import RegistryError, RegistryStatusError, printable
from unionimage.registry.http import Response
from unionimage.registry.transport import Body, Transport, finish, status_error
from unionimage.spec import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    INDEXES,
    MANIFESTS,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
)
from unionimage.tuples import NamedTuple

ACCEPT = ", ".join((OCI_INDEX, DOCKER_LIST, OCI_MANIFEST, DOCKER_MANIFEST))
UPLOAD_CHUNK = 64 << 20  # bytes sent in one PATCH; a cut costs at most this much
TAGS_PER_PAGE = 1000
MOST_TAGS = 1_000_000

OpenBlob = Callable[[], AbstractContextManager[Readable]]


def no_progress(count: int) -> None:
    """Take no notice of the bytes that moved."""


class RawManifest(NamedTuple):
    """A manifest or index as the registry gave it; `digest` is of exactly these bytes."""

    media_type: str
    digest: Digest
    data: bytes


class Repository:
    """The repository `path` of the registry behind `transport`."""

    def __init__(self, transport: Transport, authorizer: Authorizer, path: str) -> None:
        self.transport = transport
        self.authorizer = authorizer
        self.path = path
        self._chunked = True  # until the registry refuses a PATCH

    def __str__(self) -> str:
        return f"{self.transport.host}/{self.path}"

    # -- requests ---------------------------------------------------------------------------------

    def _request(
        self,
        method: str,
        url: str,
        *expected: int,
        headers: Mapping[str, str] | None = None,
        body: Body = None,
        push: bool = False,
        source: str | None = None,
        attempts: int | None = None,
    ) -> Response:
        """One authorized request; a status that is not `expected` becomes a RegistryStatusError.

        Args:
            push: ask for the right to write.
            source: another repository to ask read access for as well.
        """
        scopes = [f"repository:{self.path}:{'pull,push' if push else 'pull'}"]
        if source is not None:
            scopes.append(f"repository:{source}:pull")
        if not url.startswith(("http://", "https://")):
            url = f"{self.transport.base}/v2/{self.path}/{url}"
        for last in (False, True):
            sent = dict(headers or {})
            authorization = self.authorizer.header(scopes) if self.transport.is_home(url) else None
            if authorization is not None:
                sent["Authorization"] = authorization
            response = self.transport.request(
                method, url, headers=sent, body=body, attempts=attempts
            )
            if response.status in expected:
                return response
            answered_at_home = self.transport.is_home(response.url or url)
            challenges = response.headers.get_all("WWW-Authenticate", [])
            problem = status_error(response, str(self))
            if last or response.status != 401 or not answered_at_home:
                break
            parsed = [one for header in challenges for one in parse_challenges(header)]
            if not self.authorizer.renew(parsed, scopes, authorization):
                break
        raise problem

    # -- manifests --------------------------------------------------------------------------------

    def manifest(self, reference: str | Digest) -> RawManifest:
        """Fetch a manifest or index by tag or digest.

        Raises:
            BadContent: it does not have the digest that was asked for or promised.
            RegistryStatusError: with status 404 if there is none.
        """
        response = self._request("GET", f"manifests/{reference}", 200, headers={"Accept": ACCEPT})
        promised = response.headers.get("Docker-Content-Digest", "")
        media_type = _media_type(response)
        data = self.transport.read_all(response, MAX_JSON, f"{self}: manifest")
        digest = Digest.of(data)
        wanted = str(reference) if isinstance(reference, Digest) else promised
        if wanted.startswith("sha256:") and wanted != digest:
            raise BadContent(
                f"{self}: manifest {printable(str(reference))} has digest {digest}, "
                f"not {printable(wanted)}"
            )
        media_type = _true_media_type(data, media_type, str(self))
        return RawManifest(media_type, digest, data)

    def manifest_digest(self, reference: str | Digest, push: bool = False) -> Digest | None:
        """What a tag points at, by HEAD; None if there is none or the registry does not say.

        Args:
            push: ask for the right to write, as for what is sent before and after.
        """
        try:
            response = self._request(
                "HEAD", f"manifests/{reference}", 200, headers={"Accept": ACCEPT}, push=push
            )
        except RegistryStatusError as error:
            if error.status == 404:
                return None
            raise
        finish(response)
        text = response.headers.get("Docker-Content-Digest", "")
        try:
            return Digest(text)
        except BadContent:
            return None

    def put_manifest(self, reference: str | Digest, media_type: str, data: bytes) -> Digest:
        """Publish a manifest or index under a tag or its digest."""
        response = self._request(
            "PUT",
            f"manifests/{reference}",
            201,
            202,
            headers={"Content-Type": media_type},
            body=data,
            push=True,
        )
        finish(response)
        digest = Digest.of(data)
        stored = response.headers.get("Docker-Content-Digest", digest)
        if stored != digest:
            raise BadContent(f"{self}: the registry stored {printable(stored)}, not {digest}")
        return digest

    # -- blobs in ---------------------------------------------------------------------------------

    def blob(
        self, descriptor: Descriptor, progress: Progress = no_progress, offset: int = 0
    ) -> BlobReader:
        """A stream of a blob from `offset` on, which mends itself when it is cut or stalls."""
        return BlobReader(self, descriptor, progress, offset)

    def small_blob(self, descriptor: Descriptor, limit: int = MAX_JSON) -> bytes:
        """A whole blob, such as a config, verified."""
        if descriptor.size > limit:
            raise BadContent(
                f"{self}: {descriptor.digest} has {descriptor.size} bytes; at most {limit} are read"
            )
        with self.blob(descriptor) as reader:
            data = reader.read()
        if (digest := Digest.of(data)) != descriptor.digest:
            raise BadContent(f"{self}: blob {descriptor.digest} has digest {digest}")
        return data

    def has_blob(self, digest: Digest) -> bool:
        """Whether the repository holds a blob."""
        try:
            finish(self._request("HEAD", f"blobs/{digest}", 200, push=True))
        except RegistryStatusError as error:
            if error.status == 404:
                return False
            raise
        return True

    def open_range(self, digest: Digest, start: int) -> Response:
        """The blob's bytes from `start` on; the answer may be 200 and begin at 0 all the same."""
        headers = {"Range": f"bytes={start}-"} if start else {}
        return self._request("GET", f"blobs/{digest}", 200, 206, headers=headers, attempts=1)

    # -- blobs out --------------------------------------------------------------------------------

    def mount(self, digest: Digest, source: str) -> bool:
        """Take over a blob from the repository `source` of the same registry, if it is there."""
        query = urlencode({"mount": digest, "from": source})
        try:
            response = self._request(
                "POST",
                f"blobs/uploads/?{query}",
                201,
                202,
                headers={"Content-Length": "0"},
                push=True,
                source=source,
            )
        except RegistryStatusError as error:
            if error.status in (400, 401, 403, 404, 405):
                return False
            raise
        finish(response)
        if response.status == 201:
            return True
        self._cancel(response.headers.get("Location"))
        return False

    def upload(
        self,
        digest: Digest,
        size: int,
        open_blob: OpenBlob,
        progress: Progress = no_progress,
    ) -> None:
        """Send a blob: in one PUT if it is small, else in chunks that are resumed after a cut.

        Args:
            open_blob: opens the blob for reading from its start; called for each attempt.
        """
        if size > UPLOAD_CHUNK and self._chunked:
            try:
                self._upload_chunked(digest, size, open_blob, progress)
                return
            except RegistryStatusError as error:
                if error.status not in (400, 404, 405, 411, 415, 416, 501):
                    raise
                self._chunked = False
        self._upload_whole(digest, size, open_blob, progress)

    def _upload_whole(
        self, digest: Digest, size: int, open_blob: OpenBlob, progress: Progress
    ) -> None:
        """POST and PUT; an upload that broke is begun anew, since nothing of it is kept."""
        attempts = self.transport.limits.attempts
        for attempt in range(1, attempts + 1):
            counted = _Counted(progress)
            location = self._begin()
            try:
                response = self._request(
                    "PUT",
                    _with_digest(location, digest),
                    201,
                    202,
                    204,
                    headers={
                        "Content-Length": str(size),
                        "Content-Type": "application/octet-stream",
                    },
                    body=partial(_pieces, open_blob, 0, size, counted),
                    push=True,
                    attempts=1,
                )
                finish(response)
                return
            except RegistryError as error:
                counted.undo()
                if attempt == attempts or not _is_worth_another(error):
                    raise
                self.transport.pause(attempt)
                if self.has_blob(digest):  # only the answer was lost
                    progress(size)
                    return

    def _upload_chunked(
        self, digest: Digest, size: int, open_blob: OpenBlob, progress: Progress
    ) -> None:
        """POST, PATCH for each chunk, PUT; after a cut the registry says how far it got."""
        location, done, failures = self._begin(), 0, 0
        while done < size:
            end = min(done + UPLOAD_CHUNK, size)
            counted = _Counted(progress)
            headers = {
                "Content-Length": str(end - done),
                "Content-Range": f"{done}-{end - 1}",
                "Content-Type": "application/octet-stream",
            }
            start = done
            try:
                response = self._request(
                    "PATCH",
                    location,
                    202,
                    headers=headers,
                    body=partial(_pieces, open_blob, start, end, counted),
                    push=True,
                    attempts=1,
                )
                finish(response)
                location, done, failures = self._location(response), end, 0
            except RegistryError as error:
                counted.undo()
                failures += 1
                if failures >= self.transport.limits.attempts or not _is_worth_another(error):
                    raise
                self.transport.pause(failures)
                location, reached = self._upload_status(location)
                progress(reached - start)
                done = reached
        self._complete(location, digest)

    def _complete(self, location: str, digest: Digest) -> None:
        """The PUT that ends an upload in chunks."""
        attempts = self.transport.limits.attempts
        for attempt in range(1, attempts + 1):
            try:
                response = self._request(
                    "PUT",
                    _with_digest(location, digest),
                    201,
                    202,
                    204,
                    headers={"Content-Length": "0"},
                    push=True,
                    attempts=1,
                )
                finish(response)
                return
            except RegistryError as error:
                if attempt == attempts or not _is_worth_another(error):
                    raise
                self.transport.pause(attempt)
                if self.has_blob(digest):  # only the answer was lost
                    return

    def _begin(self) -> str:
        response = self._request(
            "POST", "blobs/uploads/", 202, headers={"Content-Length": "0"}, push=True
        )
        finish(response)
        return self._location(response)

    def _location(self, response: Response) -> str:
        """Where the upload goes on; it must not leave TLS."""
        location = response.headers.get("Location")
        if not location:
            raise RegistryError(str(self), "names no place to upload to", "tell its operator")
        url = urljoin(response.url or self.transport.base, location)
        if not url.startswith(("http://", "https://")):
            url = urljoin(self.transport.base, location)
        if self.transport.base.startswith("https:") and not url.startswith("https:"):
            raise RegistryError(
                str(self),
                f"wants the upload sent over plain HTTP to {printable(urlsplit(url).netloc)}",
                "tell its operator",
            )
        return url

    def _upload_status(self, location: str) -> tuple[str, int]:
        """Where a broken upload goes on, and how many bytes of it the registry has."""
        response = self._request("GET", location, 204, 202, 200, push=True)
        finish(response)
        match = re.fullmatch(r"(?:bytes=)?0-(\d+)", response.headers.get("Range", "").strip())
        last = int(match.group(1)) if match else 0
        # "0-0" means nothing as well as one byte: begin again, which costs one byte.
        reached = last + 1 if last else 0
        return self._location(response) if response.headers.get("Location") else location, reached

    def _cancel(self, location: str | None) -> None:
        """Give up an upload that was offered in place of a mount; failure is no matter."""
        if not location:
            return
        try:
            url = urljoin(self.transport.base, location)
            finish(self._request("DELETE", url, 200, 202, 204, push=True, attempts=1))
        except RegistryError:
            pass

    # -- tags -------------------------------------------------------------------------------------

    def tags(self) -> Iterator[str]:
        """All tags, in the registry's order, page by page.

        Raises:
            RegistryError: the listing is no JSON, leads to another host or never ends.
        """
        url = f"{self.transport.base}/v2/{quote(self.path)}/tags/list?n={TAGS_PER_PAGE}"
        seen_pages, count = set(), 0
        while url:
            if url in seen_pages or count > MOST_TAGS:
                raise RegistryError(str(self), "its list of tags never ends", "tell its operator")
            seen_pages.add(url)
            response = self._request("GET", url, 200)
            link = response.headers.get("Link", "")
            data = self.transport.read_all(response, MAX_JSON, f"{self}: list of tags")
            listed = load_object(data, f"{self}: list of tags").get("tags") or []
            if not isinstance(listed, list) or not all(_is_tag(tag) for tag in listed):
                raise BadContent(f"{self}: the list of tags holds something else")
            count += len(listed)
            yield from listed
            url = self._next_page(url, link)

    def _next_page(self, url: str, link: str) -> str:
        match = re.match(r'\s*<([^>]*)>\s*;[^,]*\brel="?next"?', link)
        if match is None:
            return ""
        target: str = urljoin(url, match.group(1))
        if not self.transport.is_home(target):
            raise RegistryError(
                str(self),
                f"continues its list of tags at {printable(urlsplit(target).netloc)}",
                "tell its operator",
            )
        return target


def _is_tag(value: object) -> bool:
    """Whether a registry's word for a tag is one, and may be shown and asked for."""
    try:
        return isinstance(value, str) and Reference.parse(f"x:{value}").tag == value
    except UserError:
        return False


class _Counted:
    """Progress that can be taken back when what was sent has to be sent again."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._count = 0

    def __call__(self, count: int) -> None:
        self._count += count
        self._progress(count)

    def undo(self) -> None:
        self._progress(-self._count)
        self._count = 0


def _pieces(open_blob: OpenBlob, start: int, end: int, progress: Progress) -> Iterator[bytes]:
    """The bytes from `start` to `end` of a blob, piece by piece."""
    with open_blob() as blob:
        _skip(blob, start)
        left = end - start
        while left > 0:
            data = blob.read(min(CHUNK, left))
            if not data:
                raise BadContent(
                    "a blob in the store is shorter than it should be; use unionfuse check"
                )
            left -= len(data)
            progress(len(data))
            yield data


def _skip(blob: Readable, count: int) -> None:
    """Go forward in a blob, which may be one that can only be read."""
    seek = getattr(blob, "seek", None)
    if count and seek is not None:
        seek(count)
        return
    while count and (data := blob.read(min(CHUNK, count))):
        count -= len(data)


def _is_worth_another(error: RegistryError) -> bool:
    if isinstance(error, RegistryStatusError):
        return error.status == 429 or error.status >= 500
    return True


def _with_digest(location: str, digest: Digest) -> str:
    separator = "&" if urlsplit(location).query else "?"
    return f"{location}{separator}{urlencode({'digest': digest})}"


def _media_type(response: Response) -> str:
    text = str(response.headers.get("Content-Type", ""))
    return text.partition(";")[0].strip().lower()


def _true_media_type(data: bytes, header: str, what: str) -> str:
    """The media type of a manifest: its own word, which the header must not contradict."""
    table = load_object(data, f"{what}: manifest")
    named = table.get("mediaType")
    if named is None:
        if header in MANIFESTS + INDEXES:
            return header
        return OCI_INDEX if "manifests" in table else OCI_MANIFEST
    if not isinstance(named, str):
        raise BadContent(f"{what}: the manifest's mediaType is no string")
    if header in MANIFESTS + INDEXES and header != named:
        raise BadContent(f"{what}: a manifest of type {printable(named)} came as {header}")
    return named
