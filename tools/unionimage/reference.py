"""Image references: `[REGISTRY[:PORT]/]PATH[:TAG][@DIGEST]`, and the names that people see.

Source: github.com/distribution/reference, reference.go (grammar) and normalize.go (docker.io,
library/). Names are kept in full and shown in their familiar form.
"""

from __future__ import annotations

import re

from unionimage.digest import Digest
from unionimage.errors import UserError
from unionimage.tuples import NamedTuple

DEFAULT_REGISTRY = "docker.io"
DEFAULT_TAG = "latest"

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*\Z")
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_REGISTRY = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::[0-9]+)?\Z")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z")
_HEX_ID = re.compile(r"[0-9a-f]{64}\Z")


class Reference(NamedTuple):
    """A name in a registry. `tag` and `digest` may each be None; then it names a repository.

    Attributes:
        registry: host and port, `docker.io` for short names.
        path: the repository below it, `library/debian` for `debian`.
    """

    registry: str
    path: str
    tag: str | None = None
    digest: Digest | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Parse what a user typed; adds docker.io and library/, but no tag.

        Raises:
            UserError: the text is not a reference; says which part is wrong.
        """
        scheme, is_url, rest = text.partition("://")
        if is_url:
            raise UserError(f"invalid reference {text!r}: leave out {scheme + is_url!r}")
        rest, at, digest_text = text.partition("@")
        digest = _digest(text, digest_text) if at else None
        slash = rest.rfind("/")
        colon = rest.find(":", slash + 1)
        tag = rest[colon + 1 :] if colon >= 0 else None
        name = rest[:colon] if colon >= 0 else rest
        if _begins_with_registry(name):
            registry, _, path = name.partition("/")
        else:
            registry, path = DEFAULT_REGISTRY, name
        if registry == "index.docker.io":
            registry = DEFAULT_REGISTRY
        if registry == DEFAULT_REGISTRY and path and "/" not in path:
            path = "library/" + path
        _check(text, registry, path, tag)
        if _HEX_ID.match(name):
            raise UserError(f"{text!r} cannot be a name: 64 hex digits are an image id")
        return cls(registry, path, tag, digest)

    @property
    def repository(self) -> str:
        """The full name without tag and digest: `docker.io/library/debian`."""
        return f"{self.registry}/{self.path}"

    @property
    def familiar_repository(self) -> str:
        """The name as docker shows it: `debian`, `localhost:5000/app`."""
        if self.registry != DEFAULT_REGISTRY:
            return self.repository
        short = self.path.removeprefix("library/")
        if "/" not in short:
            return short
        return self.repository if _begins_with_registry(self.path) else self.path

    @property
    def familiar(self) -> str:
        return self.familiar_repository + self._suffix()

    def with_default_tag(self) -> Reference:
        """`:latest` is added where there is neither a tag nor a digest."""
        if self.tag is None and self.digest is None:
            return self._replace(tag=DEFAULT_TAG)
        return self

    def __str__(self) -> str:
        return self.repository + self._suffix()

    def _suffix(self) -> str:
        return (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")


def _begins_with_registry(name: str) -> bool:
    first, slash, _ = name.partition("/")
    return bool(slash) and (first == "localhost" or any(mark in first for mark in ".:["))


def _digest(text: str, digest_text: str) -> Digest:
    try:
        return Digest(digest_text)
    except UserError as error:
        raise UserError(f"invalid reference {text!r}: {error}") from None


def _check(text: str, registry: str, path: str, tag: str | None) -> None:
    if not path or not _PATH.match(path):
        hint = "; it must be lower case" if path.lower() != path else ""
        raise UserError(f"invalid reference {text!r}: bad repository name {path!r}{hint}")
    if len(path) > 255:
        raise UserError(f"invalid reference {text[:40]!r}…: the name is longer than 255 characters")
    if not _REGISTRY.match(registry):
        raise UserError(f"invalid reference {text!r}: bad registry name {registry!r}")
    if tag is not None and not _TAG.match(tag):
        raise UserError(f"invalid reference {text!r}: bad tag {tag!r}")
