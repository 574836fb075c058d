"""Volumes, and how a mount that a user asks for is written down.

    STORE/volumes/NAME/_data         what is mounted
    STORE/volumes/NAME/volume.json   docker's description

A volume is in use as long as a container that mounts it exists, running or not; it is then never
removed. Mount points are kept in docker's form (inspect's `Mounts`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unionimage.container.state import (
    NAME,
    Container,
    new_id,
    now,
    remove_tree,
    replace_file,
)
from unionimage.errors import Conflict, NotFound, UserError

if TYPE_CHECKING:
    from unionimage.container.bundle import Mount

Point = dict[str, Any]

PROPAGATION = ("rprivate", "private", "rshared", "shared", "rslave", "slave")
TMPFS_OPTIONS = ("noexec", "nosuid", "nodev")


class Volumes:
    """The volumes of one store. Cheap to make; holds nothing open."""

    def __init__(self, store_root: Path) -> None:
        self.directory = Path(os.path.realpath(store_root)) / "volumes"

    def all(self) -> list[Point]:
        """Every volume in docker's form, by name."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for name in sorted(os.listdir(self.directory)):
                with contextlib.suppress(NotFound):
                    found.append(self.find(name))
        return found

    def find(self, name: str) -> Point:
        """One volume in docker's form. Raises NotFound."""
        if NAME.fullmatch(name):
            with contextlib.suppress(FileNotFoundError):
                value: Point = json.loads((self.directory / name / "volume.json").read_bytes())
                return value
        raise NotFound(f"no such volume: {name}")

    def create(
        self, name: str | None = None, labels: Mapping[str, str] | None = None
    ) -> tuple[Point, bool]:
        """The volume of that name, and whether it is new. Raises UserError for an impossible name.

        Without a name it is an anonymous one.
        """
        labels = dict(labels or {})
        if name is None:
            name = new_id()
            labels["com.docker.volume.anonymous"] = ""
        elif not NAME.fullmatch(name):
            raise UserError(
                f"invalid volume name {name!r}: only [a-zA-Z0-9][a-zA-Z0-9_.-] fit;"
                " for a directory of the host write its absolute path"
            )
        with self._locked():
            with contextlib.suppress(NotFound):
                return self.find(name), False
            data = self.directory / name / "_data"
            data.mkdir(parents=True, exist_ok=True)
            point: Point = {
                "CreatedAt": now(),
                "Driver": "local",
                "Labels": labels,
                "Mountpoint": str(data),
                "Name": name,
                "Options": {},
                "Scope": "local",
            }
            replace_file(self.directory / name / "volume.json", json.dumps(point))
        return point, True

    def remove(self, name: str, containers: Iterable[Container]) -> None:
        """Remove a volume. Raises NotFound, or Conflict while a container has it."""
        self.find(name)
        with self._locked():
            if holders := users_of(name, containers):
                raise Conflict(f"volume {name} is in use by {', '.join(holders)}: remove it first")
            (self.directory / name / "volume.json").unlink(missing_ok=True)
            remove_tree(self.directory / name)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def is_anonymous(volume: Mapping[str, Any]) -> bool:
    return "com.docker.volume.anonymous" in (volume.get("Labels") or {})


def size(volume: Mapping[str, Any]) -> int:
    """Bytes of the files in a volume."""
    total = 0
    for directory, _, names in os.walk(volume["Mountpoint"]):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(directory, name)).st_size
    return total


def users_of(name: str, containers: Iterable[Container]) -> list[str]:
    """The short ids of the containers that mount a volume."""
    return [
        container.id[:12]
        for container in containers
        if any(point.get("Name") == name for point in container.record.get("Mounts") or [])
    ]


def parse_volume(text: str) -> Point:
    """`-v [SOURCE:]DESTINATION[:OPTIONS]` as a mount point. Raises UserError."""
    parts = text.split(":")
    if len(parts) > 3 or not all(parts):
        raise UserError(f"invalid volume {text!r}: write [NAME|/HOST/DIR:]/DIR[:ro]")
    if len(parts) == 1:
        return _point("volume", None, parts[0], [], text)
    options = parts[2].split(",") if len(parts) == 3 else []
    source = parts[0]
    if source.startswith(("/", "./", "../", "~")) or source in (".", ".."):
        kind, source = "bind", os.path.abspath(os.path.expanduser(source))
    else:
        kind = "volume"
    return _point(kind, source, parts[1], options, text)


