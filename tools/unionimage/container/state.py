"""What is known of each container, on disk: one directory each, no daemon, no database.

    STORE/containers/ID/config.json   what was asked for, in docker's words (Config, HostConfig)
                       /state.json    what became of it; written by its monitor while that lives
                       /upper /work   its writable layer
                       /log.json      its output
                       /lock          held while something changes its state
    STORE/containers/names/NAME       symbolic link to ID: the kernel sees to it that names are
                                      unique
    RUN/KEY/ID16/                     what ends with a boot: bundle, sockets, mount point,
                                      `alive`, which a living monitor holds locked

A monitor that was killed and a host that was restarted both leave `alive` unlocked: that is how the
truth is told from what state.json says.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unionimage.container.places import run_directory
from unionimage.errors import Conflict, NotFound, UserError

Record = dict[str, Any]

NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
NEVER = "0001-01-01T00:00:00Z"
ALIVE = ("running", "paused", "restarting")

ADJECTIVES = (
    "amber bold brave bright brisk calm clever cosy crisp daring eager fair fleet fond gentle glad"
    " golden happy honest jolly keen kind light lively lucid lucky merry mild neat noble patient"
    " plucky proud quick quiet rapid ready serene sharp silver smart snug spry steady sunny swift"
    " tidy trusty vivid warm wise witty young zesty"
)
SCHOLARS = (
    "abel agnesi ampere archimedes babbage banach bell bohr boole borg brahe cantor cerf church"
    " codd copernicus curie dijkstra dirac euclid euler faraday fermat fermi feynman floyd fourier"
    " galois gauss germain goedel goodall hamilton hawking hertz hilbert hoare hopper hypatia"
    " joule kepler knuth kolmogorov lagrange lamarr laplace leibniz liskov lovelace maxwell mayer"
    " meitner mendel milner neumann newton noether pascal pasteur planck ritchie shannon tesla"
    " thompson torvalds turing volta wiles wirth wozniak"
)


class Container:
    """One container. `record` is its config.json as it was read; `state()` always reads afresh."""

    def __init__(self, identity: str, directory: Path, run: Path, record: Record) -> None:
        self.id = identity
        self.directory = directory
        self.run = run
        self.record = record

    @property
    def name(self) -> str:
        return str(self.record["Name"])

    @property
    def config(self) -> Record:
        return dict(self.record["Config"])

    @property
    def host_config(self) -> Record:
        return dict(self.record["HostConfig"])

    @property
    def upper(self) -> Path:
        return self.directory / "upper"

    @property
    def work(self) -> Path:
        return self.directory / "work"

    @property
    def log_path(self) -> Path:
        return self.directory / "log.json"

    @property
    def merged(self) -> Path:
        """Where its root file system is mounted while it runs."""
        return self.run / "merged"

    def mounted(self) -> bool:
        """True while something is mounted for it: its root file system or a shared /dev/shm."""
        for place in (self.merged, self.run / "shm"):
            try:
                if os.stat(place).st_dev != os.stat(self.run).st_dev:
                    return True
            except FileNotFoundError:
                continue
            except OSError:  # ENOTCONN: mounted, and the daemon is dead
                return True
        return False

    @property
    def bundle(self) -> Path:
        return self.run / "bundle"

    @property
    def control(self) -> str:
        """The path of the monitor's socket."""
        return str(self.run / "control")

    def state(self) -> Record:
        """The last state that was written."""
        try:
            value: Record = json.loads((self.directory / "state.json").read_bytes())
        except FileNotFoundError:
            value = {"Status": "removing"}
        return value

    def write_state(self, state: Mapping[str, Any]) -> None:
        replace_file(self.directory / "state.json", json.dumps(state))

    def reload(self) -> None:
        """Read config.json again: another command may have changed it."""
        self.record = json.loads((self.directory / "config.json").read_bytes())

    def save(self) -> None:
        """Write config.json. Hold `locked()` around read, change and write."""
        replace_file(self.directory / "config.json", json.dumps(self.record))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude other commands that change this container's state."""
        try:
            descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFound(f"no such container: {self.id[:12]}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not (self.directory / "config.json").exists():
                raise NotFound(f"no such container: {self.id[:12]}")
            yield
        finally:
            os.close(descriptor)

    def monitor_lives(self) -> bool:
        """True while a monitor keeps this container, in this boot."""
        try:
            descriptor = os.open(self.run / "alive", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False


class Containers:
    """All containers of one store. Cheap to make; holds nothing open."""

    def __init__(self, store_root: Path, run_root: Path | None = None) -> None:
        import zlib

        root = Path(os.path.realpath(store_root))
        key = f"{zlib.crc32(os.fsencode(root)):08x}"
        self.root = root
        self.directory = root / "containers"
        self.run = (run_root or run_directory()) / key

    def all(self) -> list[Container]:
        """Every container, the youngest first."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self.directory):
                if len(entry.name) == 64:
                    with contextlib.suppress(FileNotFoundError):
                        found.append(self._load(entry.name))
        return sorted(found, key=lambda one: str(one.record["Created"]), reverse=True)

    def find(self, text: str) -> Container:
        """By name, id or unique id prefix. Raises NotFound or UserError (ambiguous)."""
        identity = self._identity_of_name(text.removeprefix("/"))
        if identity is None and re.fullmatch(r"[0-9a-f]{1,64}", text):
            with contextlib.suppress(FileNotFoundError):
                matches = [
                    entry
                    for entry in os.listdir(self.directory)
                    if len(entry) == 64 and entry.startswith(text)
                ]
                if len(matches) > 1:
                    raise UserError(f"{text} is ambiguous: {len(matches)} containers start so")
                identity = matches[0] if matches else None
        if identity is not None:
            with contextlib.suppress(FileNotFoundError):
                return self._load(identity)
        raise NotFound(f"no such container: {text}")

    def create(self, record: Record) -> Container:
        """Publish a container whose record has no Name yet or one that must be free.

        Raises Conflict when the name is taken, UserError when it is no name. `record["Id"]` must be
        from `new_id`.
        """
        identity = str(record["Id"])
        with self._locked():
            wanted = record.get("Name")
            name = self.check_free(wanted) if wanted else self._random_name()
            record["Name"] = name
            directory = self.directory / identity
            staged = self.directory / f".new-{identity}"
            try:
                self._fill(staged, record)
                self._link(name, identity)  # first: a container always has its name
                staged.rename(directory)
            except BaseException:
                remove_tree(staged)
                with contextlib.suppress(FileNotFoundError):
                    (self.directory / "names" / name).unlink()
                raise
        return Container(identity, directory, self._run_of(identity), record)

    @staticmethod
    def _fill(staged: Path, record: Record) -> None:
        os.makedirs(staged / "upper")
        os.mkdir(staged / "work", 0o700)
        os.chmod(staged, 0o711 if os.geteuid() == 0 else 0o700)
        replace_file(staged / "config.json", json.dumps(record))
        created = {"Status": "created", "Pid": 0, "ExitCode": 0, "Error": ""}
        created |= {"StartedAt": NEVER, "FinishedAt": NEVER, "OOMKilled": False}
        replace_file(staged / "state.json", json.dumps(created))

    def rename(self, container: Container, name: str) -> None:
        """Give another name. Raises Conflict or UserError."""
        with self._locked(), container.locked():
            container.reload()
            old = container.name
            if name == old:
                raise UserError("renaming a container with the same name as its current name")
            self.check_free(name)
            self._link(name, container.id)
            container.record["Name"] = name
            container.save()
            (self.directory / "names" / old).unlink(missing_ok=True)

    def delete(self, container: Container) -> None:
        """Remove everything of a container that is already stopped and cleaned up."""
        link = self.directory / "names" / container.name
        with contextlib.suppress(OSError):
            if os.readlink(link) == f"../{container.id}":
                link.unlink()
        doomed = self.directory / f".dead-{container.id}"
        with contextlib.suppress(FileNotFoundError):
            container.directory.rename(doomed)
        remove_tree(doomed)
        remove_tree(container.run)

    def check_free(self, name: str) -> str:
        """The name, if it may be used. Raises UserError or Conflict."""
        if not NAME.fullmatch(name):
            form = "[a-zA-Z0-9][a-zA-Z0-9_.-] fit, two of them at least"
            raise UserError(f"invalid container name {name!r}: only {form}")
        holder = self._identity_of_name(name)
        if holder is not None and (self.directory / holder).exists():
            raise Conflict(
                f"the container name {name!r} is in use by container {holder[:12]}:"
                " remove or rename that one"
            )
        return name

    def sweep(self) -> None:
        """Remove what commands that were killed left half made or half removed."""
        with self._locked():
            for entry in list(os.scandir(self.directory)):
                if entry.name.startswith((".new-", ".dead-")):
                    remove_tree(Path(entry.path))

    def _run_of(self, identity: str) -> Path:
        return self.run / identity[:16]  # the paths of sockets below it have 107 bytes at most

    def _load(self, identity: str) -> Container:
        directory = self.directory / identity
        record = json.loads((directory / "config.json").read_bytes())
        return Container(identity, directory, self._run_of(identity), record)

    def _identity_of_name(self, name: str) -> str | None:
        if not NAME.fullmatch(name):
            return None
        try:
            return os.path.basename(os.readlink(self.directory / "names" / name))
        except OSError:
            return None

    def _link(self, name: str, identity: str) -> None:
        names = self.directory / "names"
        names.mkdir(exist_ok=True)
        staged = names / f".{identity}"
        staged.unlink(missing_ok=True)
        staged.symlink_to(f"../{identity}")
        staged.rename(names / name)

    def _random_name(self) -> str:
        while True:
            words = [_any_of(ADJECTIVES.split()), _any_of(SCHOLARS.split())]
            with contextlib.suppress(Conflict):
                return self.check_free("_".join(words))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def new_id() -> str:
    """64 hex digits; the first twelve never look like a decimal number (docker's rule)."""
    while True:
        identity = os.urandom(32).hex()
        if not identity[:12].isdigit():
            return identity


def now() -> str:
    """The time in UTC as docker writes it, with nanoseconds."""
    return timestamp(time.time_ns())


def timestamp(nanoseconds: int) -> str:
    """A time since the epoch as docker writes it."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{text}.{rest:09d}Z"


def replace_file(path: Path, text: str) -> None:
    """Write a file so that readers see the old or the new one, never a part."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    staged.write_text(text)
    staged.rename(path)


def remove_tree(path: Path) -> None:
    """Remove a directory tree; one that is not there is fine.

    What somebody mounted below is detached before: it is not ours to delete.
    """
    from unionfuse import mounting, syscalls

    below = os.path.realpath(os.fsencode(path)) + b"/"
    for place in reversed([one.path for one in mounting.mounts() if one.path.startswith(below)]):
        with contextlib.suppress(OSError):
            syscalls.umount(place, syscalls.MNT_DETACH)
    with contextlib.suppress(FileNotFoundError):
        for _, directories, files, descriptor in os.fwalk(path, topdown=False):
            for name in files:
                os.unlink(name, dir_fd=descriptor)
            for name in directories:
                try:
                    os.rmdir(name, dir_fd=descriptor)
                except NotADirectoryError:  # a link to a directory
                    os.unlink(name, dir_fd=descriptor)
        path.rmdir()


def _any_of(words: Sequence[str]) -> str:
    return words[int.from_bytes(os.urandom(4)) % len(words)]
