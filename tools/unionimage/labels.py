"""Labels of images, containers, volumes and networks, as filters ask for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def has_labels(labels: Mapping[str, str], wanted: Iterable[str]) -> bool:
    """Whether each `NAME` or `NAME=VALUE` that is wanted is among the labels."""
    for text in wanted:
        name, equals, value = text.partition("=")
        if name not in labels or (equals and labels[name] != value):
            return False
    return True
