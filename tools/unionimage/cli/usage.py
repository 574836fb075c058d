"""What `unionfuse system df` shows: what images, containers, volumes and cached steps take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unionimage.cli.common import human_ago, human_size, parse_time

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
    """A row for images, for containers, for volumes and for the build cache."""
    from unionimage.container import describe, volumes
    from unionimage.dockerfile.records import records

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
        cached = records(store)
    own = [record.size for record in cached if not record.shared]
    free = sum(size for diff_id, size in layers.items() if diff_id not in kept)
    known = engine.volumes.all()
    volume_sizes = {one["Name"]: volumes.size(one) for one in known}
    busy = [one for one in known if volumes.users_of(one["Name"], containers)]
    unused = sum(volume_sizes.values()) - sum(volume_sizes[one["Name"]] for one in busy)
    return [
        _line("Images", len(images), len(used_images), sum(layers.values()), free),
        _line("Containers", len(containers), len(running), sum(sizes.values()), idle),
        _line("Local Volumes", len(known), len(busy), sum(volume_sizes.values()), unused),
        _line("Build Cache", len(cached), len(cached) - len(own), sum(own), sum(own)),
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
    """Images, Containers, Volumes and BuildCache one by one: rows, and the columns to show."""
    return {
        "Images": (_images(engine), _IMAGE_COLUMNS),
        "Containers": (_containers(engine), _CONTAINER_COLUMNS),
        "Volumes": (_volumes(engine), {"Name": "VOLUME NAME", "Links": "LINKS", "Size": "SIZE"}),
        "BuildCache": (_build_cache(engine), _CACHE_COLUMNS),
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
_CACHE_COLUMNS = {
    "ID": "CACHE ID",
    "CacheType": "CACHE TYPE",
    "Size": "SIZE",
    "CreatedSince": "CREATED",
    "Shared": "SHARED",
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


def _build_cache(engine: Engine) -> Rows:
    from unionimage.dockerfile.records import records

    with engine.open_store() as store:
        return [
            {
                "ID": record.id[:12],
                "CacheType": record.type,
                "Size": human_size(record.size),
                "CreatedSince": human_ago(parse_time(record.created)),
                "Shared": str(record.shared).lower(),
            }
            for record in records(store)
        ]
