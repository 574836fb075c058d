"""The survey as one page of HTML that needs nothing but itself.

The data goes in as columns of JSON, compressed: a browser unpacks 200,000 entries in a moment, and
the file stays small. Everything in it is shown as text, never as HTML: names come from outside.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from unionimage.explore.survey import LayerSurvey, Survey, readable
from unionimage.image_config import History
from unionimage.store import Image

WORST = 1000  # paths in the table of wasted bytes
_PLACE = b"@DATA@"


def page(image: Image, survey: Survey, title: str) -> bytes:
    """The whole page, the same bytes for the same image and title.

    Args:
        title: what the image is called.
    """
    data = json.dumps(_table(image, survey, title), ensure_ascii=False, separators=(",", ":"))
    packed = gzip.compress(data.encode(), 6, mtime=0)
    frame = Path(__file__).with_name("explorer.html").read_bytes()
    before, found, after = frame.partition(_PLACE)
    assert found
    return before + base64.b64encode(packed) + after


def _table(image: Image, survey: Survey, title: str) -> dict[str, Any]:
    config = image.config
    return {
        "title": title,
        "id": image.id,
        "names": [name.familiar for name in image.names],
        "platform": str(config.platform),
        "created": config.created,
        "size": survey.size,
        "hidden": survey.hidden,
        "steps": _steps([step for step, _ in image.steps()], [s for _, s in image.steps()]),
        "layers": [_columns(layer) for layer in survey.layers],
        "wasted": _worst(survey),
        "wastedPaths": len(survey.wasted),
    }


def _steps(history: Sequence[History], layers: Sequence[object | None]) -> list[dict[str, Any]]:
    """The history, oldest first; `layer` is the number of the layer that a step made, or null."""
    steps, number = [], 0
    for step, layer in zip_longest(history, layers):
        steps.append(
            {
                "by": step.created_by or step.comment,
                "created": step.created,
                "layer": None if layer is None else number,
            }
        )
        number += layer is not None
    return steps


def _columns(layer: LayerSurvey) -> dict[str, Any]:
    """A layer's entries by column; names are joined by `/`, which no name has."""
    owners: dict[tuple[int, int], int] = {}
    entries = layer.entries
    return {
        "id": layer.diff_id,
        "size": layer.size,
        "names": "/".join(readable(entry.name) for entry in entries),
        "depth": [entry.depth for entry in entries],
        "kind": "".join(entry.kind for entry in entries),
        "change": "".join(entry.change for entry in entries),
        "bytes": [entry.size for entry in entries],
        "hides": {n: entry.hides for n, entry in enumerate(entries) if entry.hides},
        "mode": [entry.mode for entry in entries],
        "owner": [owners.setdefault(entry.owner, len(owners)) for entry in entries],
        "owners": [f"{uid}:{gid}" for uid, gid in owners],
        "targets": {n: readable(entry.target) for n, entry in enumerate(entries) if entry.target},
    }


def _worst(survey: Survey) -> list[list[Any]]:
    """The paths that waste most: path, layers, bytes in all, bytes that nobody sees."""
    worst = sorted(survey.wasted.items(), key=lambda item: (-item[1].hidden, item[0]))[:WORST]
    return [[readable(path), one.layers, one.total, one.hidden] for path, one in worst]
