"""`.dockerignore` and `--exclude`: which paths of a context are left out.

The rules are moby's: patterns are slash-separated and rooted at the context; `*` and `?` stop at a
slash, `**` does not; `[a-z]` and a backslash work as in Go's filepath.Match; a pattern also covers
what lies below it; a later `!pattern` brings paths back. Source: docker docs, "Dockerignore files";
moby/patternmatcher.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable

from unionimage.dockerfile.parser import DockerfileError
from unionimage.tuples import NamedTuple


class _Rule(NamedTuple):
    matches: re.Pattern[str]
    keep: bool


class Patterns:
    """An ordered list of patterns; the last that matches a path, or a parent of it, decides."""

    def __init__(self, patterns: Iterable[str]) -> None:
        """Raises DockerfileError for a pattern that cannot be read."""
        self._rules = [rule for each in patterns if (rule := _rule(each)) is not None]
        self.has_exceptions = any(rule.keep for rule in self._rules)

    def __bool__(self) -> bool:
        return bool(self._rules)

    def excludes(self, path: str) -> bool:
        """Whether `path` (relative, slash-separated, without leading `./`) is left out.

        A directory that is left out may still hold paths that an exception brings back: ask
        `may_hold_exceptions` before skipping it.
        """
        excluded = False
        for rule in self._rules:
            if rule.keep == excluded and any(map(rule.matches.fullmatch, _self_and_parents(path))):
                excluded = not rule.keep
        return excluded

    def may_hold_exceptions(self) -> bool:
        """Whether a path below an excluded directory could be brought back."""
        return self.has_exceptions


def read_ignore_file(text: str) -> list[str]:
    """The patterns of a `.dockerignore`: comments and blank lines dropped, paths made clean."""
    found: list[str] = []
    for line in text.removeprefix("\ufeff").split("\n"):
        if line.startswith("#") or not (pattern := line.strip()):
            continue
        sign = "!" if pattern.startswith("!") else ""
        pattern = pattern.removeprefix(sign).strip()
        if pattern:
            pattern = _clean(pattern)
            if len(pattern) > 1:
                pattern = pattern.removeprefix("/")
        found.append(sign + pattern)
    return found


def _clean(path: str) -> str:
    clean = posixpath.normpath(path)
    return clean[1:] if clean.startswith("//") else clean  # POSIX keeps two leading slashes


def _self_and_parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[: end + 1]) for end in range(len(parts))]


def _rule(pattern: str) -> _Rule | None:
    pattern = pattern.strip()
    keep = pattern.startswith("!")
    if keep:
        pattern = pattern[1:]
        if not pattern:
            raise DockerfileError("illegal exclusion pattern: '!'")
    if not pattern:
        return None
    pattern = _clean(pattern)
    try:
        return _Rule(re.compile(expression(pattern), re.DOTALL), keep)
    except re.error as error:
        raise DockerfileError(f"bad ignore pattern {pattern!r}: {error}") from None


def expression(pattern: str) -> str:
    """A regular expression for one clean pattern."""
    if pattern.startswith("**") and re.fullmatch(r"[^/*?\[\]\\][^*?\[\]\\]*", pattern[2:]):
        return ".*" + re.escape(
            pattern[2:]
        )  # moby compares the ends: `**x` covers `a/bx`, `**x*` not
    result: list[str] = []
    at = 0
    while at < len(pattern):
        char = pattern[at]
        if pattern.startswith("**", at):
            at += 2
            if pattern.startswith("/", at):
                at += 1
            result.append(".*" if at == len(pattern) else "(?:.*/)?")
            continue
        at += 1
        if char == "*":
            result.append("[^/]*")
        elif char == "?":
            result.append("[^/]")
        elif char == "[":
            piece, at = _bracket(pattern, at)
            result.append(piece)
        elif char == "\\":
            if at == len(pattern):
                raise DockerfileError(f"bad ignore pattern {pattern!r}: it ends in a backslash")
            result.append(re.escape(pattern[at]))
            at += 1
        else:
            result.append(re.escape(char))
    return "".join(result)


def _bracket(pattern: str, at: int) -> tuple[str, int]:
    """A character class `[...]`, entered behind its bracket; (expression, where it ends)."""
    negate = pattern.startswith("^", at)
    at += negate
    items: list[str] = []
    while at < len(pattern) and not (pattern[at] == "]" and items):
        low, at = _class_character(pattern, at)
        high = low
        if pattern.startswith("-", at):
            high, at = _class_character(pattern, at + 1)
            if high < low:
                raise DockerfileError(f"bad ignore pattern {pattern!r}: range out of order")
        items.append(f"{re.escape(low)}-{re.escape(high)}")
    if at >= len(pattern):
        raise DockerfileError(f"bad ignore pattern {pattern!r}: '[' is never closed")
    return f"[{'^' if negate else ''}{''.join(items)}]", at + 1


def _class_character(pattern: str, at: int) -> tuple[str, int]:
    if at < len(pattern) and pattern[at] == "\\":
        at += 1
    if at >= len(pattern) or pattern[at] in "]-":
        raise DockerfileError(f"bad ignore pattern {pattern!r}: bad character class")
    return pattern[at], at + 1
