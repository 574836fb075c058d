"""COPY, ADD and WORKDIR: gather what is to be copied, tell its digest, put it into a layer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from unionimage.digest import Digest
from unionimage.dockerfile.cache import key_of
from unionimage.dockerfile.ignore import Patterns
from unionimage.dockerfile.kitchen import Context
from unionimage.dockerfile.parser import DockerfileError
from unionimage.dockerfile.plan import CopyAction, Source, WorkdirAction
from unionimage.dockerfile.select import Found, Tree, digest, find, open_file, open_in
from unionimage.tuples import NamedTuple

if TYPE_CHECKING:  # writing is imported when something is written: cached builds are quick
    from unionimage.dockerfile.cache import BuildCache
    from unionimage.dockerfile.kitchen import Kitchen
    from unionimage.dockerfile.place import Owner, Target


class Work(Protocol):
    """What these steps need of a build.

    Attributes:
        epoch: SOURCE_DATE_EPOCH in seconds, or None.
    """

    kitchen: Kitchen
    cache: BuildCache

    @property
    def epoch(self) -> int | None: ...

    def stage_name(self, source: Source, /) -> str: ...

    def stack_of(self, source: Source, /) -> Sequence[Digest]: ...


class Download(NamedTuple):
    """A file from a URL: its name, and where it lies once it is here."""

    name: bytes
    url: str
    path: Path | None


class Goods(NamedTuple):
    """What a COPY or ADD copies. `found` is None where only the digest is known so far."""

    digest: str
    found: tuple[Found, ...] | None
    downloads: tuple[Download, ...] = ()


def gather(work: Work, action: CopyAction, *, may_mount: bool) -> Goods | None:
    """Find out what is copied and its digest.

    Returns:
        None where that needs a mount and `may_mount` is False.

    Raises:
        DockerfileError: a source is not there.
    """
    locals_ = [source for source in action.sources if not _is_url(action, source)]
    urls = [source for source in action.sources if _is_url(action, source)]
    documents = key_of("documents", action.documents)
    downloads, url_digest = _downloads(work, action, urls)
    found: tuple[Found, ...] | None = None
    if not locals_:
        found, content = (), ""
    elif action.source.is_context:
        tree = work.kitchen.context.tree()
        found = tuple(_find(work, tree, action, locals_))
        content = digest(tree, found)
    else:
        known = _remembered(work, action, locals_, may_mount)
        if known is None:
            return None
        content = known
    return Goods(key_of(content, documents, url_digest), found, downloads)


def _is_url(action: CopyAction, source: str) -> bool:
    return action.is_add and source.lower().startswith(("http://", "https://"))


def _find(work: Work, tree: Tree, action: CopyAction, sources: Sequence[str]) -> list[Found]:
    return find(
        tree, sources, Patterns(action.exclude), action.parents, _name_of(work, action.source)
    )


def _name_of(work: Work, source: Source) -> str:
    if source.image is not None:
        return "the image"
    if source.stage >= 0:
        return f"stage {work.stage_name(source)}"
    return work.kitchen.context.name


def _remembered(
    work: Work, action: CopyAction, sources: Sequence[str], may_mount: bool
) -> str | None:
    """The digest of files in a stage or image; those never change, so it is remembered."""
    stack = work.stack_of(action.source)
    key = key_of("content", ",".join(stack), sources, action.exclude, action.parents)
    known = work.cache.content(key)
    if known is None and may_mount:
        with work.kitchen.tree(stack) as tree:
            known = digest(tree, _find(work, tree, action, sources))
        work.cache.remember_content(key, known)
    return known


def context_digest(context: Context, path: str) -> str:
    """The digest of a file or directory of the build context."""
    tree = context.tree()
    return digest(tree, find(tree, [path or "."], Patterns(()), False, context.name))


# ---- downloads


def _downloads(
    work: Work, action: CopyAction, urls: Sequence[str]
) -> tuple[tuple[Download, ...], str]:
    """What URLs stand for, and a digest of it; with a checksum nothing is fetched yet."""
    if action.checksum and (len(urls) != 1 or len(action.sources) != 1):
        raise DockerfileError("--checksum is for one source, a URL")
    if not urls:
        return (), ""
    downloads: list[Download] = []
    facts: list[tuple[str, str]] = []
    for url in urls:
        name = _file_name(url, action.destination)
        if action.checksum:
            downloads.append(Download(os.fsencode(name), url, None))
            facts.append((name, str(Digest(action.checksum))))
        else:
            path, found = _fetch(work, url)
            downloads.append(Download(os.fsencode(name), url, path))
            facts.append((name, str(found)))
    return tuple(downloads), key_of(facts)


def _file_name(url: str, destination: str) -> str:
    from urllib.parse import unquote, urlsplit

    name = unquote(urlsplit(url).path).rpartition("/")[2]
    if name in ("", ".", "..") or "\0" in name:
        if destination.endswith("/"):
            raise DockerfileError(f"{url} names no file: give a destination without / at its end")
        return "download"
    return name


def _fetch(work: Work, url: str) -> tuple[Path, Digest]:
    """Download a URL into scratch space; its time is what the server says it is."""
    import email.utils
    import hashlib
    import urllib.error
    import urllib.request

    path = work.kitchen.scratch() / "download"
    total = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, open(path, "wb") as file:
            while data := answer.read(1 << 20):
                total.update(data)
                file.write(data)
            modified = answer.headers.get("Last-Modified", "")
    except (OSError, ValueError, urllib.error.URLError) as error:
        is_status = isinstance(error, urllib.error.HTTPError)
        reason = error if is_status else getattr(error, "reason", None) or error
        reason = getattr(reason, "strerror", None) or reason
        raise DockerfileError(f"cannot fetch {url}: {reason}") from None
    parsed = email.utils.parsedate_tz(modified)
    seconds = 0 if parsed is None else email.utils.mktime_tz(parsed)
    os.utime(path, (seconds, seconds))
    return path, Digest.from_hex(total.hexdigest())


def _present(work: Work, action: CopyAction, download: Download) -> Path:
    if download.path is not None:
        return download.path
    path, found = _fetch(work, download.url)
    if found != action.checksum:
        raise DockerfileError(
            f"{download.url} has the checksum {found}, --checksum says {action.checksum}"
        )
    return path


# ---- writing


def carry_out(
    work: Work, action: CopyAction, goods: Goods, below: Sequence[Digest], upper: Path
) -> None:
    """Copy into a mount of the stack so far, so that `upper` holds the changes."""
    from unionimage.dockerfile.place import Style, Target

    kitchen = work.kitchen
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(
            _opened(stack.enter_context(kitchen.mounted(below, upper=upper)))
        )
        epoch = work.epoch
        time = None if epoch is None else epoch * 10**9
        target = Target(root, Style(_owner(action.chown, root), action.chmod, time))
        destination = os.fsencode(action.destination)
        if goods.found is not None:
            tree, found = kitchen.context.tree(), goods.found
        else:
            tree = stack.enter_context(kitchen.tree(work.stack_of(action.source)))
            found = tuple(_find(work, tree, action, list(action.sources)))
        for each in found:
            if not (action.unpack and _unpack(target, tree, each, destination)):
                target.copy(tree, each, destination)
        for name, text in action.documents:
            _document(target, destination, name, text)
        for download in goods.downloads:
            _place_download(target, download, _present(work, action, download), destination)
        target.finish()


def make_workdir(work: Work, action: WorkdirAction, below: Sequence[Digest], upper: Path) -> None:
    """Make the working directory where it is not there yet; it belongs to USER, as in BuildKit."""
    from unionimage.dockerfile.place import Style, Target

    kitchen = work.kitchen
    with kitchen.mounted(below, upper=upper) as merged, _opened(merged) as root:
        path = os.fsencode(action.path.strip("/"))
        target = Target(root, Style())
        if target.is_directory(path):
            return
        epoch = work.epoch
        time = None if epoch is None else epoch * 10**9
        target = Target(root, Style(_user(action.user, root), "", time))
        target.make_directories(path)
        target.finish()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    root = os.open(path, os.O_PATH | os.O_DIRECTORY)
    try:
        yield root
    finally:
        os.close(root)


def _unpack(target: Target, tree: Tree, found: Found, destination: bytes) -> bool:
    """Extract a source that is an archive; False: it is none."""
    from unionimage.dockerfile import extract

    if found.is_directory:
        return False
    with open_file(tree.root, found.entries[0]) as file:
        archive = extract.open_archive(file)
        if archive is None:
            return False
        target.make_directories(destination)
        root = open_in(target.root, destination.strip(b"/"), os.O_PATH | os.O_DIRECTORY)
        try:
            extract.extract(archive, root, target.style)
        finally:
            os.close(root)
    return True


def _document(target: Target, destination: bytes, name: str, text: str) -> None:
    path = destination.strip(b"/")
    if destination.endswith(b"/") or target.is_directory(path):
        path = b"/".join(part for part in (path, os.fsencode(name)) if part)
    target.make_directories(path.rpartition(b"/")[0])
    target.write_document(path, text.encode("utf-8", "surrogateescape"))


def _place_download(target: Target, download: Download, path: Path, destination: bytes) -> None:
    """Put a downloaded file into its place: 0600 and root's, unless flags say otherwise."""
    with _opened(path.parent) as root:
        path.chmod(0o600)
        (found,) = find(Tree(root), [path.name], Patterns(()), False, "the download")
        target.copy(Tree(root), found._replace(name=download.name), destination)


def _owner(text: str, root: int) -> Owner | None:
    """`--chown=USER[:GROUP]` by name or number; the names are the image's."""
    if not text:
        return None
    from unionimage.container import users
    from unionimage.dockerfile.place import Owner

    name, has_group, group = text.partition(":")
    if name.isdecimal() and not has_group:
        return Owner(int(name), int(name))
    found = users.find(Path(f"/proc/self/fd/{root}"), f"{name}:{group}" if group else name)
    return Owner(found.uid, found.gid)


def _user(text: str, root: int) -> Owner | None:
    if not text:
        return None
    from unionimage.container import users
    from unionimage.dockerfile.place import Owner

    found = users.find(Path(f"/proc/self/fd/{root}"), text)
    return Owner(found.uid, found.gid)
