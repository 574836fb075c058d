"""What has to be there before a container's process: root file system, volumes, files, bundle.

`prepare` makes it all or nothing; `undo` takes away what must not outlive the process. Both run in
the command that starts a container; `undo` also in its monitor, at the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unionimage.container import (
    bundle,
    files,
    netavark,
    networks,
    rootless,
    sleeping,
    slirp,
    users,
    volumes,
)
from unionimage.container.bundle import Mount, Namespaces, Surroundings
from unionimage.container.state import Container, Containers, replace_file
from unionimage.errors import Conflict, UserError

if TYPE_CHECKING:
    from unionfuse import mounting
    from unionimage.store import Store

INITS = ("docker-init", "tini-static", "catatonit", "tini")
COPY_PATIENCE = 0.5  # seconds after which a daemon that was unmounted is told to end
DAEMON_PATIENCE = 30.0  # seconds; it may have to write back a large mapped file
EPHEMERAL = range(32768, 61000)


def prepare(
    container: Container,
    store: Store,
    containers: Containers,
    console_size: tuple[int, int] | None = None,
    *,
    reserved: Callable[[], None],
) -> None:
    """Make everything ready for the runtime. Raises UserError; then nothing is left.

    Args:
        reserved: is called once the addresses are noted, if there are any.
    """
    container.run.mkdir(mode=0o711, parents=True, exist_ok=True)
    container.bundle.mkdir(exist_ok=True)
    container.merged.mkdir(exist_ok=True)
    known = networks.Networks(containers.root)
    known_volumes = volumes.Volumes(containers.root)
    for point in container.record["Mounts"]:
        _check_source(point, known_volumes)
    try:
        if container.record["NetworkMode"] == "engine":
            (slirp.program if rootless.active() else netavark.program)()
            reserve(container, known, containers)
            reserved()
        mount_root(container, store)
        for point in container.record["Mounts"]:
            volumes.fill(point, container.merged, _owner_of_root(container))
        _write_files(container, known, containers)
        spec = bundle.container(
            container.config, container.host_config, _surroundings(container, containers)
        )
        if console_size and container.config.get("Tty"):
            rows, columns = console_size
            spec["process"]["consoleSize"] = {"height": rows, "width": columns}
        _make_mount_points(container, spec)
        bundle.write(container.bundle, spec)
    except BaseException:
        undo(container)
        raise


def undo(container: Container) -> None:
    """Unmount, and give addresses back. Does nothing where nothing was done.

    A container that is removed next need not wait for its file system's daemon to end.
    """
    if container.host_config.get("AutoRemove"):
        unmount(container.merged)
    else:
        unmount_root(container)
    unmount(container.run / "shm")
    networks.forget_live(container)


def unmount_root(container: Container) -> None:
    """Unmount the root file system and wait until its daemon has put everything away.

    The daemon holds a lock on the work directory as long as upper is its own. It goes on as long as
    there is a copy of the mount in somebody's mount namespace; then it is told to end.
    """
    mount = unmount(container.merged)
    if mount is None:
        return
    try:
        descriptor = os.open(container.work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not _locked_within(descriptor, COPY_PATIENCE):
            _end_daemon(mount, descriptor)
            _locked_within(descriptor, DAEMON_PATIENCE)
    finally:
        os.close(descriptor)


def _locked_within(descriptor: int, seconds: float) -> bool:
    """Whether nobody else holds a lock on what is open there, at the latest in so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)


def _end_daemon(mount: mounting.Mount, lock: int) -> None:
    """Tell the daemon to end that served what was unmounted, if it still holds the lock."""
    from unionfuse import mounting

    daemon = mounting.daemon_of(mount)
    if daemon is None:
        return
    try:
        # While the lock was held nobody else can have got the number of the connection.
        if not _locked_within(lock, 0.0):
            signal.pidfd_send_signal(daemon, signal.SIGTERM)
    except ProcessLookupError:
        pass
    finally:
        os.close(daemon)


def unmount(path: Path) -> mounting.Mount | None:
    """Unmount, at once or as soon as nobody uses it; None when nothing was mounted there."""
    from unionfuse import mounting

    place = os.fsencode(path)
    mount = mounting.mount_at(place)
    if mount is None:
        return None
    try:
        mounting.detach(place)
    except mounting.MountError:
        with contextlib.suppress(mounting.MountError):
            mounting.detach(place, lazy=True)
    return mount


def mount_root(container: Container, store: Store) -> None:
    from unionimage import mounts

    image = store.image(str(container.record["Image"]))
    driver = container.record.get("MountDriver") or store.config.driver
    after = sleeping.after() if driver == "fuse" else None
    mounts.mount_chain(
        store,
        image.diff_ids,
        container.merged,
        upper=container.upper,
        work=container.work,
        driver=driver,
        options=[
            *([f"sleep={after}"] if after else []),
            *(["xattr_permissions=2"] if rootless.active() else []),
            *(
                f"{kind}="
                + ":".join(f"{inside}:{outside}:{size}" for inside, outside, size in table)
                for kind in ("uidmapping", "gidmapping")
                if (table := container.record["IdMappings"])
            ),
        ],
        register=False,
    )


def _owner_of_root(container: Container) -> int:
    """Who on the host is the container's root."""
    return next((outside for inside, outside, _ in container.record["IdMappings"] if not inside), 0)


def _make_mount_points(container: Container, spec: bundle.Spec) -> None:
    """Make and note the mount points that are not in the image: they are no change of it.

    The runtime would make them, too, but change the times of the directories that they lie in. What
    lies below another mount is left to it, and so is what cannot be made here.
    """
    file = container.directory / "mount-points"
    known = set(file.read_text().split("\0")) if file.exists() else set()
    made: set[str] = set()
    points = {str(mount["destination"]).strip("/"): mount for mount in spec["mounts"]}
    for point in (*points, str(spec["process"]["cwd"]).strip("/")):
        above = point
        missing = []
        while above and not _exists_inside(container.merged, above):
            missing.append(above)
            above = os.path.dirname(above)
            if above in points:
                missing.clear()
        source = str(points.get(point, {}).get("source", "/"))
        for path in reversed(missing):
            is_file = path == point and source.startswith("/") and not os.path.isdir(source)
            with contextlib.suppress(OSError):
                _make_mount_point(container, path, is_file)
                made.add(path)
    if made - known:
        replace_file(file, "\0".join(sorted(made | known)))


def _make_mount_point(container: Container, path: str, is_file: bool) -> None:
    above, name = os.path.split(path)
    directory = users.open_inside(container.merged, above or ".", os.O_PATH | os.O_DIRECTORY)
    try:
        times = os.stat(directory)
        if is_file:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
            os.close(os.open(name, flags, 0o644, dir_fd=directory))
        else:
            os.mkdir(name, 0o755, dir_fd=directory)
        if owner := _owner_of_root(container):
            os.chown(name, owner, owner, dir_fd=directory, follow_symlinks=False)
        os.utime(f"/proc/self/fd/{directory}", ns=(times.st_atime_ns, times.st_mtime_ns))
    finally:
        os.close(directory)


def _exists_inside(root: Path, path: str) -> bool:
    try:
        os.close(users.open_inside(root, path, os.O_PATH | os.O_NOFOLLOW))
    except OSError:
        return False
    return True


def _check_source(point: dict[str, Any], known: volumes.Volumes) -> None:
    if point["Type"] == "bind" and not os.path.exists(point["Source"]):
        raise UserError(f"bind source path does not exist: {point['Source']}")
    if point["Type"] == "volume" and not os.path.isdir(point["Source"]):
        known.create(point["Name"])  # its container was there, somebody removed the directory


# ---- addresses and ports


def reserve(container: Container, known: networks.Networks, containers: Containers) -> None:
    """Addresses and host ports for this run, written where other commands see them."""
    with known.locked():
        others = [one for one in containers.all() if one.id != container.id]
        entries: dict[str, dict[str, Any]] = {}
        for name, asked in container.record["Networks"].items():
            network = known.find(name)
            entries[network["Name"]] = _entry(known, network, others, asked, entries)
        mappings = _port_mappings(container, others)
        networks.set_live(container, {"Networks": entries, "PortMappings": mappings})


def reserve_one(
    container: Container,
    known: networks.Networks,
    containers: Containers,
    network: networks.Network,
    asked: Mapping[str, Any],
) -> None:
    """An address on one more network, for a container that runs."""
    with known.locked():
        others = [one for one in containers.all() if one.id != container.id]
        live = networks.live(container)
        entry = _entry(known, network, others, asked, live["Networks"])
        live["Networks"][network["Name"]] = entry
        networks.set_live(container, live)


