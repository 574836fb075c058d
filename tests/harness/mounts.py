"""One tree out of a stack of layers, in each of the ways that the tests compare.

KINDS names them: "plain" (a directory, no union at all), "overlay" (kernel overlayfs, the oracle),
"fuse-overlayfs" (a peer; not run unless asked for) and unionfuse through each of its doors.
"""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness import linux
from harness.layers import Layer, build, flatten
from harness.snapshot import Tree, assert_equal, snapshot

# what each of unionfuse's doors adds to -o
DOORS: dict[str, tuple[str, ...]] = {
    "unionfuse": (),
    "unionfuse-pyfuse3": ("express=off",),
    "unionfuse-indexed": (),  # and a lookup index of the layers, made before each mount
    "unionfuse-uring": ("uring=on",),
    "unionfuse-alone": ("keeper=off",),
}
LANES = tuple(kind for kind, added in DOORS.items() if "express=off" not in added)
KINDS = ("plain", "overlay", "fuse-overlayfs", *DOORS)

# the oracle, as the field's own test suites mount it; a test's options go over these
_OVERLAY_OPTIONS = {"index": "on", "redirect_dir": "on", "xino": "on"}
_INDEX_BUILD = (Path(sys.executable).with_name("unionfuse"), "index", "build", "-o")
_SECONDS_TO_MOUNT = 20
_SECONDS_TO_END = 20

Options = Mapping[str, str | None]


def escaped(path: Path | str) -> str:
    """`path` as it is written in -o: the separators of the list behind backslashes."""
    text = str(path)
    for character in "\\:,":
        text = text.replace(character, "\\" + character)
    return text


def option_list(options: Options) -> str:
    return ",".join(key if value is None else f"{key}={value}" for key, value in options.items())


def unionfuse_command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "unionfuse", *map(str, arguments)]


class MountFailed(Exception):
    """The program ended instead of mounting; the text is what it said."""


@dataclass
class Daemon:
    """A FUSE program in front (-f), its messages in a file."""

    process: subprocess.Popen[bytes]
    mountpoint: Path
    log: Path

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        mountpoint: Path,
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> "Daemon":
        """Start `command` and return once `mountpoint` answers. Raise MountFailed if it ends."""
        with open(log, "ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **(environment or {})},
                preexec_fn=before,
            )
        daemon = cls(process, mountpoint, log)
        daemon._await_mount()
        return daemon

    def _await_mount(self) -> None:
        limit = time.monotonic() + _SECONDS_TO_MOUNT
        while not is_mounted(self.mountpoint):
            if self.process.poll() is not None:
                raise MountFailed(f"exit {self.process.returncode}: {self.messages()}")
            if time.monotonic() > limit:
                self.kill()
                raise MountFailed(f"not mounted after {_SECONDS_TO_MOUNT} s: {self.messages()}")
            time.sleep(0.005)
        os.stat(self.mountpoint)

    def messages(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def serving(self) -> int | None:
        """The process that serves: where the mount has a keeper, the keeper's child.

        None for a moment, where a daemon is being replaced.
        """
        pid = self.process.pid
        if b"unionfuse-keeper" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
        return next(iter(linux.children(pid)), None)

    @property
    def pid(self) -> int:
        """The process that serves, as soon as there is one."""
        while (pid := self.serving) is None:
            pass
        return pid

    def wait(self) -> int:
        try:
            return self.process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            # A mount namespace that was made elsewhere in between has the mount as well.
            holders = linux.processes_with_mount(self.mountpoint)
            self.kill()
            raise AssertionError(
                f"the daemon went on for {_SECONDS_TO_END} s after the unmount; the mount is still"
                f" in the namespaces of {holders or 'nobody'}: {self.messages()}"
            ) from None

    def kill(self) -> None:
        """SIGKILL for the daemon, and for its keeper first if it has one."""
        if self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGSTOP)  # as long as it lives its child is known
        with contextlib.suppress(OSError):
            pid = self.process.pid
            if b"unionfuse-keeper" in Path(f"/proc/{pid}/cmdline").read_bytes():
                for child in linux.children(pid):
                    os.kill(child, signal.SIGKILL)
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def is_mounted(point: Path) -> bool:
    return any(found == str(point) for found, _, _ in linux.mounts_below(point))


