"""What happened to containers: one JSON line each in STORE/events.json, docker's event objects."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from unionimage.container.state import Container

Event = dict[str, Any]

LARGEST_FILE = 8 << 20  # then it becomes events.json.1
POLL = 0.1


class Events:
    """The events of one store."""

    def __init__(self, store_root: Path) -> None:
        self._path = Path(store_root) / "events.json"

    def container(self, container: Container, action: str, **attributes: str) -> None:
        """Something happened to a container."""
        config = container.record["Config"]
        labels = config.get("Labels") or {}
        details = labels | {"image": config["Image"], "name": container.name} | attributes
        self.write("container", action, container.id, details)

    def write(self, kind: str, action: str, identity: str, attributes: Mapping[str, str]) -> None:
        """Append one event; an event log that cannot be written stops nobody."""
        moment = time.time_ns()
        event: Event = {
            "Type": kind,
            "Action": action,
            "Actor": {"ID": identity, "Attributes": dict(attributes)},
            "scope": "local",
            "time": moment // 1_000_000_000,
            "timeNano": moment,
        }
        line = json.dumps(event).encode() + b"\n"
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            descriptor = os.open(self._path, flags, 0o600)
            try:
                os.write(descriptor, line)
                if os.fstat(descriptor).st_size > LARGEST_FILE:
                    self._path.rename(f"{self._path}.1")
            finally:
                os.close(descriptor)
        except OSError:
            pass

    def read(
        self,
        since: int | None,
        until: int | None,
        *,
        going_on: Callable[[], bool] = lambda: True,
    ) -> Iterator[Event]:
        """Events from `since` (nanoseconds; None: from now on) to `until` (None: for ever)."""
        begin = time.time_ns() if since is None else since
        seen = begin - 1
        while True:
            stop = going_on() and (until is None or time.time_ns() <= until)
            for path in (Path(f"{self._path}.1"), self._path):
                for event in _events_of(path):
                    moment = int(event["timeNano"])
                    if moment > seen and (until is None or moment <= until):
                        seen = moment
                        yield event
            if not stop:
                return
            time.sleep(POLL)


def _events_of(path: Path) -> Iterator[Event]:
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue
