"""Where a build context comes from: a directory, a tar, standard input or a git repository.

Whatever it is, it ends as a directory: the user's own, or one in scratch space. `.dockerignore` is
read from it, or the file that lies beside the Dockerfile under its name.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import BinaryIO

from unionimage.dockerfile.ignore import Patterns, read_ignore_file
from unionimage.dockerfile.kitchen import BuildLease, Context
from unionimage.dockerfile.select import open_in
from unionimage.errors import UserError
from unionimage.tuples import NamedTuple

_GIT = r"(git://|ssh://|file://|git@|github\.com/|https?://.*\.git($|#)|.*\.git(#|$))"
_NAMES = ("Dockerfile", "Containerfile")
LARGEST_DOCKERFILE = 4 << 20


class Opened(NamedTuple):
    """A context, and the text of the Dockerfile to build with it."""

    context: Context
    dockerfile: str


def open_context(text: str, file: str | None, lease: BuildLease) -> Opened:
    """Open what the command line names.

    Args:
        text: a directory, a tar file, `-`, or a git URL with an optional `#REF[:DIRECTORY]`.
        file: `-f`: a path from here, for another context than a directory a path within it; `-`:
            standard input; None: `Dockerfile` in the context.

    Raises:
        UserError: it is not there, or not what it should be.
    """
    if text == "-":
        return _from_stdin(file, lease)
    if not os.path.exists(text) and re.match(_GIT, text):
        return _in_place(_clone(text, lease), file, f"the repository {text}")
    path = Path(text)
    if path.is_dir():
        if (path / "HEAD").is_file() and (path / "objects").is_dir():
            return _in_place(_clone(str(path.absolute()), lease), file, f"the repository {text}")
        return _from_directory(path, file)
    if path.is_file():
        with open(path, "rb") as archive:
            opened = _from_tar(archive, file, lease, text)
        if opened is None:
            raise UserError(f"the build context {text} is neither a directory nor a tar")
        return opened
    raise UserError(
        f"the build context {text!r} is not there: it is a directory, a tar file, - or a git URL"
    )


def _from_directory(path: Path, file: str | None) -> Opened:
    if file == "-":
        return _with_dockerfile(path, sys.stdin.buffer.read(LARGEST_DOCKERFILE), None)
    if file is None:
        return _in_place(path, None, f"the build context {path}")
    try:
        return _with_dockerfile(path, Path(file).read_bytes(), Path(file + ".dockerignore"))
    except OSError as error:
        raise UserError(f"cannot read the Dockerfile {file}: {error.strerror}") from None


def _from_stdin(file: str | None, lease: BuildLease) -> Opened:
    """A tar, or else the text of a Dockerfile that has an empty context."""
    if file == "-":
        raise UserError("context and Dockerfile cannot both come from standard input")
    if sys.stdin.isatty():
        raise UserError("the build context - is standard input: pipe a tar or a Dockerfile into it")
    spool = lease.scratch() / "stdin"
    with open(spool, "w+b") as copy:
        while data := sys.stdin.buffer.read(1 << 20):
            copy.write(data)
        copy.seek(0)
        head = copy.read(512)
        copy.seek(0)
        opened = _from_tar(copy, file, lease, "standard input")
        if opened is not None:
            return opened
        copy.seek(0)
        if b"\0" in head or file is not None:
            raise UserError("standard input is neither a tar nor a Dockerfile")
        return _with_dockerfile(lease.scratch(), copy.read(LARGEST_DOCKERFILE), None)


def _from_tar(file: BinaryIO, name: str | None, lease: BuildLease, shown: str) -> Opened | None:
    """The context in an archive; None where it is none."""
    from unionimage.dockerfile.extract import extract, open_archive
    from unionimage.dockerfile.place import Style

    archive = open_archive(file)
    if archive is None:
        return None
    directory = lease.scratch()
    root = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        extract(archive, root, Style())
    finally:
        os.close(root)
    return _in_place(directory, name, f"the archive {shown}")


def _in_place(directory: Path, name: str | None, shown: str) -> Opened:
    """A context that holds its Dockerfile; the path to that is confined to it."""
    root = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        for candidate in _NAMES if name is None else (name,):
            text = _read_in(root, candidate)
            if text is not None:
                beside = _read_in(root, candidate + ".dockerignore")
                return _opened(directory, text, beside)
    finally:
        os.close(root)
    raise UserError(f"there is no {name or 'Dockerfile'} in {shown}; -f names another")


def _read_in(root: int, path: str) -> bytes | None:
    try:
        descriptor = open_in(root, os.fsencode(path), os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        with os.fdopen(descriptor, "rb") as file:
            return file.read(LARGEST_DOCKERFILE)
    except OSError:
        return None


def _with_dockerfile(directory: Path, text: bytes, ignore_file: Path | None) -> Opened:
    beside = None
    if ignore_file is not None and ignore_file.is_file():
        beside = ignore_file.read_bytes()
    return _opened(directory, text, beside)


def _opened(directory: Path, text: bytes, ignore: bytes | None) -> Opened:
    if ignore is None:
        root = os.open(directory, os.O_PATH | os.O_DIRECTORY)
        try:
            ignore = _read_in(root, ".dockerignore")
        finally:
            os.close(root)
    patterns = read_ignore_file(ignore.decode("utf-8", "surrogateescape")) if ignore else []
    try:
        dockerfile = text.decode()
    except UnicodeDecodeError:
        raise UserError("the Dockerfile is not UTF-8 text") from None
    return Opened(Context(directory, Patterns(patterns)), dockerfile)


def _clone(url: str, lease: BuildLease) -> Path:
    """A shallow clone of `URL#REF:DIRECTORY`, without its `.git`; returns the directory."""
    import shutil

    address, _, fragment = url.partition("#")
    reference, _, below = fragment.partition(":")
    if address.startswith("-") or reference.startswith("-"):
        raise UserError(f"{url!r} is not a git URL")
    if address.startswith("github.com/"):
        address = "https://" + address
    if os.path.isdir(address):
        address = Path(address).absolute().as_uri()  # a path would not be cloned shallow
    target = lease.scratch() / "clone"
    target.mkdir()
    _git(url, target, "init", "--quiet")
    _git(url, target, "fetch", "--quiet", "--depth=1", "--", address, reference or "HEAD")
    _git(url, target, "checkout", "--quiet", "--detach", "FETCH_HEAD")
    shutil.rmtree(target / ".git")
    if not below:
        return target
    root = os.open(target, os.O_PATH | os.O_DIRECTORY)
    try:
        inner = open_in(root, os.fsencode(below), os.O_PATH | os.O_DIRECTORY)
        try:
            return Path(os.readlink(f"/proc/self/fd/{inner}"))
        finally:
            os.close(inner)
    except OSError as error:
        raise UserError(f"{url}: {below}: {error.strerror}") from None
    finally:
        os.close(root)


def _git(url: str, directory: Path, *arguments: str) -> None:
    import subprocess

    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    command = ["git", "-c", "safe.directory=*", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment
        )
    except FileNotFoundError:
        raise UserError(f"{url}: git is not installed") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"git ended with code {done.returncode}"]
        raise UserError(f"{url}: {lines[-1].removeprefix('fatal: ')}")
