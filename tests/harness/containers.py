"""A store with one tiny image and the command line to run containers of it, for tests.

`Box` keeps everything below one directory; `check_clean` tells what containers left on the host.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COMMAND = str(Path(sys.executable).parent / "unionfuse")
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PASSWD = "root:x:0:0:root:/root:/bin/sh\ntester:x:1000:1000::/home/tester:/bin/sh\n"
GROUP = "root:x:0:\ntester:x:1000:\nextra:x:2000:tester\n"


def busybox_tar() -> bytes:
    """The root file system of the tiny image: Debian's busybox-static and a few files."""
    program = Path("/bin/busybox").read_bytes()
    names = subprocess.check_output(["/bin/busybox", "--list"], text=True).split()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:

        def add(name: str, kind: bytes, mode: int, data: bytes = b"", target: str = "") -> None:
            member = tarfile.TarInfo(name)
            member.type, member.mode, member.linkname = kind, mode, target
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))

        for name in ("bin", "etc", "proc", "sys", "dev", "root", "srv", "srv/sub"):
            add(name, tarfile.DIRTYPE, 0o755)
        add("tmp", tarfile.DIRTYPE, 0o1777)
        add("bin/busybox", tarfile.REGTYPE, 0o755, program)
        for name in names:
            if name != "busybox":
                add(f"bin/{name}", tarfile.SYMTYPE, 0o777, target="busybox")
        add("etc/passwd", tarfile.REGTYPE, 0o644, PASSWD.encode())
        add("etc/group", tarfile.REGTYPE, 0o644, GROUP.encode())
        add("srv/seed", tarfile.REGTYPE, 0o640, b"seed\n")
        add("srv/sub/deep", tarfile.REGTYPE, 0o600, b"deep\n")
    return buffer.getvalue()


class Box:
    """A store of its own; `box("run", "--rm", …)` runs the command line on it."""

    def __init__(self, directory: Path, driver: str = "overlay") -> None:
        self.root, self.run_root = directory / "store", directory / "run"
        config = directory / "config.toml"
        config.write_text(f'[store]\ndriver = "{driver}"\n')
        self.environment = os.environ | {
            "UNIONFUSE_ROOT": str(self.root),
            "UNIONFUSE_RUNROOT": str(self.run_root),
            "UNIONFUSE_CONFIG": str(config),
            "UNIONFUSE_DEBUG": "",
        }

    def __call__(
        self,
        *words: str,
        code: int | None = 0,
        input: str | bytes | None = None,
        timeout: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Run `unionfuse WORDS`; an exit code other than `code` fails the test (None: any)."""
        data = input.encode() if isinstance(input, str) else input
        done = subprocess.run(
            [COMMAND, *words],
            env=self.environment,
            capture_output=True,
            input=data,
            stdin=subprocess.DEVNULL if data is None else None,
            timeout=timeout,
        )
        result = subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
        )
        assert code is None or result.returncode == code, (
            f"{' '.join(words)}: exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
        )
        return result

    def out(self, *words: str, **options: Any) -> str:
        """What it prints."""
        return self(*words, **options).stdout

    def sh(self, script: str, *options: str, code: int = 0) -> str:
        """Run a shell script in a fresh container without a network; what it prints."""
        words = ("run", "--rm", "--network", "none", *options, "busybox", "sh", "-c", script)
        return self.out(*words, code=code)

    def start(self, name: str, *options: str, command: str = "sleep 1000") -> str:
        """A container in the background; its id."""
        words = ["run", "-d", "--name", name]
        if not any(option in ("--network", "--net") for option in options):
            words += ["--network", "none"]
        return self.out(*words, *options, "busybox", "sh", "-c", command).strip()

    def inspect(self, name: str) -> Any:
        """Docker's object of a container."""
        return json.loads(self.out("inspect", name))[0]

    def state(self, name: str) -> Any:
        """The file state.json of a container."""
        return json.loads((self.directory(name) / "state.json").read_text())

    def directory(self, name: str) -> Path:
        return (self.root / "containers" / "names" / name).resolve()

    def names(self, *options: str) -> list[str]:
        """The names that `ps` shows."""
        return self.out("ps", "--format", "{{.Names}}", *options).split()

    def image(self, name: str, **run: Any) -> None:
        """An image of the tiny root file system with this `RunConfig`."""
        from unionimage.image_config import History, ImageConfig, RunConfig
        from unionimage.reference import Reference
        from unionimage.spec import Platform
        from unionimage.store import Store

        run = {"cmd": ("sh",), "env": (PATH,)} | run
        with Store.open(self.root) as store, store.lease("test") as lease:
            layer = lease.add_layer(io.BytesIO(busybox_tar()))
            config = ImageConfig(Platform.host(), run=RunConfig(**run))
            config = config.with_step(History(created_by="import"), layer.diff_id)
            lease.add_image(config, names=[Reference.parse(name).with_default_tag()])

    def remove_all(self) -> None:
        """Containers, volumes and networks of this box."""
        there = self.root / "containers"
        if there.exists() and (names := [path.name for path in there.glob("?" * 64)]):
            self("rm", "-f", "-v", *names, code=None)
        if any((self.root / "volumes").glob("*")):
            self("volume", "prune", "-af", code=None)
        if any((self.root / "networks").glob("[!.b]*.json")):
            self("network", "prune", "-f", code=None)


def monitor_of(box: Box, name: str) -> int:
    """The pid of the process that keeps a container: the parent of its first process."""
    text = Path(f"/proc/{box.state(name)['Pid']}/stat").read_text()
    return int(text.rpartition(")")[2].split()[1])


def leftovers(box: Box, marks: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Mounts, monitors and cgroups of a box that are still there."""
    here = str(box.run_root)
    mounts = [
        line.split()[4]
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if here in line or str(box.root) in line
    ]
    processes = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                variables = (entry / "environ").read_bytes()
                command = (entry / "cmdline").read_bytes()
                name = (entry / "comm").read_text().strip()
            except OSError:
                continue
            lasting = name in ("aardvark-dns", "unionfuse-spawn")  # they end by themselves
            if here.encode() in variables and command and not lasting:
                processes.append(f"{entry.name} {command!r}")
    cgroups = [
        str(path) for identity in marks for path in Path("/sys/fs/cgroup").glob(f"**/{identity}")
    ]
    return {"mounts": mounts, "processes": processes, "cgroups": cgroups}


def nothing_left(box: Box, marks: tuple[str, ...] = ()) -> bool:
    """True when nothing of a box is left, now or in a moment: a daemon may just be ending."""
    nothing = {"mounts": [], "processes": [], "cgroups": []}
    deadline = time.monotonic() + 5
    while (left := leftovers(box, marks)) != nothing and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == nothing, left
    return True


def boxed(directory: Path, driver: str = "overlay") -> Iterator[Box]:
    """A box with the tiny image, cleaned up at the end: the body of a fixture."""
    directory.mkdir()
    box = Box(directory, driver)
    box.image("busybox")
    try:
        yield box
    finally:
        box.remove_all()