@dataclass
class Stack:
    """The directories of one test: layers, upper, work, mount point."""

    base: Path
    lowers: list[Path]  # top first
    mountpoint: Path
    upper: Path | None
    work: Path | None

    @classmethod
    def make(cls, base: Path, layers: Sequence[Layer], *, writable: bool = True) -> "Stack":
        """Build `layers` (top first) in `base`, which must not be there yet."""
        base.mkdir()
        width = len(str(len(layers)))
        lowers = [
            build(base / f"lower{number:0{width}}", layer) for number, layer in enumerate(layers, 1)
        ]
        return cls.around(base, lowers, writable=writable)

    @classmethod
    def around(cls, base: Path, lowers: list[Path], *, writable: bool = True) -> "Stack":
        """Like `make`, over layer directories that are there already."""
        base.mkdir(exist_ok=True)
        made = [base / name for name in ("merged", "upper", "work")]
        for path in made if writable else made[:1]:
            path.mkdir(exist_ok=True)
            path.chmod(0o755)
        return cls(base, lowers, made[0], *(made[1:] if writable else (None, None)))

    def options(self) -> dict[str, str | None]:
        """lowerdir, upperdir and workdir, as every union takes them."""
        found: dict[str, str | None] = {"lowerdir": ":".join(map(escaped, self.lowers))}
        if self.upper:
            found |= {"upperdir": escaped(self.upper), "workdir": escaped(str(self.work))}
        return found


@dataclass
class Mounted:
    """A stack that is mounted (or flattened, for "plain") at `root`."""

    kind: str
    stack: Stack
    options: Options = field(default_factory=dict)
    root: Path = field(init=False)
    daemon: Daemon | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.root = self.stack.mountpoint

    def __truediv__(self, name: str | bytes) -> Path:
        return self.root / os.fsdecode(name)

    @property
    def upper(self) -> Path:
        assert self.stack.upper is not None
        return self.stack.upper

    @property
    def work(self) -> Path:
        assert self.stack.work is not None
        return self.stack.work

    @property
    def is_unionfuse(self) -> bool:
        return self.kind in DOORS

    def mount(self, *, environment: Mapping[str, str] | None = None) -> None:
        match self.kind:
            case "plain":
                return
            case "overlay":
                self._mount_overlay()
            case "fuse-overlayfs":
                self._start(["fuse-overlayfs", "-f"], self.options, environment)
            case _:
                door = dict.fromkeys(DOORS[self.kind])
                if self.kind == "unionfuse-indexed":
                    door |= self._build_index()
                self._start(unionfuse_command("-f"), {**self.options, **door}, environment)

    def _mount_overlay(self) -> None:
        options = {**_OVERLAY_OPTIONS, **self.options}
        if "userxattr" in options:  # which refuses to follow what anybody could have written
            options = {k: v for k, v in options.items() if k != "redirect_dir"}
        pairs: list[tuple[str, str | None]] = [
            ("lowerdir+", str(lower)) for lower in self.stack.lowers
        ]
        if self.stack.upper:
            pairs += [("upperdir", str(self.upper)), ("workdir", str(self.work))]
        else:
            options.pop("index")
        limit = time.monotonic() + _SECONDS_TO_END
        while True:
            try:
                linux.mount_overlay(self.root, [*pairs, *options.items()])
                return
            except OSError as error:
                # a mount namespace that was made elsewhere in between holds the last mount of upper
                if error.errno != errno.EBUSY or time.monotonic() > limit:
                    raise
                time.sleep(0.1)

    def _build_index(self) -> dict[str, str | None]:
        """The option that names a fresh index; none where these layers cannot have one."""
        path = self.stack.base / "lookup.index"
        made = subprocess.run(
            [*_INDEX_BUILD, path, *self.stack.lowers], capture_output=True, text=True, check=False
        )
        if made.returncode:
            assert "several file systems" in made.stderr or "device" in made.stderr, made.stderr
            return {}
        return {f"lookup_index={escaped(path)}": None}

    def _start(
        self, command: list[str], options: Options, environment: Mapping[str, str] | None
    ) -> None:
        line = option_list({**self.stack.options(), **options})
        self.daemon = Daemon.start(
            [*command, "-o", line, str(self.root)],
            self.root,
            self.stack.base / "log",
            environment=environment,
        )

    def unmount(self) -> None:
        """End the mount cleanly and see that the daemon and the work directory are clean."""
        if self.kind == "plain":
            return
        linux.umount(self.root)
        if self.daemon is not None:
            code, said = self.daemon.wait(), self.daemon.messages()
            self.daemon = None
            if self.is_unionfuse:
                assert code == 0, f"the daemon ended with {code}: {said}"
                assert "Traceback" not in said, f"the daemon had an accident: {said}"
        if self.stack.work:
            assert staging_files(self.work) == []

    def remount(self, kind: str | None = None, options: Options | None = None) -> None:
        """Unmount, and mount the same stack again, perhaps by another file system."""
        self.unmount()
        if self.kind != "plain":
            self.kind = kind or self.kind
        if options is not None:
            self.options = options
        self.mount()

    def kill(self) -> None:
        """SIGKILL for the daemon, and away with the dead mount."""
        assert self.daemon is not None
        self.daemon.kill()
        self.daemon = None
        with contextlib.suppress(OSError):
            linux.umount(self.root, linux.MNT_DETACH)

    def kill_daemon(self) -> None:
        """SIGKILL for the process that serves; a keeper starts another one."""
        assert self.daemon is not None
        os.kill(self.daemon.pid, signal.SIGKILL)

    def discard(self) -> None:
        """End it by any means; for the end of a test that failed."""
        for point, _, _ in linux.mounts_below(self.stack.base):
            with contextlib.suppress(OSError):
                linux.umount(point, linux.MNT_DETACH)
        if self.daemon is not None:
            self.daemon.kill()
            self.daemon = None

    def status(self) -> dict[str, int]:
        """The line that the daemon logs for SIGUSR1: nodes, open files, requests by opcode."""
        assert self.daemon is not None
        before = len(self.daemon.messages())
        self.daemon.process.send_signal(signal.SIGUSR1)
        while True:
            assert self.daemon.process.poll() is None
            for line in self.daemon.messages()[before:].splitlines(keepends=True):
                if "nodes=" in line and line.endswith("\n"):
                    words = [word.split("=") for word in line.split() if "=" in word]
                    return {key: int(value) for key, value in words if value.isdigit()}
            time.sleep(0.005)

    @contextlib.contextmanager
    def asked(self) -> Iterator[dict[str, int]]:
        """The requests of a block, by opcode, once it has ended. Needs the option `stats`."""
        found: dict[str, int] = {}
        before = self.status()
        yield found
        after = self.status()
        found.update({name: n - before.get(name, 0) for name, n in after.items() if name.isupper()})

    def snapshot(self, **how: object) -> Tree:
        return snapshot(self.root, **how)


