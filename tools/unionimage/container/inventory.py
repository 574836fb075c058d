"""What one store has of containers, volumes, networks and events, and taking a container off it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from unionimage.container import networks, volumes
from unionimage.container.events import Events
from unionimage.container.state import Container, Containers
from unionimage.errors import Conflict, NotFound

if TYPE_CHECKING:
    from unionimage.store import Store

OpenStore = Callable[[], AbstractContextManager["Store"]]


class Inventory:
    """All containers, volumes and networks of one store.

    `open_store` is called only where images are needed: most verbs do without.
    """

    def __init__(self, root: Path, open_store: OpenStore) -> None:
        self.root = root
        self.open_store = open_store
        self.containers = Containers(root)
        self.volumes = volumes.Volumes(root)
        self.networks = networks.Networks(root)
        self.events = Events(root)

    def delete(self, container: Container, *, anonymous_volumes: bool) -> None:
        """Remove what is left of a container that is stopped and cleaned up."""
        from unionimage.store.holds import release

        points = [point for point in container.record["Mounts"] if point["Type"] == "volume"]
        self.containers.delete(container)
        self.events.container(container, "destroy")
        release(self.root, f"container:{container.id}")
        if anonymous_volumes:
            others = self.containers.all()
            for point in points:
                with contextlib.suppress(NotFound, Conflict):
                    if volumes.is_anonymous(self.volumes.find(point["Name"])):
                        self.volumes.remove(point["Name"], others)
