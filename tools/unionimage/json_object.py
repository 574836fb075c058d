"""JSON as this program writes it, and JSON that came from somewhere: parsed with suspicion, members
taken by type.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from unionimage.digest import MAX_JSON
from unionimage.errors import BadContent

T = TypeVar("T")

NO_MAP: Mapping[str, Any] = MappingProxyType({})


def dump(value: Any) -> bytes:
    """JSON as this program writes it: compact, key order as given, so digests are stable."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def json_line(value: Any) -> str:
    """JSON for people and scripts: in one line and without spaces, as docker writes it."""
    return json.dumps(value, default=str, ensure_ascii=False, separators=(",", ":"))


def load_object(data: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object; one of another kind, too large or ambiguous raises BadContent."""
    if len(data) > MAX_JSON:
        raise BadContent(f"{what} has {len(data)} bytes; more than {MAX_JSON} are refused")
    try:
        value = json.loads(data, object_pairs_hook=lambda pairs: _unique(pairs, what))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise BadContent(f"{what} is not JSON: {reason}") from None
    if not isinstance(value, dict):
        raise BadContent(f"{what} is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]], what: str) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise BadContent(f"{what} has a key twice")
    return table


def member(table: Mapping[str, Any], key: str, kind: type[T], default: T | None, what: str) -> Any:
    """A member of that JSON type; absent and null give the default (None: it is required)."""
    value = table.get(key)
    if value is None:
        if default is None:
            raise BadContent(f"{what} lacks {key!r}")
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadContent(f"{what}: {key!r} is not a {_NAMES[kind]}")
    return value


_NAMES = {str: "string", int: "number", list: "list", dict: "JSON object", bool: "truth value"}


def strings(table: Mapping[str, Any], key: str, what: str) -> tuple[str, ...]:
    values = member(table, key, list, [], what)
    if not all(isinstance(value, str) for value in values):
        raise BadContent(f"{what}: {key!r} is not a list of strings")
    return tuple(values)


def string_map(table: Mapping[str, Any], key: str, what: str) -> Mapping[str, str]:
    values = member(table, key, dict, {}, what)
    if not all(isinstance(value, str) for value in values.values()):
        raise BadContent(f"{what}: {key!r} does not map to strings")
    return MappingProxyType(dict(values)) if values else NO_MAP


def put(table: dict[str, Any], key: str, value: Any) -> None:
    if value:
        table[key] = value
