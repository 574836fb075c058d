"""What can be done with a container: create, start, stop, remove, and telling the truth about it.

`Engine` brings together what the other modules know. Every verb that looks at a container goes
through `refresh` first: a container whose monitor was killed, or that ran before the last boot, is
cleaned up there and its state made true.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unionimage.container import networks, volumes, wire
from unionimage.container.inventory import Inventory
from unionimage.container.state import ALIVE, Container
from unionimage.errors import Conflict, NotFound, UserError
from unionimage.labels import has_labels

if TYPE_CHECKING:
    from unionimage.store import Image, Store

START_PATIENCE = 10.0  # seconds


class Engine(Inventory):
    """The verbs, on what there is of one store."""

    # ---- looking

    def find(self, text: str) -> Container:
        """A container by name or id, its state made true. Raises NotFound."""
        container = self.containers.find(text)
        self.refresh(container)
        if not container.directory.exists():
            raise NotFound(f"no such container: {text}")
        return container

    def all(self) -> list[Container]:
        """Every container, the youngest first, their states made true."""
        found = self.containers.all()
        for container in found:
            self.refresh(container)
        return [container for container in found if container.directory.exists()]

    def refresh(self, container: Container) -> None:
        """If the state says that it runs and nobody keeps it, clean up and write what is true."""
        if container.state()["Status"] not in ALIVE or container.monitor_lives():
            return
        with contextlib.suppress(NotFound), container.locked():
            from unionimage.container import remains

            remains.bury(self, container)

    # ---- creating and starting

    def create(
        self, args: argparse.Namespace, image: Image, store: Store, *, detach: bool
    ) -> Container:
        """A new container of an image. Raises UserError; nothing is left half made."""
        from unionimage.container import create

        record = create.record(
            args, image.config.run.to_object(), str(image.id), self.containers, detach=detach
        )
        record["MountDriver"] = record["MountDriver"] or store.config.driver
        if args.runtime:
            from unionimage.container import runtime

            runtime.find(args.runtime)
        cidfile = args.cidfile
        if cidfile and os.path.lexists(cidfile):
            raise UserError(f"--cidfile {cidfile} exists: remove it or choose another")
        for name in record["Networks"]:
            self.networks.find(name)
        made = []
        try:
            for point in record["Mounts"]:
                if point["Type"] == "volume" and not point["Source"]:
                    volume, new = self.volumes.create(point["Name"])
                    made += [volume["Name"]] if new else []
                    point["Name"], point["Source"] = volume["Name"], volume["Mountpoint"]
            store.hold(owner=f"container:{record['Id']}", image=image)
            container = self.containers.create(record)
        except BaseException:
            store.release(f"container:{record['Id']}")
            for name in made:
                self.volumes.remove(name, ())
            raise
        if cidfile:
            try:
                Path(cidfile).write_text(container.id)
            except OSError as error:
                self.remove(container, anonymous_volumes=True)
                raise UserError(f"--cidfile {cidfile}: {error.strerror}") from None
        self.events.container(container, "create")
        return container

    def start(
        self,
        container: Container,
        *,
        attach: bytes | None = None,
        console_size: tuple[int, int] | None = None,
    ) -> socket.socket | None:
        """Start a container; with `attach` (a `terminal.request`) a connection to it is returned.

        Raises UserError with docker's exit code; nothing is mounted or running then.
        """
        from unionimage.container import starting

        return starting.start(self, container, attach=attach, console_size=console_size)

    # ---- stopping

    def ask(self, container: Container, **request: Any) -> dict[str, Any]:
        """Ask the monitor of a running container. Raises Conflict when it does not run."""
        if container.state()["Status"] in ALIVE:
            try:
                return wire.ask(container.control, request)
            except ConnectionError:
                self.refresh(container)
        raise Conflict(f"container {container.name} is not running")

    def stop(
        self, container: Container, timeout: int | None = None, number: int | None = None
    ) -> None:
        """Stop signal, then SIGKILL; returns when it has ended. Fine when it does not run."""
        if container.state()["Status"] not in ALIVE:
            return
        with contextlib.suppress(Conflict):
            self.ask(container, op="stop", timeout=timeout, signal=number)
            self.events_of_stop(container)

    def events_of_stop(self, container: Container) -> None:
        if container.directory.exists():
            self.events.container(container, "stop")

    def wait(self, container: Container) -> int:
        """Wait for the end; the exit code is returned."""
        if container.state()["Status"] in ALIVE:
            with contextlib.suppress(Conflict):
                return int(self.ask(container, op="wait")["exit_code"])
        return int(container.state().get("ExitCode", 0))

    # ---- removing

    def remove(
        self, container: Container, *, force: bool = False, anonymous_volumes: bool = False
    ) -> None:
        """Remove a container. Raises Conflict when it runs, unless `force` kills it."""
        _await_start(container)
        if container.state()["Status"] in ALIVE:
            if not force:
                raise Conflict(
                    f"cannot remove container {container.name}: it is"
                    f" {container.state()['Status']}; stop it before, or use -f"
                )
            self.stop(container, timeout=0, number=signal.SIGKILL)
        with contextlib.suppress(NotFound), container.locked():
            if container.monitor_lives() and container.state()["Status"] in ALIVE:
                raise Conflict(f"container {container.name} was started meanwhile")
            self._put_away(container)
            self.delete(container, anonymous_volumes=anonymous_volumes)

    def _put_away(self, container: Container) -> None:
        """Clean up after a dead monitor, or a command that was killed while it started one."""
        from unionimage.container import remains

        if container.state()["Status"] in ALIVE:
            remains.bury(self, container)
        remains.clear(self, container)

    # ---- what is about many

    def prune_containers(self, labels: Sequence[str] = ()) -> tuple[list[str], int]:
        """Remove what does not run; ids and freed bytes are returned."""
        from unionimage.container import describe

        self.containers.sweep()
        removed, freed = [], 0
        for container in self.all():
            if container.state()["Status"] in ALIVE:
                continue
            if has_labels(container.config.get("Labels") or {}, labels):
                size = describe.writable_size(container)
                with contextlib.suppress(Conflict, NotFound):
                    self.remove(container)
                    removed.append(container.id)
                    freed += size
        return removed, freed

    def prune_volumes(
        self, labels: Sequence[str] = (), *, named: bool = False
    ) -> tuple[list[str], int]:
        """Remove volumes that no container has; names and freed bytes are returned."""
        removed, freed = [], 0
        containers = self.containers.all()
        for volume in self.volumes.all():
            name = str(volume["Name"])
            if not has_labels(volume["Labels"], labels):
                continue
            if (named or volumes.is_anonymous(volume)) and not volumes.users_of(name, containers):
                size = volumes.size(volume)
                self.volumes.remove(name, self.containers.all())
                removed.append(name)
                freed += size
        return removed, freed

    def prune_networks(self, labels: Sequence[str] = ()) -> list[str]:
        """Remove networks that no container has; their names are returned."""
        containers = self.containers.all()
        unused = [
            str(network["Name"])
            for network in self.networks.all()
            if network["Name"] not in networks.SPECIAL
            and not networks.users_of(network["Name"], containers)
            and has_labels(network["Labels"], labels)
        ]
        from unionimage.container import netavark

        removed = [self.remove_network(name, containers) for name in unused]
        netavark.put_away()
        return removed

    def remove_network(self, text: str, containers: Sequence[Container]) -> str:
        """Remove a network that no container has, and its bridge; its name is returned."""
        from unionimage.container import netavark

        bridge = self.networks.find(text).get("Interface")
        name = self.networks.remove(text, containers)
        netavark.put_away(str(bridge))
        return name

    def to_autostart(self) -> list[Container]:
        """What should run after a boot, the oldest first."""
        wanted = []
        for container in reversed(self.all()):
            policy = (container.host_config.get("RestartPolicy") or {}).get("Name")
            state = container.state()
            if state["Status"] in ALIVE or state["Status"] == "created":
                continue
            stopped = state.get("StoppedByUser")
            if policy == "always" or (policy == "unless-stopped" and not stopped):
                wanted.append(container)
        return wanted

    def shut_down(self) -> None:
        """Stop all that run, side by side; `to_autostart` finds them again."""
        from concurrent.futures import ThreadPoolExecutor

        running = [one for one in self.all() if one.state()["Status"] in ALIVE]
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(self.stop, running))
        for container in running:
            with contextlib.suppress(NotFound), container.locked():
                container.write_state(container.state() | {"StoppedByUser": False})

    def connect(
        self, container: Container, name: str, address: str | None, aliases: Sequence[str]
    ) -> None:
        """Put a container on one more network, at once if it runs."""
        network = self.networks.find(name)
        if container.record["NetworkMode"] != "engine" or network["Name"] in ("none", "host"):
            raise UserError(f"container {container.name} cannot be on {name} besides its network")
        with container.locked():
            container.reload()
            if network["Name"] in container.record["Networks"]:
                raise Conflict(
                    f"container {container.name} is on network {network['Name']} already"
                )
            asked = {"Aliases": list(aliases), "WantedIP": address}
            container.record["Networks"][network["Name"]] = asked
            if container.state()["Status"] in ("running", "paused"):
                from unionimage.container import netavark, prepare

                prepare.reserve_one(container, self.networks, self.containers, network, asked)
                namespace = f"/proc/{container.state()['Pid']}/ns/net"
                only = netavark.input_for(container, self.networks, network["Name"])
                netavark.connect(container, namespace, only)
            container.save()
        self.events.write(
            "network",
            "connect",
            network["Id"],
            {"container": container.id, "name": network["Name"]},
        )

    def disconnect(self, container: Container, name: str) -> None:
        """Take a container off a network, at once if it runs."""
        network = self.networks.find(name)
        with container.locked():
            container.reload()
            if network["Name"] not in container.record["Networks"]:
                raise UserError(f"container {container.name} is not on network {network['Name']}")
            live = networks.live(container)
            if network["Name"] in live["Networks"]:
                from unionimage.container import netavark

                namespace = f"/proc/{container.state()['Pid']}/ns/net"
                only = netavark.input_for(container, self.networks, network["Name"])
                netavark.disconnect(namespace, only)
                del live["Networks"][network["Name"]]
                networks.set_live(container, live)
            del container.record["Networks"][network["Name"]]
            container.save()
        details = {"container": container.id, "name": str(network["Name"])}
        self.events.write("network", "disconnect", network["Id"], details)

    @contextlib.contextmanager
    def root_of(self, container: Container, store: Store | None = None) -> Iterator[Path]:
        """A container's root file system as it is, for as long as the context lasts."""
        from unionimage.container import prepare

        state = container.state()
        if state["Status"] in ("running", "paused"):
            yield Path(f"/proc/{state['Pid']}/root")
            return
        with container.locked(), contextlib.ExitStack() as stack:
            container.run.mkdir(mode=0o711, parents=True, exist_ok=True)
            container.merged.mkdir(exist_ok=True)
            opened = store or stack.enter_context(self.open_store())
            prepare.mount_root(container, opened)
            try:
                yield container.merged
            finally:
                prepare.unmount_root(container)


def _await_start(container: Container) -> None:
    """A monitor goes on with its start when the command that asked for it was killed."""
    deadline = time.monotonic() + START_PATIENCE
    while container.monitor_lives() and container.state()["Status"] not in ALIVE:
        if time.monotonic() > deadline:
            return
        time.sleep(0.005)
