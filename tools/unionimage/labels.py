"""Labels of images, containers, volumes and networks, as filters ask for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class LabelText(str):
    """Labels as listings show them; a template's `.Label "NAME"` asks for one of the table."""

    table: Mapping[str, str]

    def __new__(cls, table: Mapping[str, str] | None) -> LabelText:
        """`A=1,B=2`."""
        table = table or {}
        text = super().__new__(cls, ",".join(f"{name}={value}" for name, value in table.items()))
        text.table = table
        return text


def has_labels(labels: Mapping[str, str], wanted: Iterable[str]) -> bool:
    """Whether each `NAME` or `NAME=VALUE` that is wanted is among the labels."""
    for text in wanted:
        name, equals, value = text.partition("=")
        if name not in labels or (equals and labels[name] != value):
            return False
    return True
