"""Variables in a Dockerfile: `$name`, `${name}` and the modifiers of a shell.

    ${name:-word} ${name-word}   word where name is unset (with `:` also where it is empty)
    ${name:+word} ${name+word}   word where name is set
    ${name:?word} ${name?word}   fail with word where name is unset
    ${name#pattern} ##           without the shortest, longest prefix that matches (`*`, `?`)
    ${name%pattern} %%           the same for a suffix
    ${name/pattern/word} //      the first, every longest match replaced

Quotes and the escape character work as in a shell. No command substitution, no arithmetic, and one
word stays one word unless `split` is asked for. Source: Dockerfile reference, "Environment
replacement".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from unionimage.dockerfile.parser import DockerfileError

_SPECIAL = "@*#?-$!0"


def expand(word: str, variables: Mapping[str, str], escape: str = "\\") -> str:
    """Expand one word; quotes are taken away. Raises DockerfileError for bad syntax."""
    return _Scanner(word, variables, escape).run()[0]


def split(word: str, variables: Mapping[str, str], escape: str = "\\") -> list[str]:
    """Expand a text and split it at unquoted blanks, those from variables too (EXPOSE does so)."""
    return _Scanner(word, variables, escape).run()[1]


def expand_document(text: str, variables: Mapping[str, str]) -> str:
    """Expand the text of an unquoted heredoc: quotes are ordinary characters there."""
    return _Scanner(text, variables, "\\", quotes=False).run()[0]


class _Words:
    """Collects characters into words; only *unquoted* blanks end a word."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self._word: list[str] = []

    def add(self, text: str, quoted: bool) -> None:
        for char in text:
            if quoted or not char.isspace():
                self._word.append(char)
            else:
                self.end()

    def end(self) -> None:
        if self._word:
            self.words.append("".join(self._word))
            self._word = []


class _Scanner:
    def __init__(
        self, text: str, variables: Mapping[str, str], escape: str, quotes: bool = True
    ) -> None:
        self.text = text
        self.variables = variables
        self.escape = escape
        self.quotes = quotes
        self.at = 0

    def run(self) -> tuple[str, list[str]]:
        try:
            words = _Words()
            whole = self._until("", keep_escapes=False, words=words)
            words.end()
            return whole, words.words
        except DockerfileError as error:
            raise DockerfileError(f"{error.reason} in {self.text!r}") from None

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _next(self) -> str:
        char = self._peek()
        self.at += 1
        return char

    def _until(self, stop: str, keep_escapes: bool, words: _Words | None = None) -> str:
        """Everything up to the character `stop`, or to the end where that is empty."""
        result: list[str] = []
        while char := self._peek():
            if char == stop:
                self.at += 1
                return "".join(result)
            quoted = True
            if char == "$":
                piece, quoted = self._dollar(), False
            elif char == "'" and self.quotes:
                piece = self._single()
            elif char == '"' and self.quotes:
                piece = self._double(keep_escapes)
            elif char == self.escape:
                self.at += 1
                piece = self._next()
                if keep_escapes:
                    piece = char + piece
            else:
                piece, quoted = self._next(), False
            result.append(piece)
            if words is not None:
                words.add(piece, quoted)
        if stop:
            raise DockerfileError(f"missing {stop!r}")
        return "".join(result)

    def _single(self) -> str:
        end = self.text.find("'", self.at + 1)
        if end < 0:
            raise DockerfileError("a single quote is never closed")
        piece = self.text[self.at + 1 : end]
        self.at = end + 1
        return piece

    def _double(self, keep_escapes: bool) -> str:
        self.at += 1
        result: list[str] = []
        while char := self._peek():
            if char == "$":
                result.append(self._dollar())
                continue
            self.at += 1
            if char == '"':
                return "".join(result)
            if char == self.escape:
                if keep_escapes:
                    result.append(char)
                follows = self._peek()
                if follows in ('"', "$", self.escape):  # others keep their backslash
                    char = self._next()
                elif not follows:
                    break
            result.append(char)
        raise DockerfileError("a double quote is never closed")

    def _dollar(self) -> str:
        self.at += 1
        if self._peek() != "{":
            name = self._name()
            return self.variables.get(name, "") if name else "$"
        self.at += 1
        if self._peek() in ("{", "}", ":"):
            raise DockerfileError("bad substitution")
        name = self._name()
        sign = self._next()
        if sign == "}":
            return self.variables.get(name, "")
        if sign == "":
            raise DockerfileError("missing '}'")
        if sign == "/":
            return self._replace(name)
        if sign in "#%":
            return self._trim(name, sign)
        return self._default(name, sign)

    def _name(self) -> str:
        first = self._peek()
        if first.isdigit():  # positional parameters exist in name only
            match = re.compile(r"\d+").match(self.text, self.at)
        elif first and first in _SPECIAL:
            self.at += 1
            return first
        else:
            match = re.compile(r"\w+").match(self.text, self.at)
        if match is None:
            return ""
        self.at = match.end()
        return match[0]

    def _default(self, name: str, sign: str) -> str:
        """`-`, `+` and `?`, each with or without a colon before it."""
        value = self.variables.get(name)
        if sign == ":":
            sign = self._next()
            value = value or None
        if sign not in ("-", "+", "?"):
            raise DockerfileError(f"unsupported modifier {sign!r} in substitution")
        word = self._until("}", keep_escapes=False)
        if sign == "+":
            return "" if value is None else word
        if value is None and sign == "?":
            raise DockerfileError(f"{name}: {word or 'is not set, or empty'}")
        return word if value is None else value

    def _trim(self, name: str, sign: str) -> str:
        word = self._until("}", keep_escapes=True)
        value = self.variables.get(name, "")
        longest = word.startswith(sign)
        pattern = _pattern(word[1:] if longest else word)
        matches = re.compile(pattern, re.DOTALL).fullmatch
        if sign == "#":
            return _without_prefix(value, matches, longest)
        return _without_suffix(value, matches, longest)

    def _replace(self, name: str) -> str:
        every = self._peek() == "/"
        self.at += every
        pattern = _pattern(self._until("/", keep_escapes=True))
        word = self._until("}", keep_escapes=True)
        value = self.variables.get(name, "")
        return re.sub(pattern, lambda _: word, value, count=0 if every else 1)


def _without_prefix(value: str, matches: Callable[[str], object], longest: bool) -> str:
    ends = range(len(value) + 1)
    for end in reversed(ends) if longest else ends:
        if matches(value[:end]):
            return value[end:]
    return value


def _without_suffix(value: str, matches: Callable[[str], object], longest: bool) -> str:
    starts = range(len(value) + 1)
    for start in starts if longest else reversed(starts):
        if matches(value[start:]):
            return value[:start]
    return value


def _pattern(word: str) -> str:
    """A shell pattern (`*`, `?`, backslash; no brackets) as a greedy regular expression."""
    result: list[str] = []
    chars = iter(word)
    for char in chars:
        if char == "*":
            result.append(".*")
        elif char == "?":
            result.append(".")
        elif char == "\\":
            escaped = next(chars, "")
            if escaped not in ("*", "?", "\\", "}", "/"):
                raise DockerfileError(f"invalid escape '\\{escaped}' in a pattern")
            result.append(re.escape(escaped))
        else:
            result.append(re.escape(char))
    return "".join(result)
