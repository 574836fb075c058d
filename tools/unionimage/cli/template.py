"""A subset of Go's text/template, which docker users write after `--format`; see `format`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from unionimage.errors import UserError
from unionimage.json_object import json_line
from unionimage.labels import LabelText

_ACTION = re.compile(r"\{\{(-\s)?(.*?)(\s-)?\}\}", re.S)
_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:[^"\\]|\\.)*"|`[^`]*`)|(?P<number>-?\d+(?:\.\d+)?)"""
    r"""|(?P<field>(?:\$\w*)?(?:\.\w+)+|\$\w*|\.)|(?P<word>\w+)|(?P<mark>:=|[()|,]))"""
)

Scope = dict[str, Any]
Token = tuple[str, str]  # its kind, its text


class Template:
    """A parsed template. Raises UserError for what the subset does not have."""

    def __init__(self, text: str) -> None:
        self._nodes, rest, end = _parse(list(_pieces(text)))
        if rest or end:
            raise _bad(f"unexpected {{{{{end}}}}}")

    def render(self, value: Any) -> str:
        """Fill in a mapping or any JSON value."""
        scope = {"$": value}
        return "".join(node(value, scope) for node in self._nodes)


Node = Callable[[Any, Scope], str]


def _bad(reason: str) -> UserError:
    return UserError(f"template parsing error: {reason}")


def _pieces(text: str) -> list[tuple[bool, str]]:
    """(is an action, text), with the white space cut off that `{{-` and `-}}` ask for."""
    pieces: list[tuple[bool, str]] = []
    position, trim = 0, False
    for match in _ACTION.finditer(text):
        plain = text[position : match.start()]
        plain = plain.lstrip() if trim else plain
        pieces.append((False, plain.rstrip() if match[1] else plain))
        pieces.append((True, match[2].strip()))
        position, trim = match.end(), bool(match[3])
    rest = text[position:]
    if "{{" in rest:
        raise _bad("an action is not closed with }}")
    pieces.append((False, rest.lstrip() if trim else rest))
    return pieces


def _parse(pieces: list[tuple[bool, str]]) -> tuple[list[Node], list[tuple[bool, str]], str]:
    """Nodes up to the end, or to an `else` or `end`, which is returned with what follows."""
    nodes: list[Node] = []
    while pieces:
        is_action, text = pieces[0]
        pieces = pieces[1:]
        if not is_action:
            nodes.append(_literal(text))
            continue
        word, _, rest = text.partition(" ")
        if word in ("end", "else"):
            return nodes, pieces, text
        if text.startswith("/*"):
            continue
        if word in ("if", "range", "with"):
            node, pieces = _block(word, rest, pieces)
            nodes.append(node)
        elif word in ("define", "template", "block", "break", "continue"):
            raise _bad(f"{word!r} is not supported")
        else:
            nodes.append(_output(_Expression(text)))
    return nodes, pieces, ""


def _literal(text: str) -> Node:
    return lambda value, scope: text


def _output(expression: _Expression) -> Node:
    def run(value: Any, scope: Scope) -> str:
        result = expression(value, scope)
        return "" if expression.variables else _text(result)

    return run


