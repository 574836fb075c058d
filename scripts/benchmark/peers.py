"""How each file system is mounted over the same layers, and what its daemon holds in memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmark.trees import Tree

PROGRAM = Path(sys.executable).with_name("unionfuse")

_PATIENCE = 20.0  # seconds
# A daemon may answer before it has loaded all of itself. What that costs is the mount's time, which
# is measured apart; here it would be noise in whatever happens to come first.
_SETTLING = 0.4  # seconds


@dataclass
class Mounted:
    """One mount that is ready for work."""

    path: Path
    tree: Tree
    writable: bool
    pinned: bool
    process: subprocess.Popen[bytes] | None
    memory: dict[str, int] = field(default_factory=dict)  # KiB: VmHWM, RssAnon
    requests: dict[str, int] = field(default_factory=dict)  # by opcode, of the whole mount

    def note_memory(self) -> None:
        """Remember what the daemon holds now, at its peak and in anonymous pages."""
        if self.process is None:
            return
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        for name in ("VmHWM", "RssAnon"):
            found = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
            assert found, f"no {name} of the daemon"
            self.memory[name] = max(int(found[1]), self.memory.get(name, 0))

    def pin(self, command: list[str]) -> list[str]:
        return ["taskset", "-c", "0", *command] if self.pinned else command


@dataclass(frozen=True)
class Stack:
    """What a mount command is made from. Layers are named relative to the tree's directory."""

    tree: Tree
    mountpoint: Path
    upper: Path
    work: Path
    log: Path

    @property
    def lowerdir(self) -> str:
        return ":".join(str(number) for number in range(self.tree.layers))


@dataclass(frozen=True)
class Peer:
    """A file system in the comparison.

    Attributes:
        command: the words that mount a stack: a daemon that stays in the foreground, or mount(8).
        fuse: there is a daemon.
        copies_up: a file in a read-only layer can be changed.
        answers: has files at all; what has not can only be asked for names that are absent.
    """

    name: str
    program: str
    command: Callable[[Stack], list[str]] | None
    fuse: bool = True
    copies_up: bool = True
    answers: bool = True

    @property
    def indexed(self) -> bool:
        return self.name in ("unionfuse+index", "unionfuse+uring")

    @property
    def installed(self) -> bool:
        return self.program == "" or shutil.which(self.program) is not None


def _unionfuse(*options: str, index: bool = False) -> Callable[[Stack], list[str]]:
    def command(stack: Stack) -> list[str]:
        line = [f"lowerdir={stack.lowerdir}", f"upperdir={stack.upper}", f"workdir={stack.work}"]
        line += ["stats", f"log={stack.log}", *options]
        if index:
            line.append(f"lookup_index={lookup_index(stack.tree)}")
        return [
            sys.executable,
            "-m",
            "unionfuse",
            "-f",
            "-o",
            ",".join(line),
            str(stack.mountpoint),
        ]

    return command


def _fuse_overlayfs(stack: Stack) -> list[str]:
    line = f"lowerdir={stack.lowerdir},upperdir={stack.upper},workdir={stack.work}"
    return ["fuse-overlayfs", "-f", "-o", line, str(stack.mountpoint)]


def _unionfs(stack: Stack) -> list[str]:
    branches = [f"{stack.upper}=RW", *(f"{lower}=RO" for lower in stack.tree.lowers)]
    line = "cow,hide_meta_files,allow_other"
    return ["unionfs-fuse", "-f", "-o", line, ":".join(branches), str(stack.mountpoint)]


def _mergerfs(stack: Stack) -> list[str]:
    branches = [f"{stack.upper}=RW", *(f"{lower}=RO" for lower in stack.tree.lowers)]
    line = "allow_other,category.create=ff,cache.files=auto-full,dropcacheonclose=false"
    return ["mergerfs", "-f", "-o", line, ":".join(branches), str(stack.mountpoint)]


def _floor(stack: Stack) -> list[str]:
    return [str(compiled("floor.c", stack.tree.root.parent)), str(stack.mountpoint)]


def _overlay(stack: Stack) -> list[str]:
    line = f"lowerdir={stack.lowerdir},upperdir={stack.upper},workdir={stack.work}"
    return ["mount", "-i", "-t", "overlay", "overlay", "-o", line, str(stack.mountpoint)]


