"""What can be done with a container: create, start, stop, remove, and telling the truth about it.

`Engine` brings together what the other modules know. Every verb that looks at a container goes
through `refresh` first: a container whose monitor was killed, or that ran before the last boot, is
cleaned up there and its state made true.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unionimage.container import monitor, networks, prepare, rootless, runtime, slirp, volumes, wire
from unionimage.container.events import Events
from unionimage.container.state import ALIVE, Container, Containers, Record, now, remove_tree
from unionimage.errors import Conflict, NotFound, UserError

if TYPE_CHECKING:
    from unionimage.store import Image, Store

OpenStore = Callable[[], AbstractContextManager["Store"]]
REBOOTED = 255  # docker's exit code for what a reboot ended
KILLED = 137


class Engine:
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
            self._bury(container)

    def _bury(self, container: Container) -> None:
        """What a dead monitor left: processes, mounts, network, cgroup. Hold `locked()`."""
        state = container.state()
        if state["Status"] not in ALIVE or container.monitor_lives():
            return
        same_boot = state.get("BootId") == runtime.boot_id()
        if same_boot:
            self._kill_leftovers(container, state)
        else:
            self._forget_runtime(container)
        prepare.undo(container)
        message = "its monitor was killed" if same_boot else "the host was restarted"
        code = KILLED if same_boot else REBOOTED
        change = {"Status": "exited", "Pid": 0, "ExitCode": code, "FinishedAt": now()}
        container.write_state(state | change | {"Error": message})
        self.events.container(container, "die", exitCode=str(code))
        if container.host_config.get("AutoRemove"):
            self._delete(container, anonymous_volumes=True)

    def _kill_leftovers(self, container: Container, state: Record) -> None:
        pid = int(state.get("Pid") or 0)
        alive = monitor.started_by(pid, state.get("PidStart"))
        if networks.live(container)["Networks"] and not rootless.active():

            def teardown(namespace: str) -> None:
                with contextlib.suppress(UserError):
                    networks.disconnect(container, self.networks, namespace)

            if alive:
                teardown(f"/proc/{pid}/ns/net")
            else:
                prepare.with_fresh_network_namespace(teardown)
        if alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        prepare.kill_cgroup(container)
        if alive:
            _await_end(pid, state.get("PidStart"))
        with contextlib.suppress(UserError):
            runtime.find(container.record.get("Runtime")).delete(container.id, force=True)
        prepare.remove_cgroup(container)

    def _forget_runtime(self, container: Container) -> None:
        """Remove what a runtime noted before a reboot, where that is not on a tmpfs.

        Its own `delete` is not asked: the pids that it noted belong to others now.
        """
        with contextlib.suppress(UserError):
            chosen = runtime.find(container.record.get("Runtime"))
            remove_tree(Path(chosen.state, container.id))

    # ---- creating and starting

    def create(
        self, args: argparse.Namespace, image: Image, store: Store, *, detach: bool
    ) -> Container:
        """A new container of an image. Raises UserError; nothing is left half made."""
        from unionimage.container import create

        record = create.record(
            args, image.config.run.to_object(), str(image.id), self.containers, detach=detach
        )
        if args.runtime:
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
        store: Store | None = None,
    ) -> socket.socket | None:
        """Start a container; with `attach` (a `terminal.request`) a connection to it is returned.

        Raises UserError with docker's exit code; nothing is mounted or running then.
        """
        with container.locked():
            self._bury(container)
            container.reload()
            state = container.state()
            if state["Status"] in ALIVE or container.monitor_lives():
                raise Conflict(f"container {container.name} is {state['Status']} already")
            chosen = runtime.find(container.record.get("Runtime"))
            with contextlib.ExitStack() as stack:
                opened = store or stack.enter_context(self.open_store())
                prepare.prepare(container, opened, self.containers, console_size)
            kept = {"BootId": runtime.boot_id(), "RestartCount": 0, "StoppedByUser": False}
            container.write_state(state | kept | {"Error": ""})
            connection = self._spawn(container, chosen, attach)
        return connection

    def _spawn(
        self, container: Container, chosen: runtime.Runtime, attach: bytes | None
    ) -> socket.socket | None:
        """Fork the monitor and wait until it has started the process."""
        ours, theirs = socket.socketpair() if attach is not None else (None, None)
        if ours is not None and attach is not None:
            ours.sendall(attach)
        reader, writer = os.pipe2(os.O_CLOEXEC)
        gc.freeze()  # the child never touches what was made before: its pages stay shared
        pid = os.fork()
        if pid == 0:
            self._be_monitor(container, chosen, theirs, writer)
        os.close(writer)
        if theirs is not None:
            theirs.close()
        with os.fdopen(reader, "rb") as pipe:
            answer = pipe.readline()
        os.waitpid(pid, 0)
        if not answer:
            prepare.undo(container)
            raise UserError(f"the monitor of {container.name} died at its start", exit_code=125)
        told = json.loads(answer)
        if "error" in told:
            if ours is not None:
                ours.close()
            raise UserError(told["error"], exit_code=told["exit_code"])
        return ours

    def _be_monitor(
        self,
        container: Container,
        chosen: runtime.Runtime,
        first: socket.socket | None,
        ready: int,
    ) -> None:
        """The child's way: leave the command's session, keep the container, never return."""
        try:
            if os.fork() != 0:
                os._exit(0)
            os.setsid()
            os.chdir("/")
            log = os.open(
                container.run / "monitor.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600
            )
            null = os.open(os.devnull, os.O_RDWR)
            for target, source in ((0, null), (1, log), (2, log)):
                os.dup2(source, target)
            keep = sorted({ready} | ({first.fileno()} if first else set()))
            _close_all_but(keep)
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGQUIT):
                signal.signal(number, signal.SIG_IGN)
            signal.set_wakeup_fd(-1)
            monitor.Monitor(container, chosen, self._hooks(container), first, ready).run()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def _hooks(self, container: Container) -> monitor.Hooks:
        namespace = -1
        rootless_network: slirp.Connection | None = None

        def connect(pid: int) -> None:
            nonlocal namespace, rootless_network
            if rootless.active():
                ports = networks.live(container)["PortMappings"]
                rootless_network = slirp.Connection.start(pid, container.run, ports)
                return
            # kept open: the addresses are taken away when the process is long gone
            namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            if not networks.live(container)["Networks"]:
                prepare.reserve(container, self.networks, self.containers)
            networks.connect(container, self.networks, f"/proc/{os.getpid()}/fd/{namespace}")

        def disconnect() -> None:
            nonlocal namespace, rootless_network
            if rootless_network is not None:
                rootless_network.stop()
                rootless_network = None
            if namespace >= 0:
                with contextlib.suppress(UserError):
                    path = f"/proc/{os.getpid()}/fd/{namespace}"
                    networks.disconnect(container, self.networks, path)
                os.close(namespace)
                namespace = -1

        def event(action: str, **attributes: str) -> None:
            self.events.container(container, action, **attributes)

        return monitor.Hooks(
            connect=connect,
            disconnect=disconnect,
            unmount=lambda: prepare.undo(container),
            removed=lambda: self._delete(container, anonymous_volumes=True),
            event=event,
        )

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
            self._bury(container)
            prepare.undo(container)
            self._delete(container, anonymous_volumes=anonymous_volumes)

    def _delete(self, container: Container, *, anonymous_volumes: bool) -> None:
        points = [point for point in container.record["Mounts"] if point["Type"] == "volume"]
        self.containers.delete(container)
        self.events.container(container, "destroy")
        with self.open_store() as store:
            store.release(f"container:{container.id}")
        if anonymous_volumes:
            others = self.containers.all()
            for point in points:
                with contextlib.suppress(NotFound, Conflict):
                    if volumes.is_anonymous(self.volumes.find(point["Name"])):
                        self.volumes.remove(point["Name"], others)

    # ---- what is about many

    def prune_containers(self, labels: Sequence[str] = ()) -> tuple[list[str], int]:
        """Remove what does not run; ids and freed bytes are returned."""
        from unionimage.container import describe

        self.containers.sweep()
        removed, freed = [], 0
        for container in self.all():
            has = container.config.get("Labels") or {}
            if container.state()["Status"] in ALIVE:
                continue
            if all(describe.has_label(has, text) for text in labels):
                size = describe.writable_size(container)
                with contextlib.suppress(Conflict, NotFound):
                    self.remove(container)
                    removed.append(container.id)
                    freed += size
        return removed, freed

    def prune_volumes(self, *, named: bool = False) -> tuple[list[str], int]:
        """Remove volumes that no container has; names and freed bytes are returned."""
        removed, freed = [], 0
        containers = self.containers.all()
        for volume in self.volumes.all():
            name = str(volume["Name"])
            if (named or volumes.is_anonymous(volume)) and not volumes.users_of(name, containers):
                size = volumes.size(volume)
                self.volumes.remove(name, self.containers.all())
                removed.append(name)
                freed += size
        return removed, freed

    def prune_networks(self) -> list[str]:
        """Remove networks that no container has; their names are returned."""
        containers = self.containers.all()
        unused = [
            str(network["Name"])
            for network in self.networks.all()
            if network["Name"] not in networks.SPECIAL
            and not networks.users_of(network["Name"], containers)
        ]
        return [self.networks.remove(name, containers) for name in unused]

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
                prepare.reserve_one(container, self.networks, self.containers, network, asked)
                namespace = f"/proc/{container.state()['Pid']}/ns/net"
                networks.connect(container, self.networks, namespace, only=network["Name"])
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
                namespace = f"/proc/{container.state()['Pid']}/ns/net"
                networks.disconnect(container, self.networks, namespace, only=network["Name"])
                del live["Networks"][network["Name"]]
                networks.set_live(container, live)
            del container.record["Networks"][network["Name"]]
            container.save()
        details = {"container": container.id, "name": str(network["Name"])}
        self.events.write("network", "disconnect", network["Id"], details)

    @contextlib.contextmanager
    def root_of(self, container: Container, store: Store | None = None) -> Iterator[Path]:
        """A container's root file system as it is, for as long as the context lasts."""
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
                prepare.unmount(container.merged)


def _close_all_but(keep: list[int]) -> None:
    low = 3
    for descriptor in [*keep, 1 << 20]:
        os.closerange(low, descriptor)
        low = descriptor + 1


def _await_end(pid: int, start: int | None) -> None:
    """Wait until a killed process is gone; it is not our child."""
    import time

    for _ in range(200):
        if not monitor.started_by(pid, start):
            return
        time.sleep(0.01)