def _entry(
    known: networks.Networks,
    network: networks.Network,
    others: Sequence[Container],
    asked: Mapping[str, Any],
    entries: Mapping[str, Any],
) -> dict[str, Any]:
    if rootless.active():
        if network["Name"] != networks.DEFAULT:
            raise UserError(
                f"network {network['Name']} needs root: without it there are bridge, none and host"
            )
        return {
            "IPAddress": slirp.ADDRESS,
            "Aliases": [],
            "Interface": "eth0",
            "Gateway": slirp.GATEWAY,
            "NetworkID": network["Id"],
        }
    taken = {entry["Interface"] for entry in entries.values()}
    return {
        "IPAddress": known.take_address(network, others, asked.get("WantedIP")),
        "Aliases": asked.get("Aliases") or [],
        "MacAddress": asked.get("MacAddress"),
        "Interface": next(name for n in range(99) if (name := f"eth{n}") not in taken),
        "Gateway": network["IPAM"]["Config"][0]["Gateway"],
        "NetworkID": network["Id"],
    }


def _port_mappings(container: Container, others: Sequence[Container]) -> list[dict[str, Any]]:
    wanted = dict(container.host_config.get("PortBindings") or {})
    if container.host_config.get("PublishAllPorts"):
        for port in container.config.get("ExposedPorts") or {}:
            wanted.setdefault(port, [{"HostIp": "", "HostPort": ""}])
    taken = {
        (mapping["protocol"], mapping["host_port"])
        for other in others
        for mapping in networks.live(other)["PortMappings"]
    }
    mappings: list[dict[str, Any]] = []
    for port, bindings in wanted.items():
        number, _, protocol = port.partition("/")
        for binding in bindings:
            host_port = _host_port(binding, protocol, taken)
            taken.add((protocol, host_port))
            mappings.append(
                {
                    "container_port": int(number),
                    "host_ip": binding["HostIp"],
                    "host_port": host_port,
                    "protocol": protocol,
                    "range": 1,
                }
            )
    return mappings


def _host_port(binding: Mapping[str, str], protocol: str, taken: set[tuple[str, int]]) -> int:
    """The port of a binding if it is free, any free one if it names none. Raises Conflict."""
    address = binding["HostIp"]
    if binding["HostPort"]:
        port = int(binding["HostPort"])
        reason = _why_taken(address, port, protocol)
        if (protocol, port) in taken or reason:
            shown = address or "0.0.0.0"
            reason = reason or "port is already allocated"
            raise Conflict(f"bind for {shown}:{port} failed: {reason}", exit_code=125)
        return port
    for port in EPHEMERAL:
        if (protocol, port) not in taken and not _why_taken(address, port, protocol):
            return port
    raise UserError("no free port left on this host", exit_code=125)


def _why_taken(address: str, port: int, protocol: str) -> str:
    """Why the port cannot be bound on this host; empty when it can."""
    kind = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}.get(protocol)
    if kind is None:
        return ""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, kind) as probe:
        if kind == socket.SOCK_STREAM:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
            if kind == socket.SOCK_STREAM:
                probe.listen(1)
        except OSError as error:
            taken = error.errno == 98  # EADDRINUSE
            return "port is already allocated" if taken else str(error.strerror).lower()
    return ""


# ---- surroundings


def _write_files(container: Container, known: networks.Networks, containers: Containers) -> None:
    mode = str(container.record["NetworkMode"])
    if mode.startswith("container:"):
        import shutil

        other = running(containers, mode)
        for name in files.NAMES:
            shutil.copyfile(other.directory / name, container.directory / name)
        return
    entries = networks.live(container)["Networks"]
    servers = [slirp.NAME_SERVER] if entries and rootless.active() else []
    for name, entry in entries.items():
        if not servers and known.find(name).get("DNS") and netavark.names_program():
            servers.append(entry["Gateway"])
    addresses = [entry["IPAddress"] for entry in entries.values()]
    if mode == "none":
        addresses = []
    gateway = next((entry["Gateway"] for entry in entries.values()), None)
    files.write(
        container.directory,
        container.config,
        container.host_config,
        addresses=addresses,
        gateway=gateway,
        servers=servers,
        host_network=mode == "host",
    )


