"""From the text of a Dockerfile to its commands, by the official parser.

The grammar (continuation lines, JSON forms, flags, heredocs) is read by BuildKit's own parser,
which the package `dockerfile` wraps. Here its answer gets a type of our own and its errors a line
number. What a command *means* is said in `instructions.py`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from unionimage.errors import UserError
from unionimage.tuples import NamedTuple

if TYPE_CHECKING:
    import dockerfile as official

_DIRECTIVE = re.compile(r"^#\s*([a-zA-Z][a-zA-Z0-9]*)\s*=\s*(.+?)\s*$")
# Patterns that few files need are compiled when they are used: start-up counts.
_BUILT_IN_SYNTAX = r"^(docker\.io/)?docker/dockerfile(-upstream)?(:[\w.-]+)?(@sha256:\w+)?$"


class DockerfileError(UserError):
    """A mistake in the Dockerfile; `line` (from 1, 0: unknown) says where, `reason` what."""

    def __init__(self, reason: str, line: int = 0) -> None:
        super().__init__(f"Dockerfile, line {line}: {reason}" if line else f"Dockerfile: {reason}")
        self.reason = reason
        self.line = line


class Heredoc(NamedTuple):
    """One inline document: its name and its text as it stands in the file."""

    name: str
    content: str


class Command(NamedTuple):
    """One command of a Dockerfile, not yet understood: see `instructions.parse_instruction`.

    `json` says that the arguments were a JSON array; `line` and `end_line` count from 1.
    """

    name: str
    flags: tuple[str, ...]
    arguments: tuple[str, ...]
    json: bool
    heredocs: tuple[Heredoc, ...]
    original: str
    line: int
    end_line: int


class Dockerfile(NamedTuple):
    """A parsed Dockerfile: its commands in order and the escape character it chose."""

    commands: tuple[Command, ...]
    escape: str


def parse(text: str) -> Dockerfile:
    """Parse the text of a Dockerfile.

    Raises DockerfileError for what the grammar does not allow, and for a `# syntax=` that asks for
    another language than docker's.
    """
    if "\0" in text:
        raise DockerfileError("the Dockerfile holds a NUL byte: it is not text")
    directives = _directives(text)
    escape = directives.get("escape", "\\")
    if escape not in ("\\", "`"):
        raise DockerfileError(f"escape={escape!r}: the escape character must be \\ or `")
    syntax = directives.get("syntax")
    if syntax is not None and not re.match(_BUILT_IN_SYNTAX, syntax):
        raise DockerfileError(f"syntax={syntax}: only docker/dockerfile is understood here", 1)
    found = _read(text)
    if isinstance(found, str):
        raise DockerfileError(found, _failing_line(text, found))
    lines = text.splitlines()
    return Dockerfile(tuple(_command(each, lines) for each in found), escape)


def _read(text: str) -> tuple[official.Command, ...] | str:
    """What the official parser makes of it, or its complaint."""
    import dockerfile as official  # runs threads, which must not be where processes are forked

    try:
        commands: tuple[official.Command, ...] = official.parse_string(text)
    except official.GoParseError as error:
        return str(error)
    return commands


def _directives(text: str) -> dict[str, str]:
    """The parser directives: `# name=value` lines above everything else."""
    found: dict[str, str] = {}
    for line in text.removeprefix("\ufeff").splitlines():
        match = _DIRECTIVE.match(line.strip())
        if match is None:
            break
        name = match[1].lower()
        if name in found:
            raise DockerfileError(f"the directive {name} is given twice")
        found[name] = match[2]
    return found


def _command(found: official.Command, lines: list[str]) -> Command:
    original = (found.original or "").rstrip("\n")
    if found.sub_cmd and "<<" in original:  # the heredocs of a trigger are not told otherwise
        original = "\n".join(lines[found.start_line - 1 : found.end_line]) + "\n"
    return Command(
        name=(found.cmd or "").upper(),  # a file of one backslash has a command without a name
        flags=found.flags,
        arguments=found.value,
        json=found.json,
        heredocs=tuple(Heredoc(each.name, each.content) for each in found.heredocs),
        original=original,
        line=found.start_line,
        end_line=found.end_line,
    )


def _failing_line(text: str, message: str) -> int:
    """The first line with which the parser fails in this way; the parser itself does not say."""
    lines = text.splitlines(keepends=True)
    low, high = 0, len(lines)
    while low < high:
        middle = (low + high) // 2
        if _read("".join(lines[:middle])) == message:
            high = middle
        else:
            low = middle + 1
    return low