def _block(
    word: str, condition: str, pieces: list[tuple[bool, str]]
) -> tuple[Node, list[tuple[bool, str]]]:
    expression = _Expression(condition)
    body, pieces, end = _parse(pieces)
    otherwise: list[Node] = []
    if end.startswith("else if "):
        node, pieces = _block("if", end.removeprefix("else if "), pieces)
        otherwise, end = [node], "end"
    elif end == "else":
        otherwise, pieces, end = _parse(pieces)
    if end != "end":
        raise _bad(f"{{{{{word}}}}} has no {{{{end}}}}")

    def run(value: Any, scope: Scope) -> str:
        result = expression(value, dict(scope))
        if not _truth(result):
            return "".join(node(value, scope) for node in otherwise)
        if word == "if":
            return "".join(node(value, scope) for node in body)
        if word == "with":
            inner = scope | dict.fromkeys(expression.variables[:1], result)
            return "".join(node(result, inner) for node in body)
        output = []
        for key, one in _items(result):
            inner = dict(scope)
            if expression.variables:
                inner[expression.variables[-1]] = one
            if len(expression.variables) == 2:
                inner[expression.variables[0]] = key
            output += [node(one, inner) for node in body]
        return "".join(output)

    return run, pieces


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return sorted(value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(enumerate(value))
    raise UserError(f"template: range cannot go over {_text(value)!r}")


def _truth(value: Any) -> bool:
    return bool(value)


def _text(value: Any) -> str:
    """As Go prints it."""
    if value is None:
        return "<no value>"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "map[" + " ".join(f"{key}:{_text(value[key])}" for key in sorted(value)) + "]"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + " ".join(map(_text, value)) + "]"
    return str(value)


class _Expression:
    """A pipeline: commands joined by `|`, each given the result before it as its last argument."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.variables: list[str] = []
        self._tokens = self._scan()
        for position, (_, token) in enumerate(self._tokens):
            if token == ":=":
                names = [name for kind, name in self._tokens[:position] if kind == "field"]
                self.variables, self._tokens = names, self._tokens[position + 1 :]
                break
        if not self._tokens:
            raise _bad(f"nothing to evaluate in {{{{{self.text}}}}}")
        for kind, token in self._tokens:
            if kind == "word" and token not in _FUNCTIONS and token not in _CONSTANTS:
                raise _bad(f"function {token!r} is not defined or not supported")

    def __call__(self, value: Any, scope: Scope) -> Any:
        result, rest = self._pipeline(self._tokens, value, scope)
        if rest:
            raise _bad(f"unexpected {rest[0][1]!r} in {{{{{self.text}}}}}")
        if self.variables:
            scope.update(dict.fromkeys(self.variables[-1:], result))
        return result

    def _scan(self) -> list[Token]:
        tokens, position, text = [], 0, self.text.rstrip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None or match.lastgroup is None:
                raise _bad(f"unexpected {text[position:].strip()[:10]!r}")
            kind, token = match.lastgroup, match[match.lastgroup]
            if kind == "field" and token[0] == "." and text[:position].endswith(")"):
                kind = "member" if text[position] == "." else kind  # (…).Name, not (…) .Name
            tokens.append((kind, token))
            position = match.end()
        return tokens

    def _pipeline(self, tokens: list[Token], value: Any, scope: Scope) -> tuple[Any, list[Token]]:
        result, rest = self._command(tokens, value, scope, [])
        while rest and rest[0][1] == "|" and rest[0][0] == "mark":
            result, rest = self._command(rest[1:], value, scope, [result])
        return result, rest

    def _command(
        self, tokens: list[Token], value: Any, scope: Scope, piped: list[Any]
    ) -> tuple[Any, list[Token]]:
        if tokens and tokens[0][0] == "word" and tokens[0][1] in _FUNCTIONS:
            name, tokens = tokens[0][1], tokens[1:]
            arguments = []
            while tokens and tokens[0][1] not in (")", "|"):
                one, tokens = self._operand(tokens, value, scope)
                arguments.append(one)
            try:
                return _FUNCTIONS[name](*arguments, *piped), tokens
            except (TypeError, ValueError, LookupError, AttributeError) as error:
                raise UserError(f"template: error calling {name}: {error}") from None
        if piped:
            raise _bad("only a function can come after |")
        return self._operand(tokens, value, scope)

    def _operand(self, tokens: list[Token], value: Any, scope: Scope) -> tuple[Any, list[Token]]:
        if not tokens:
            raise _bad(f"something is missing in {{{{{self.text}}}}}")
        (kind, token), rest = tokens[0], tokens[1:]
        if token == "(" and kind == "mark":
            result, rest = self._pipeline(rest, value, scope)
            if not rest or rest[0][1] != ")":
                raise _bad("a ( is not closed")
            rest = rest[1:]
            if rest and rest[0][0] == "member":
                result, rest = _lookup(rest[0][1], result, scope), rest[1:]
            return result, rest
        if kind == "string":
            return (token[1:-1] if token[0] == "`" else json.loads(token)), rest
        if kind == "number":
            return (float(token) if "." in token else int(token)), rest
        if kind == "field":
            if token == ".Label" and rest and rest[0][0] == "string":
                return _label(value, *self._operand(rest, value, scope))
            return _lookup(token, value, scope), rest
        if token in _CONSTANTS:
            return _CONSTANTS[token], rest
        if kind == "word":
            return _FUNCTIONS[token](), rest
        raise _bad(f"unexpected {token!r}")


def _label(row: Any, name: str, rest: list[Token]) -> tuple[str, list[Token]]:
    labels = _lookup(".Labels", row, {})
    return (labels.table if isinstance(labels, LabelText) else labels or {}).get(name, ""), rest


def _lookup(path: str, value: Any, scope: Scope) -> Any:
    start, _, rest = path.partition(".")
    if start:
        if start not in scope:
            raise _bad(f"undefined variable {start!r}")
        value = scope[start]
    for name in filter(None, rest.split(".")):
        if not isinstance(value, Mapping):
            raise UserError(f"template: there is no field {name!r} in {path}")
        if name not in value:
            close = [key for key in value if str(key).lower() == name.lower()]
            if not close:
                raise UserError(f"template: there is no field {path!r}")
            name = close[0]
        value = value[name]
    return value


def _printf(form: str, *values: Any) -> str:
    parts = iter(values)

    def one(match: re.Match[str]) -> str:
        if match[2] == "%":
            return "%"
        value = next(parts)
        if match[2] == "q":
            return json.dumps(str(value))
        if match[2] in "sv":
            return f"%{match[1]}s" % _text(value)
        return str(f"%{match[1]}{match[2]}" % value)

    return re.sub(r"%([-+ 0]*\d*(?:\.\d+)?)([svqdfxXt%])", one, form)


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        value = value.get(key, "") if isinstance(value, Mapping) else value[key]
    return value


def _all(*values: Any) -> Any:
    return next((value for value in values if not _truth(value)), values[-1])


def _any(*values: Any) -> Any:
    return next((value for value in values if _truth(value)), values[-1])


_CONSTANTS = {"true": True, "false": False, "nil": None}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "json": json_line,
    "upper": str.upper,
    "lower": str.lower,
    "title": str.title,
    "len": len,
    "join": lambda values, separator="": separator.join(map(_text, values)),
    "split": lambda text, separator: text.split(separator),
    "pad": lambda text, before, after: " " * before + text + " " * after if text else text,
    "truncate": lambda text, size: text[:size],
    "println": lambda *values: " ".join(map(_text, values)) + "\n",
    "print": lambda *values: " ".join(map(_text, values)),
    "printf": _printf,
    "index": _index,
    "slice": lambda value, *ends: value[slice(*ends)] if len(ends) != 1 else value[ends[0] :],
    "eq": lambda first, *others: any(first == other for other in others),
    "ne": lambda first, second: first != second,
    "lt": lambda first, second: first < second,
    "le": lambda first, second: first <= second,
    "gt": lambda first, second: first > second,
    "ge": lambda first, second: first >= second,
    "and": _all,
    "or": _any,
    "not": lambda value: not _truth(value),
}
