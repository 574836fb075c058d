"""What is built here runs in podman, and what podman built is a base here."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.building import Builder
from harness.peers import container_storage


class Podman:
    """Debian's podman on a storage of its own."""

    def __init__(self, storage: list[str]) -> None:
        self._command = ["podman", *storage, "--runtime", "runc", "--cgroup-manager", "cgroupfs"]

    def run(self, *words: str | Path) -> str:
        done = subprocess.run([*self._command, *map(str, words)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture
def podman() -> Iterator[Podman]:
    with container_storage() as storage:
        peer = Podman(storage)
        yield peer
        peer.run("rmi", "--all", "--force")


def test_images_go_to_podman_and_back(podman: Podman, tmp_path: Path) -> None:
    builder = Builder(tmp_path)
    context = tmp_path / "context"
    context.mkdir()
    (context / "Dockerfile").write_text(
        "FROM base\nENV GREETING=hello\n"
        "RUN mkdir /data && echo built > /data/file && rm /etc/group\n"
        "RUN rm -r /data && mkdir /data && echo again > /data/new\n"
        'WORKDIR /data\nUSER app\nENTRYPOINT ["/bin/sh", "-c"]\n'
        'CMD ["echo $GREETING; id -u; pwd; ls; ls /etc/group 2>&1; true"]\n'
    )
    image = builder.build(context, "-t", "localhost/app:1")
    archive = tmp_path / "app.tar"
    builder.run("save", "-o", archive, "localhost/app:1")
    podman.run("load", "-i", archive)
    options = ["--network=none", "--ulimit=nofile=256:256", "--ulimit=nproc=256:256", "--rm"]
    said = podman.run("run", *options, "localhost/app:1")
    assert said.split("\n") == [
        "hello",
        "1000",
        "/data",
        "new",
        "ls: /etc/group: No such file or directory",
    ]
    assert podman.run("inspect", "--format", "{{.Id}}", "localhost/app:1") == image.removeprefix(
        "sha256:"
    )
    (context / "Dockerfile").write_text("FROM localhost/app:1\nUSER root\nCOPY Dockerfile /data/\n")
    podman.run("build", "--isolation", "chroot", "--format", "docker", "-t", "child", context)
    back = tmp_path / "child.tar"
    podman.run("save", "-o", back, "localhost/child")
    builder.run("load", "-i", back)
    (context / "Dockerfile").write_text("FROM localhost/child\nRUN ls /data > /seen\n")
    final = builder.build(context)
    assert builder.read(final, "/seen").split() == ["Dockerfile", "new"]
    assert os.path.basename(builder.config(final).run.working_dir) == "data"