def running(containers: Containers, mode: str) -> Container:
    """The container that `container:ID` means. Raises UserError unless it runs."""
    other = containers.find(mode.partition(":")[2])
    if other.state()["Status"] not in ("running", "paused") or not other.monitor_lives():
        raise UserError(f"cannot join container {other.name}: it is not running")
    return other


def _surroundings(container: Container, containers: Containers) -> Surroundings:
    host_config = container.host_config
    mounts = [volumes.mount_of(point) for point in container.record["Mounts"]]
    mounts.sort(key=lambda mount: mount.destination.count("/"))
    taken = [mount.destination for mount in mounts]
    mounts = [*_shared_memory(container, containers), *mounts]
    mounts += files.mounts(container.directory, taken)
    hostname = str(container.config["Hostname"])
    if host_config.get("UTSMode") == "host" or container.record["NetworkMode"] == "host":
        hostname = socket.gethostname() if host_config.get("UTSMode") == "host" else hostname
    parent = str(container.record["CgroupParent"]).strip("/")
    return Surroundings(
        root=container.merged,
        cgroup=f"/{parent}/{container.id}",
        hostname=hostname,
        namespaces=_namespaces(container, containers),
        mounts=mounts,
        id_mappings=[tuple(row) for row in container.record["IdMappings"]],
        init=_init_program() if host_config.get("Init") else None,
    )


def _namespaces(container: Container, containers: Containers) -> Namespaces:
    host_config = container.host_config

    def joined(mode: str, kind: str) -> str:
        if mode.startswith("container:"):
            return f"/proc/{running(containers, mode).state()['Pid']}/ns/{kind}"
        return "host" if mode == "host" else ""

    return Namespaces(
        pid=joined(str(host_config.get("PidMode") or ""), "pid"),
        network=joined(str(container.record["NetworkMode"]), "net"),
        ipc=joined(str(host_config.get("IpcMode") or ""), "ipc"),
        uts="host" if host_config.get("UTSMode") == "host" else "",
        cgroup="host" if host_config.get("CgroupnsMode") == "host" else "",
        user="" if container.record["IdMappings"] else "host",
    )


def _shared_memory(container: Container, containers: Containers) -> list[Mount]:
    """/dev/shm where it is not the container's own tmpfs."""
    mode = str(container.host_config.get("IpcMode") or "")
    options = ("rbind", "rprivate")
    if mode == "host":
        return [Mount("bind", "/dev/shm", "/dev/shm", options)]
    if mode == "shareable":
        from unionfuse import syscalls

        place = container.run / "shm"
        place.mkdir(exist_ok=True)
        size = f"mode=1777,size={container.host_config['ShmSize']}".encode()
        unmount(place)
        nosuid_nodev_noexec = 2 | 4 | 8
        syscalls.mount(b"shm", os.fsencode(place), b"tmpfs", nosuid_nodev_noexec, size)
        return [Mount("bind", str(place), "/dev/shm", options)]
    if mode.startswith("container:"):
        other = running(containers, mode)
        place = other.run / "shm"
        if other.host_config.get("IpcMode") != "shareable":
            raise UserError(f"container {other.name} was not run with --ipc shareable")
        return [Mount("bind", str(place), "/dev/shm", options)]
    return []


def _init_program() -> str:
    import shutil

    for name in INITS:
        if found := shutil.which(name):
            return found
    raise UserError("--init needs tini (Debian: tini) or catatonit: install one of them")


def cgroups_of(container: Container) -> list[Path]:
    """The container's cgroups that are there."""
    from unionimage.container import limits

    parent = str(container.record["CgroupParent"]).strip("/")
    places = (where / parent / container.id for where in set(limits.host().controllers.values()))
    return [path for path in places if path.is_dir()]


def kill_cgroup(container: Container) -> None:
    """End every process that is still in the container's cgroup. For what a crash left."""
    for path in cgroups_of(container):
        for file in path.rglob("cgroup.procs"):
            with contextlib.suppress(OSError):
                for pid in file.read_text().split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), 9)


def remove_cgroup(container: Container) -> None:
    """Remove the container's empty cgroups, where the runtime did not."""
    for top in cgroups_of(container):
        for path in sorted((*top.rglob("*"), top), reverse=True):
            if path.is_dir():
                with contextlib.suppress(OSError):
                    path.rmdir()
