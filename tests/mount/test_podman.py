"""podman with unionfuse as its mount program, from import to load."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import linux
from harness.mounts import remove_tree
from harness.watchdog import Watchdog, kill_processes

pytestmark = pytest.mark.timeout(240)

APPLETS = ("sh", "ls", "cat", "echo", "rm", "mkdir", "touch", "mv", "ln", "stat", "test", "rmdir")


class Podman:
    """A podman of its own: images, containers and configuration below `directory`.

    Containers use the host's network and runc, which takes the host's cgroups as they are; hard
    limits stay where they are, for raising them needs CAP_SYS_RESOURCE.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.calls = directory / "calls"
        program = directory / "mount-program"
        program.write_text(
            f'#!/bin/sh\necho "$@" >>{self.calls}\nexec {sys.executable} -m unionfuse "$@"\n'
        )
        program.chmod(0o755)
        (directory / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\nrunroot = "{directory}/run"\n'
            f'graphroot = "{directory}/root"\n'
            f'[storage.options.overlay]\nmount_program = "{program}"\n'
        )
        limits = ", ".join(
            f'"{name}={hard}:{hard}"'
            for name, kind in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC))
            for hard in [min(resource.getrlimit(kind)[1] % 2**32, 16384)]
        )
        (directory / "containers.conf").write_text(
            f'[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "none"\nruntime = "runc"\n'
            f'tmp_dir = "{directory}/tmp"\n[containers]\nnetns = "host"\n'
            f"default_ulimits = [{limits}]\n"
        )
        (directory / "tmp").mkdir()
        self._environment = {
            **os.environ,
            "CONTAINERS_STORAGE_CONF": str(directory / "storage.conf"),
            "CONTAINERS_CONF": str(directory / "containers.conf"),
            "TMPDIR": str(directory / "tmp"),
        }

    def __call__(self, *words: str | Path) -> str:
        done = subprocess.run(
            ["podman", *words],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"podman {' '.join(map(str, words))}: {done.stderr}"
        return done.stdout

    def shell(self, image: str, script: str, *options: str) -> str:
        return self("run", *options, image, "/bin/sh", "-ec", script)


@pytest.fixture
def podman(scratch: Path, watchdog: Watchdog) -> Iterator[Podman]:
    directory = scratch / "podman"
    directory.mkdir()
    watchdog.arm(240)
    made = Podman(directory)
    try:
        yield made
        made("rm", "-fa", "-t", "0")
    finally:
        for point, _, _ in linux.mounts_below(directory):
            linux.umount(point, linux.MNT_DETACH)
        kill_processes(directory)
        watchdog.disarm()
        remove_tree(directory)


@pytest.fixture
def root_archive(podman: Podman) -> Path:
    """A root file system with a shell, as a tar."""
    root = podman.directory / "rootfs"
    for name in ("bin", "etc", "tmp", "data/sub"):
        (root / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/busybox")
    for name in APPLETS:
        (root / "bin" / name).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
    (root / "etc/motd").write_text("welcome\n")
    (root / "data/one").write_text("one\n")
    os.link(root / "data/one", root / "data/two")
    (root / "data/sub/deep").write_text("deep\n")
    archive = podman.directory / "rootfs.tar"
    subprocess.run(["tar", "-C", root, "-cf", archive, "."], check=True)
    return archive


def test_the_life_of_an_image(podman: Podman, root_archive: Path) -> None:
    podman("import", "-q", root_archive, "localhost/base:1")
    script = """
        echo hello >/new; rm /etc/motd; echo more >>/data/one
        mv /data/sub /data/moved; mkdir /data/sub; ls /data/sub /data/moved; stat -c %h /data/two
    """
    said = podman.shell("localhost/base:1", script, "--name", "first")
    assert said.split() == ["/data/moved:", "deep", "/data/sub:", "2"]
    changed = set(podman("diff", "first").split("\n"))
    assert {"A /new", "D /etc/motd", "C /data/one", "A /data/moved/deep"} <= changed
    podman("commit", "-q", "first", "localhost/second:1")
    podman("rm", "-f", "-t", "0", "first")

    script = """
        cat /new /data/two /data/moved/deep; ls /data/sub; test ! -e /etc/motd; stat -c %h /data/one
    """
    said = podman.shell("localhost/second:1", script, "--rm")
    assert said.split() == ["hello", "one", "more", "deep", "2"]

    (podman.directory / "Dockerfile").write_text(
        "FROM localhost/second:1\n"
        "RUN mkdir /built && echo built >/built/file && rm /new\n"
        "RUN mv /built /moved && ls / >/listing\n"
    )
    podman(
        "build", "-q", "--network=host", "--isolation=chroot", "--tag=localhost/third:1",
        f"--file={podman.directory}/Dockerfile", podman.directory / "tmp",
    )  # fmt: skip
    archive = podman.directory / "third.tar"
    podman("save", "-q", "-o", archive, "localhost/third:1")
    podman("rmi", "-fa")
    podman("load", "-q", "-i", archive)
    said = podman.shell("localhost/third:1", "cat /moved/file /listing /data/two", "--rm")
    assert said.split()[0] == "built"
    assert "new" not in said.split() and "moved" in said.split()
    assert said.split()[-2:] == ["one", "more"]
    assert "upperdir" in podman.calls.read_text()
    assert not any(kind == "fuse.unionfuse" for _, _, kind in linux.mounts_below(podman.directory))
