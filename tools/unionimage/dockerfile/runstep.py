"""RUN: one process under an OCI runtime on a writable mount of the stack so far.

What the step needs but does not make (mount points, resolv.conf, secrets) is taken away again
before the upper directory becomes a layer. Secrets and the bundle lie on a tmpfs of the build's
own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import posixpath
import secrets
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unionfuse import syscalls
from unionimage.digest import Digest
from unionimage.dockerfile.cache import MOUNTS
from unionimage.dockerfile.ignore import Patterns
from unionimage.dockerfile.kitchen import Kitchen
from unionimage.dockerfile.parser import DockerfileError
from unionimage.dockerfile.place import Style, Target
from unionimage.dockerfile.plan import SCRIPTS, RunAction, Source
from unionimage.dockerfile.runmount import RunMount
from unionimage.dockerfile.select import CONFINED, Tree, find, open_in
from unionimage.errors import UserError
from unionimage.tuples import NamedTuple

if TYPE_CHECKING:
    from unionimage.container.bundle import Mount
    from unionimage.container.runtime import Runtime
    from unionimage.dockerfile.helper import Helper
    from unionimage.dockerfile.network import Networks

_MS_NOSUID, _MS_NODEV = 2, 4
_HOSTS = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
_OVERMOUNTED = ("/proc", "/dev", "/sys")


class Secret(NamedTuple):
    """Where `--secret` takes its value from: a file or a variable of the environment."""

    file: str = ""
    variable: str = ""

    def value(self) -> bytes:
        """Raises UserError where it cannot be read; never says what it holds."""
        if self.variable:
            return os.environb[os.fsencode(self.variable)]
        try:
            return Path(self.file).read_bytes()
        except OSError as error:
            raise UserError(f"--secret: {self.file}: {error.strerror}") from None


class Running:
    """The containers that run now, so that a build that ends can end them."""

    def __init__(self, runtime_choice: str | None, helper: Helper) -> None:
        """Args: `helper` ends them should the build be killed."""
        self._choice = runtime_choice
        self._helper = helper
        self._lock = threading.Lock()
        self._runtime: Runtime | None = None
        self._names: set[str] = set()
        self._stopped = False

    @property
    def runtime(self) -> Runtime:
        """The OCI runtime, found when it is first needed."""
        from unionimage.container import runtime

        with self._lock:
            if self._runtime is None:
                self._runtime = runtime.find(self._choice)
            return self._runtime

    def run(self, name: str, bundle: Path, output: int) -> int:
        """Run a container to its end; its output goes to the descriptor."""
        runtime = self.runtime
        with self._lock:
            if self._stopped:
                raise UserError("the build was stopped")
            self._names.add(name)
        self._helper.begin(name, runtime)
        try:
            return runtime.run(name, bundle, stdout=output, stderr=output)
        finally:
            with self._lock:
                self._names.discard(name)
            self._helper.end(name)

    def stop(self) -> None:
        """Kill what runs; nothing is started any more."""
        with self._lock:
            self._stopped = True
            names = list(self._names)
        for name in names:
            self.runtime.delete(name, force=True)


class Environment(NamedTuple):
    """What RUN steps of one build share."""

    kitchen: Kitchen
    running: Running
    networks: Networks
    secrets: Mapping[str, Secret]
    stack_of: Callable[[Source], Sequence[Digest]]


def run(
    shared: Environment,
    action: RunAction,
    below: Sequence[Digest],
    upper: Path,
    output: Callable[[bytes], None],
) -> int:
    """Run the step's process; the changes it makes are in `upper` afterwards.

    Args:
        below: the stack so far, base first.
        output: is called with what the process writes, as it comes.

    Returns:
        The exit code of the process.
    """
    name = "unionfuse-" + secrets.token_hex(16)
    driver = shared.kitchen.driver or "fuse"
    with contextlib.ExitStack() as stack:
        merged = stack.enter_context(shared.kitchen.mounted(below, upper=upper, driver=driver))
        private = stack.enter_context(_private_directory(shared.kitchen))
        network = stack.enter_context(shared.networks.taken(action.network, output))
        step = _Step(shared, action, merged, private, stack)
        mounts = step.mounts(network.resolver)
        bundle = private / "bundle"
        bundle.mkdir()
        variables = step.secret_variables
        _write_bundle(bundle, name, action, merged, mounts, variables, network.namespace)
        with _collected(output) as descriptor:
            code = shared.running.run(name, bundle, descriptor)
    step.stubs.remove(upper)
    return code


def _write_bundle(
    directory: Path,
    name: str,
    action: RunAction,
    merged: Path,
    mounts: Sequence[Mount],
    secret_variables: Sequence[str],
    network: str,
) -> None:
    from unionimage.container import bundle

    spec = bundle.build_step(
        merged,
        action.args,
        [*action.env, *action.proxy, *secret_variables],
        action.cwd,
        action.user,
        network=network,
        mounts=mounts,
        hostname="build",
        name=name,
    )
    bundle.write(directory, spec)


@contextlib.contextmanager
def _private_directory(kitchen: Kitchen) -> Iterator[Path]:
    """A directory in memory that only this build sees, for the bundle and for secrets."""
    path = kitchen.scratch()
    syscalls.mount(b"tmpfs", os.fsencode(path), b"tmpfs", _MS_NOSUID | _MS_NODEV, b"mode=0700")
    try:
        yield path
    finally:
        syscalls.umount(os.fsencode(path), syscalls.MNT_DETACH)


@contextlib.contextmanager
def _collected(output: Callable[[bytes], None]) -> Iterator[int]:
    """A descriptor to write to; what is written is handed on by a thread."""
    reader, writer = os.pipe()

    def pump() -> None:
        while data := os.read(reader, 1 << 16):
            output(data)

    thread = threading.Thread(target=pump, daemon=True)
    thread.start()
    try:
        yield writer
    finally:
        os.close(writer)
        thread.join(timeout=5)  # a process that escaped could hold the pipe open
        if not thread.is_alive():
            os.close(reader)


class _Step:
    """The mounts of one RUN step; what they need is undone when `stack` closes."""

    def __init__(
        self,
        shared: Environment,
        action: RunAction,
        merged: Path,
        private: Path,
        stack: contextlib.ExitStack,
    ) -> None:
        self.shared = shared
        self.action = action
        self.private = private
        self.stack = stack
        self.stubs = Stubs(merged)
        stack.callback(self.stubs.close)
        self.secret_variables: list[str] = []
        self._taken: list[str] = [*_OVERMOUNTED]

    def mounts(self, resolver: bytes) -> list[Mount]:
        """All mounts of the step in their order; `resolver` is its /etc/resolv.conf."""
        for path in _OVERMOUNTED:
            self.stubs.ensure(path, is_directory=True)
        found = [
            self._file("/etc/hosts", _HOSTS.encode(), 0o644),
            self._file("/etc/resolv.conf", resolver, 0o644),
        ]
        if self.action.script is not None:
            name, text = self.action.script
            found.append(self._file(f"{SCRIPTS}/{name}", text.encode(), 0o755, read_only=True))
        for mount, source in self.action.mounts:
            made = self._make(mount, source)
            if made is not None:
                found.append(made)
        return found

    def _file(self, target: str, content: bytes, mode: int, *, read_only: bool = False) -> Mount:
        """A file that the step sees at a path and that never becomes part of the image."""
        path = self.private / secrets.token_hex(8)
        path.write_bytes(content)
        path.chmod(mode)
        return self._bind(path, target, read_only, is_directory=False)

    def _bind(self, source: Path, target: str, read_only: bool, *, is_directory: bool) -> Mount:
        from unionimage.container.bundle import Mount

        if not any(target == top or target.startswith(top + "/") for top in self._taken):
            self.stubs.ensure(target, is_directory=is_directory)
        if is_directory:
            self._taken.append(target)
        return Mount("bind", str(source), target, ("rbind", "ro" if read_only else "rw"))

    def _target(self, mount: RunMount) -> str:
        path = posixpath.normpath(posixpath.join("/", self.action.cwd, mount.target))
        if path == "/":
            raise DockerfileError(f"--mount=type={mount.type}: the target cannot be /")
        return path

    def _make(self, mount: RunMount, source: Source) -> Mount | None:
        match mount.type:
            case "tmpfs":
                return self._tmpfs(mount)
            case "secret":
                return self._secret(mount)
            case "cache":
                return self._cache(mount, source)
            case _:
                return self._bind_source(mount, source)

    def _tmpfs(self, mount: RunMount) -> Mount:
        from unionimage.container.bundle import Mount

        target = self._target(mount)
        self.stubs.ensure(target, is_directory=True)
        self._taken.append(target)
        options = ["nosuid", "nodev", "mode=1777"] + [f"size={mount.size}"] * bool(mount.size)
        return Mount("tmpfs", "tmpfs", target, options)

    def _secret(self, mount: RunMount) -> Mount | None:
        secret = self.shared.secrets.get(mount.id)
        if secret is None:
            if mount.required:
                raise DockerfileError(
                    f"secret {mount.id!r} is required: give --secret id={mount.id}"
                )
            return None
        value = secret.value()
        if mount.env:
            self.secret_variables.append(f"{mount.env}={os.fsdecode(value)}")
        if not mount.target:
            return None
        made = self._file(self._target(mount), value, mount.mode, read_only=True)
        os.chown(made.source, mount.uid, mount.gid)
        return made

    def _cache(self, mount: RunMount, source: Source) -> Mount:
        directory = self._cache_directory(mount)
        data = directory / "data"
        if not data.exists():
            staged = directory / secrets.token_hex(8)
            staged.mkdir()
            if mount.source_stage:
                self._fill(staged, mount, source)
            os.chown(staged, mount.uid, mount.gid)
            staged.chmod(mount.mode)
            with contextlib.suppress(OSError):  # another build was faster
                staged.rename(data)
        return self._bind(data, self._target(mount), mount.read_only, is_directory=True)

    def _cache_directory(self, mount: RunMount) -> Path:
        """The directory of a cache; locked, or a private one that is free, where it asks for it."""
        origin = mount.source_stage + "\0" + mount.source if mount.source_stage else ""
        identity = hashlib.sha256(f"{mount.id}\0{origin}".encode()).hexdigest()
        top = self.shared.kitchen.store.root / MOUNTS
        for number in range(1000):
            directory = top / f"{identity}-{number}"
            directory.mkdir(mode=0o711, parents=True, exist_ok=True)
            if mount.sharing == "shared":
                return directory
            lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            self.stack.callback(os.close, lock)
            wait = 0 if mount.sharing == "locked" else fcntl.LOCK_NB
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | wait)
            except BlockingIOError:
                continue
            return directory
        raise UserError(f"cache mount {mount.id}: a thousand builds use it at once")

    def _fill(self, directory: Path, mount: RunMount, source: Source) -> None:
        with self._source_tree(source) as tree:
            _copy_into(directory, tree, mount.source)

    @contextlib.contextmanager
    def _source_tree(self, source: Source) -> Iterator[Tree]:
        kitchen = self.shared.kitchen
        if source.is_context:
            yield kitchen.context.tree()
            return
        with kitchen.tree(self.shared.stack_of(source)) as tree:
            yield tree

    def _bind_source(self, mount: RunMount, source: Source) -> Mount:
        """Files of the context, a stage or an image; what is written to them is thrown away."""
        kitchen = self.shared.kitchen
        if source.is_context:
            if mount.read_only and not kitchen.context.ignored:
                top = kitchen.context.path
            else:
                top = kitchen.scratch()
                _copy_into(top, kitchen.context.tree(), "")
        else:
            upper = None if mount.read_only else kitchen.scratch()
            stack = self.shared.stack_of(source)
            top = self.stack.enter_context(kitchen.mounted(stack, upper=upper))
        path, is_directory = _confined_path(top, mount)
        return self._bind(path, self._target(mount), mount.read_only, is_directory=is_directory)


def _confined_path(top: Path, mount: RunMount) -> tuple[Path, bool]:
    """Where the source of a bind mount really is, links resolved below `top`."""
    root = os.open(top, os.O_PATH | os.O_DIRECTORY)
    try:
        handle = open_in(root, os.fsencode(mount.source), os.O_PATH)
    except OSError as error:
        raise DockerfileError(f"--mount source {mount.source!r}: {error.strerror}") from None
    finally:
        os.close(root)
    try:
        is_directory = stat.S_ISDIR(os.fstat(handle).st_mode)
        return Path(os.readlink(f"/proc/self/fd/{handle}")), is_directory
    finally:
        os.close(handle)


def _copy_into(directory: Path, tree: Tree, source: str) -> None:
    root = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        target = Target(root, Style())
        for found in find(tree, [source or "."], Patterns(()), False, "the mount's source"):
            target.copy(tree, found, b"")
        target.finish()
    finally:
        os.close(root)


class Stubs:
    """Mount points that were made for a step, and are not part of what it did."""

    def __init__(self, merged: Path) -> None:
        self._root = os.open(merged, os.O_PATH | os.O_DIRECTORY)
        self._top = os.readlink(f"/proc/self/fd/{self._root}")
        self._made: list[bytes] = []
        self._parents: dict[bytes, tuple[int, int, int]] = {}

    def close(self) -> None:
        os.close(self._root)

    def ensure(self, path: str, *, is_directory: bool) -> None:
        """Make what is missing of a path so that something can be mounted there."""
        parts = [os.fsencode(part) for part in path.split("/") if part]
        for end in range(1, len(parts) + 1):
            try:
                os.close(open_in(self._root, b"/".join(parts[:end]), os.O_PATH))
            except FileNotFoundError:
                above = b"/".join(parts[: end - 1])
                self._make(above, parts[end - 1], is_directory or end < len(parts))

    def _make(self, above: bytes, name: bytes, is_directory: bool) -> None:
        directory = open_in(self._root, above, os.O_RDONLY | os.O_DIRECTORY)
        try:
            real = os.readlink(f"/proc/self/fd/{directory}").removeprefix(self._top)
            parent = os.fsencode(real.strip("/"))
            status = os.fstat(directory)
            self._parents.setdefault(parent, (status.st_mode, status.st_uid, status.st_gid))
            if is_directory:
                os.mkdir(name, 0o755, dir_fd=directory)
            else:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
                os.close(os.open(name, flags, 0o644, dir_fd=directory))
        finally:
            os.close(directory)
        self._made.append(parent + b"/" + name if parent else name)

    def remove(self, upper: Path) -> None:
        """Take away the stubs that the step left untouched, from its upper directory."""
        root = os.open(upper, os.O_PATH | os.O_DIRECTORY)
        try:
            for path in reversed(self._made):
                _remove_empty(root, path, None)
            for path in sorted(self._parents, key=len, reverse=True):
                if path and path not in self._made:
                    _remove_empty(root, path, self._parents[path])
        finally:
            os.close(root)


def _remove_empty(root: int, path: bytes, as_before: tuple[int, int, int] | None) -> None:
    """Remove an empty file or directory; a directory that was there only if it looks as before."""
    parent, _, name = path.rpartition(b"/")
    try:
        directory = syscalls.openat2(
            root,
            parent or b".",
            os.O_RDONLY | os.O_DIRECTORY,
            CONFINED | syscalls.RESOLVE_NO_SYMLINKS,
        )
    except OSError:
        return
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if as_before is not None:
            now = (status.st_mode, status.st_uid, status.st_gid)
            if now != as_before or _is_opaque(directory, name):
                return
        if stat.S_ISDIR(status.st_mode):
            os.rmdir(name, dir_fd=directory)
        elif stat.S_ISREG(status.st_mode) and status.st_size == 0:
            os.unlink(name, dir_fd=directory)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise
    finally:
        os.close(directory)


def _is_opaque(directory: int, name: bytes) -> bool:
    names = syscalls.listxattr(directory, name)
    return any(each.endswith(b"overlay.opaque") for each in names)
