"""What `unionfuse system df` shows: what images, containers and volumes take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unionimage.cli.common import human_size

if TYPE_CHECKING:
    from unionimage.container.lifecycle import Engine

COLUMNS = {
    "Type": "TYPE",
    "TotalCount": "TOTAL",
    "Active": "ACTIVE",
    "Size": "SIZE",
    "Reclaimable": "RECLAIMABLE",
}

Rows = list[dict[str, Any]]


def summary(engine: Engine) -> Rows:
    """A row for images, for containers and for volumes."""
    from unionimage.container import describe, volumes

    containers = engine.all()
    running = [one for one in containers if one.state()["Status"] in ("running", "paused")]
    sizes = {one.id: describe.writable_size(one) for one in containers}
    idle = sum(size for key, size in sizes.items() if key not in {one.id for one in running})
    used_images = {one.record["Image"] for one in containers}
    with engine.open_store() as store:
        layers: dict[str, int] = {}
        images = store.images(all=True)
        for image in images:
            layers |= {diff_id: store.layer(diff_id).size for diff_id in image.diff_ids}
        kept = {
            diff_id
            for image in images
            if str(image.id) in used_images
            for diff_id in image.diff_ids
        }
    free = sum(size for diff_id, size in layers.items() if diff_id not in kept)
    known = engine.volumes.all()
    volume_sizes = {one["Name"]: volumes.size(one) for one in known}
    busy = [one for one in known if volumes.users_of(one["Name"], containers)]
    unused = sum(volume_sizes.values()) - sum(volume_sizes[one["Name"]] for one in busy)
    return [
        _line("Images", len(images), len(used_images), sum(layers.values()), free),
        _line("Containers", len(containers), len(running), sum(sizes.values()), idle),
        _line("Local Volumes", len(known), len(busy), sum(volume_sizes.values()), unused),
    ]


def _line(kind: str, total: int, active: int, size: int, free: int) -> dict[str, Any]:
    share = f" ({100 * free // size}%)" if size else ""
    return {
        "Type": kind,
        "TotalCount": str(total),
        "Active": str(active),
        "Size": human_size(size),
        "Reclaimable": human_size(free) + share,
    }


def in_detail(engine: Engine) -> dict[str, tuple[Rows, dict[str, str]]]:
    """Images, Containers and Volumes, each one by one: rows, and the columns to show."""
    return {
        "Images": (_images(engine), _IMAGE_COLUMNS),
        "Containers": (_containers(engine), _CONTAINER_COLUMNS),
        "Volumes": (_volumes(engine), {"Name": "VOLUME NAME", "Links": "LINKS", "Size": "SIZE"}),
    }


_IMAGE_COLUMNS = {
    "Repository": "REPOSITORY",
    "Tag": "TAG",
    "ID": "IMAGE ID",
    "CreatedSince": "CREATED",
    "Size": "SIZE",
    "SharedSize": "SHARED SIZE",
    "UniqueSize": "UNIQUE SIZE",
    "Containers": "CONTAINERS",
}
_CONTAINER_COLUMNS = {
    "ID": "CONTAINER ID",
    "Image": "IMAGE",
    "Command": "COMMAND",
    "LocalVolumes": "LOCAL VOLUMES",
    "Size": "SIZE",
    "RunningFor": "CREATED",
    "Status": "STATUS",
    "Names": "NAMES",
}


def _images(engine: Engine) -> Rows:
    from unionimage.cli.images import rows_of

    users = [str(one.record["Image"]) for one in engine.all()]
    with engine.open_store() as store:
        images = store.images(all=True)
        holders: dict[str, int] = {}
        for image in images:
            for diff_id in set(image.diff_ids):
                holders[diff_id] = holders.get(diff_id, 0) + 1
        rows: Rows = []
        for image in images:
            shared = sum(one.size for one in image.layers if holders[one.diff_id] > 1)
            exact = {
                "SharedSize": human_size(shared),
                "UniqueSize": human_size(image.size - shared),
                "Containers": str(users.count(str(image.id))),
            }
            rows += [row | exact for row in rows_of(image, False, False, None, {})]
    return rows


def _containers(engine: Engine) -> Rows:
    from unionimage.cli.ps import row_of
    from unionimage.container import describe

    return [row_of(one, False, human_size(describe.writable_size(one))) for one in engine.all()]


def _volumes(engine: Engine) -> Rows:
    from unionimage.container import volumes

    containers = engine.all()
    return [
        {
            "Name": one["Name"],
            "Links": str(len(volumes.users_of(one["Name"], containers))),
            "Size": human_size(volumes.size(one)),
        }
        for one in engine.volumes.all()
    ]