PEERS = {
    peer.name: peer
    for peer in (
        Peer("unionfuse", "", _unionfuse()),
        Peer("unionfuse+index", "", _unionfuse(index=True)),
        Peer("unionfuse+uring", "", _unionfuse("uring=on", index=True)),
        Peer("unionfuse-pyfuse3", "", _unionfuse("express=off")),
        Peer("fuse-overlayfs", "fuse-overlayfs", _fuse_overlayfs),
        Peer("unionfs-fuse", "unionfs-fuse", _unionfs),
        Peer("mergerfs", "mergerfs", _mergerfs, copies_up=False),
        Peer("overlayfs", "", _overlay, fuse=False),
        Peer("C floor", "", _floor, copies_up=False, answers=False),
        Peer("native", "", None, fuse=False, copies_up=False),
    )
}


def compiled(source: str, cache: Path) -> Path:
    """A program of ours in C, compiled when its source is newer."""
    path = Path(__file__).with_name(source)
    program = cache / path.stem
    if not program.exists() or program.stat().st_mtime < path.stat().st_mtime:
        subprocess.run(["gcc", "-O2", "-Wall", "-o", program, path], check=True)
    return program


def lookup_index(tree: Tree) -> Path:
    """The lookup index of a tree's layers, built when it is first asked for."""
    return index_of(tree.root / "lookup.index", tree.lowers)


def index_of(path: Path, layers: Sequence[Path]) -> Path:
    """The lookup index of layer directories, topmost first."""
    if not path.exists():
        words = [str(word) for word in (PROGRAM, "index", "build", "-o", path, *layers)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return path


class CannotMount(Exception):
    """A peer does not mount this many layers, say; the text is what it said."""


@contextmanager
def mounted(peer: Peer, tree: Tree, scratch: Path, pinned: bool) -> Iterator[Mounted]:
    """Mount a fresh upper on a tree; unmount at the end and take the daemon's counts along.

    The plain directory is read where it lies; what is written goes to a directory beside it.

    Raises:
        CannotMount: the program ended instead.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    stack = Stack(tree, scratch / "mnt", scratch / "upper", scratch / "work", scratch / "log")
    for place in (stack.mountpoint, stack.upper, stack.work):
        place.mkdir(parents=True)
    if peer.command is None:
        yield Mounted(tree.flat, tree, False, pinned, None)
        return
    mount = Mounted(stack.mountpoint, tree, True, pinned, None)
    log = scratch / "messages"
    with open(log, "wb") as messages:
        mount.process = subprocess.Popen(
            mount.pin(peer.command(stack)), cwd=tree.root, stdout=messages, stderr=messages
        )
    _wait_until_mounted(mount.process, stack.mountpoint, log)
    if peer.fuse:
        time.sleep(_SETTLING)
    else:
        mount.process.wait()  # mount(8) has done its work
        mount.process = None
    try:
        yield mount
        mount.note_memory()
    finally:
        _unmount(mount)
    mount.requests = _counts(stack.log)


def _wait_until_mounted(process: subprocess.Popen[bytes], mountpoint: Path, messages: Path) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        is_over = process.poll() is not None or time.monotonic() > deadline  # before the look
        if os.path.ismount(mountpoint):
            return
        if is_over:
            process.kill()
            process.wait()
            lines = messages.read_text(errors="replace").splitlines()
            raise CannotMount(next(filter(str.strip, lines), "it does not say why"))
        time.sleep(0.002)


def _unmount(mount: Mounted) -> None:
    for _ in range(50):
        if subprocess.run(["umount", mount.path], stderr=subprocess.DEVNULL).returncode == 0:
            break
        time.sleep(0.1)
    else:
        subprocess.run(["umount", "-l", mount.path], check=True)
    if mount.process is not None:
        mount.process.wait(_PATIENCE)


def _counts(log: Path) -> dict[str, int]:
    """The counts of the last line that `-o stats` logged: NAME=NUMBER …"""
    if not log.exists():
        return {}
    lines = [line for line in log.read_text().splitlines() if " unmounted: " in line]
    pairs = re.findall(r"(\S+)=(\d+)", lines[-1]) if lines else []
    return {name: int(number) for name, number in pairs if name not in ("nodes", "open")}