def parse_mount(text: str) -> Point:
    """`--mount type=…,src=…,dst=…[,readonly]` as a mount point. Raises UserError."""
    import csv

    given: dict[str, str] = {}
    try:
        fields = next(csv.reader([text]), [])
    except csv.Error as error:
        raise UserError(f"--mount {text!r}: {error}") from None
    for field in fields:
        key, _, value = field.partition("=")
        given[key.strip().lower()] = value.strip()
    aliases = {"source": "src", "target": "dst", "destination": "dst", "ro": "readonly"}
    given = {aliases.get(key, key): value for key, value in given.items()}
    kind = given.pop("type", "volume")
    source, destination = given.pop("src", None), given.pop("dst", "")
    options: list[str] = []
    if given.pop("readonly", "false").lower() in ("", "true", "1"):
        options.append("ro")
    if kind == "bind":
        options += [given.pop("bind-propagation", "rprivate")]
        if not source:
            raise UserError(f"--mount {text!r}: a bind mount needs src=/HOST/PATH")
        if not source.startswith("/"):
            raise UserError(f"--mount {text!r}: src must be an absolute path")
    elif kind == "volume":
        if given.pop("volume-nocopy", "false").lower() in ("", "true", "1"):
            options.append("nocopy")
        if given.pop("volume-driver", "local") != "local":
            raise UserError("--mount: only the volume driver 'local' is there")
    elif kind == "tmpfs":
        if source:
            raise UserError(f"--mount {text!r}: tmpfs has no src")
        for key, name in (("tmpfs-size", "size"), ("tmpfs-mode", "mode")):
            if key in given:
                options.append(f"{name}={given.pop(key)}")
    else:
        raise UserError(f"--mount {text!r}: type is one of volume, bind, tmpfs")
    if given:
        raise UserError(f"--mount: {sorted(given)[0]!r} is not supported for type={kind}")
    return _point(kind, source or None, destination, options, text)


def parse_tmpfs(text: str) -> Point:
    """`--tmpfs /DIR[:OPTIONS]` as a mount point."""
    destination, _, options = text.partition(":")
    return _point("tmpfs", None, destination, options.split(",") if options else [], text)


def _point(kind: str, source: str | None, destination: str, options: list[str], text: str) -> Point:
    if not destination.startswith("/"):
        raise UserError(f"{text!r}: the path in the container must be absolute")
    destination = os.path.normpath(destination).replace("//", "/")
    if destination == "/":
        raise UserError(f"{text!r}: the destination cannot be '/'")
    if kind == "tmpfs":
        mode = ",".join(_tmpfs_options(options))
        return {
            "Type": "tmpfs",
            "Source": "",
            "Destination": destination,
            "Mode": mode,
            "RW": "ro" not in options,
            "Propagation": "",
        }
    propagation = "rprivate" if kind == "bind" else ""
    for option in options:
        if option in PROPAGATION and kind == "bind":
            propagation = option
        elif option in ("z", "Z"):
            if os.path.exists("/sys/fs/selinux/enforce"):
                raise UserError(f"{text!r}: relabelling for SELinux is not supported")
        elif option not in ("ro", "rw", "nocopy", "consistent", "cached", "delegated"):
            raise UserError(f"{text!r}: unknown option {option!r}")
    if kind == "bind" and source is not None and not os.path.lexists(source):
        raise UserError(f"bind source path does not exist: {source}")
    point: Point = {"Type": kind, "Source": source or "", "Destination": destination}
    if kind == "volume":
        point = {"Type": kind, "Name": source, "Source": "", "Destination": destination}
        point["Driver"] = "local"
    rest = [option for option in options if option in ("ro", "nocopy", "z", "Z")]
    return point | {"Mode": ",".join(rest), "RW": "ro" not in options, "Propagation": propagation}


def _tmpfs_options(options: list[str]) -> list[str]:
    from unionimage.container.limits import parse_size

    result = []
    for option in options:
        name, _, value = option.partition("=")
        if name == "size":
            result.append(f"size={parse_size(value, '--tmpfs size')}")
        elif name in ("mode", "uid", "gid", "nr_inodes", "nr_blocks") or option in (
            "ro", "rw", "exec", "noexec", "suid", "nosuid", "dev", "nodev", "noatime",
        ):  # fmt: skip
            result.append(option)
        else:
            raise UserError(f"--tmpfs: unknown option {option!r}")
    return result


def mount_of(point: Mapping[str, Any]) -> Mount:
    """The OCI mount of a mount point whose Source is known."""
    from unionimage.container.bundle import Mount

    if point["Type"] == "tmpfs":
        given = [option for option in point["Mode"].split(",") if option]
        options = [option for option in TMPFS_OPTIONS if option.removeprefix("no") not in given]
        return Mount("tmpfs", "tmpfs", point["Destination"], [*dict.fromkeys(options + given)])
    access = "rw" if point["RW"] else "ro"
    propagation = point.get("Propagation") or "rprivate"
    return Mount("bind", point["Source"], point["Destination"], ["rbind", access, propagation])


def fill(point: Mapping[str, Any], root: Path, owner: int = 0) -> None:
    """Fill an empty volume from what the image has at its place, as docker does.

    Owner and mode of the directory itself are taken over too; where the image has nothing, it
    becomes `owner`'s. A volume that holds anything stays as it is.
    """
    import subprocess

    from unionimage.container import users

    if point["Type"] != "volume":
        return
    data = point["Source"]
    with os.scandir(data) as entries:
        if any(entries):
            return
    if owner:
        os.chown(data, owner, owner)
    if "nocopy" in point["Mode"].split(","):
        return
    try:
        descriptor = users.open_inside(root, point["Destination"].lstrip("/"), os.O_DIRECTORY)
    except OSError:
        return  # the image has nothing there
    try:
        source = f"/proc/self/fd/{descriptor}/."
        command = ["cp", "-a", "--", source, f"{data}/"]
        done = subprocess.run(command, pass_fds=(descriptor,), capture_output=True, text=True)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["cp failed"])[0]
            raise UserError(f"volume {point['Name']} cannot be filled from the image: {reason}")
    finally:
        os.close(descriptor)
