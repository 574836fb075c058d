"""Docker's oldest archive: a directory a layer with `VERSION`, `json` and `layer.tar`.

There is no manifest and no config: each `json` names its parent and holds what `docker commit`
knew, from which a config is made as docker itself does (moby, image/v1/imagev1.go).
"""

from __future__ import annotations

from typing import Any

from unionimage.archive.sources import Source
from unionimage.digest import Digest
from unionimage.errors import BadContent
from unionimage.image_config import ImageConfig
from unionimage.json_object import dump, load_object
from unionimage.reference import Reference
from unionimage.store import Image, Lease

_MAX_PARENTS = 1000
_DROPPED = ("id", "parent", "Size", "parent_id", "layer_id", "throwaway", "container_config")


def load(lease: Lease, source: Source) -> list[tuple[Image, list[Reference]]]:
    """Load the images that `repositories` names, or without it those that are no one's parent.

    Returns: each with the names that the archive gives it.
    """
    return [
        (_load_image(lease, source, tip, references), references)
        for tip, references in _tips(source).items()
    ]


def _tips(source: Source) -> dict[str, list[Reference]]:
    tips: dict[str, list[Reference]] = {}
    data = source.text("repositories")
    if data is not None:
        for repository, tags in load_object(data, "repositories").items():
            if not isinstance(tags, dict):
                raise BadContent("repositories in the archive is not a table of tags")
            for tag, identity in tags.items():
                tips.setdefault(str(identity), []).append(Reference.parse(f"{repository}:{tag}"))
    if not tips:
        all_of_them = [name.split("/")[0] for name in source.names() if name.endswith("/layer.tar")]
        parents = {_json(source, identity).get("parent") for identity in all_of_them}
        tips = {identity: [] for identity in all_of_them if identity not in parents}
    return tips


def _json(source: Source, identity: str) -> dict[str, Any]:
    data = source.text(f"{identity}/json")
    if data is None:
        raise BadContent(f"the archive lacks {identity}/json")
    return load_object(data, f"{identity}/json")


def _load_image(lease: Lease, source: Source, tip: str, references: list[Reference]) -> Image:
    chain: list[dict[str, Any]] = []
    diff_ids: list[Digest] = []
    identity: Any = tip
    while identity:
        if len(chain) >= _MAX_PARENTS:
            raise BadContent(f"image {tip[:12]} in the archive has parents without end")
        table = _json(source, str(identity))
        chain.insert(0, table)
        diff_ids.insert(0, source.layer(f"{identity}/layer.tar", None, None, None).diff_id)
        identity = table.get("parent")
    config = {key: value for key, value in chain[-1].items() if key not in _DROPPED}
    config["rootfs"] = {"type": "layers", "diff_ids": diff_ids}
    config["history"] = [_history(table) for table in chain]
    config.setdefault("architecture", "amd64")
    config.setdefault("os", "linux")
    data = dump(config)
    ImageConfig.from_json(data)
    return lease.add_image(data, names=references)


def _history(table: dict[str, Any]) -> dict[str, Any]:
    made_by = table.get("container_config")
    command = made_by.get("Cmd") if isinstance(made_by, dict) else None
    step = {
        "created": table.get("created"),
        "created_by": " ".join(map(str, command)) if isinstance(command, list) else None,
        "author": table.get("author"),
        "comment": table.get("comment"),
    }
    return {key: value for key, value in step.items() if isinstance(value, str) and value}