def staging_files(work: Path) -> list[str]:
    """Return what lies in the work directory apart from the index of hard links and empty rooms."""
    return sorted(
        str(path.relative_to(work))
        for path in work.rglob("*")
        if path.relative_to(work).parts[0] != "index"
        and not (path.is_dir() and len(path.relative_to(work).parts) == 1)
    )


class Workshop:
    """Makes mounted trees for one test, and takes all of them away after it.

    Called as ``workshop({top layer}, {layer below}, …)``; returns a `Mounted`. After the test the
    lower layers must be what they were.
    """

    def __init__(self, directory: Path, kind: str) -> None:
        self.directory, self.kind = directory, kind
        self._trees: list[Mounted] = []
        self._layers: dict[Path, Tree] = {}
        self._hashed = True

    def __call__(
        self,
        *layers: Layer,
        options: Options | None = None,
        writable: bool = True,
        kind: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Mounted:
        kind = kind or self.kind
        base = self.directory / f"{len(self._trees) + 1}"
        if kind == "plain":
            stack = Stack.make(base, [], writable=writable)
            flatten(stack.mountpoint, list(layers))
        else:
            stack = Stack.make(base, layers, writable=writable)
        return self.mount(stack, kind=kind, options=options, environment=environment)

    def mount(
        self,
        stack: Stack,
        *,
        kind: str | None = None,
        options: Options | None = None,
        environment: Mapping[str, str] | None = None,
        watch: str = "content",
    ) -> Mounted:
        """Mount a stack that is there.

        `watch` says how the layers are compared after the test: "content", "times" (for big ones:
        all but the content) or "nothing".
        """
        tree = Mounted(kind or self.kind, stack, options or {})
        if watch != "nothing":
            self._hashed = watch == "content"
            for layer in stack.lowers:
                self._layers.setdefault(layer, fingerprint(layer, content=self._hashed))
        self._trees.append(tree)
        tree.mount(environment=environment)
        return tree

    def forget_layer(self, layer: Path) -> None:
        """The test changed this layer on purpose."""
        self._layers.pop(layer, None)

    def finish(self, *, failed: bool) -> None:
        """Unmount all, remove all; raise AssertionError about what was left wrong."""
        try:
            for tree in self._trees:
                if is_mounted(tree.root) and tree.kind != "plain" and not failed:
                    tree.unmount()
            for layer, before in self._layers.items():
                after = fingerprint(layer, content=self._hashed)
                assert_equal(before, after, (f"{layer.name} before", "after the test"))
        finally:
            for tree in self._trees:
                tree.discard()

    def messages(self) -> str:
        """What the daemons wrote, for the report of a failure."""
        return "\n".join(
            f"--- {path}:\n{path.read_text(errors='replace')[-6000:]}"
            for path in sorted(self.directory.glob("*/log"))
            if path.stat().st_size
        )


def fingerprint(layer: Path, *, content: bool = True) -> Tree:
    """A snapshot of a layer with everything that must not change: times and inode numbers too."""
    return snapshot(layer, content=content, times=("mtime_ns", "ctime_ns"), inodes=True)


def remove_tree(directory: Path) -> None:
    """Remove `directory`, also where paths are longer than PATH_MAX or modes forbid it."""
    shutil.rmtree(directory, ignore_errors=True)
    if directory.exists():
        subprocess.run(["rm", "-rf", "--one-file-system", directory], check=False)
