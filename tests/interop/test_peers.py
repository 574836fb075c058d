"""Images that podman and buildah make and take, through a registry: nothing is lost on the way."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.command import Command
from harness.peers import container_storage
from harness.registry import Registry, run, skopeo

# podman of this age knows no zstd layers in docker's manifests
FORMS = [("oci", "gzip"), ("oci", "zstd"), ("oci", "none"), ("docker", "gzip"), ("docker", "none")]
PODMAN = ["--cgroup-manager=cgroupfs", "--runtime=runc", "--events-backend=none"]

Peer = Callable[..., str]


@pytest.fixture(scope="module")
def storage() -> Iterator[list[str]]:
    with container_storage() as options:
        yield options


@pytest.fixture(scope="module")
def buildah(storage: list[str]) -> Peer:
    return lambda *words: run("buildah", *storage, *words, STORAGE_DRIVER="vfs").strip()


@pytest.fixture(scope="module")
def podman(storage: list[str]) -> Peer:
    return lambda *words: run("podman", *storage, *PODMAN, *words).strip()


def fill(root: Path) -> None:
    """A root file system with what a registry round trip could lose."""
    (root / "bin").mkdir()
    shutil.copy("/bin/busybox", root / "bin/busybox")
    os.link(root / "bin/busybox", root / "bin/hard")
    os.symlink("busybox", root / "bin/sh")
    (root / "bin/setuid").write_bytes(b"#!/bin/sh\n")
    os.chown(root / "bin/setuid", 12, 34)
    os.chmod(root / "bin/setuid", 0o4755)
    (root / "tmp").mkdir()
    os.chmod(root / "tmp", 0o1777)
    (root / "old").write_bytes(b"old")


@pytest.fixture(scope="module", params=["oci", "docker"])
def image(request: pytest.FixtureRequest, registry: Registry, buildah: Peer) -> tuple[str, str]:
    """An image of two layers that buildah made and pushed: its name and its id."""
    name = f"{registry.host}/peer/{request.param}:1"
    first = buildah("from", "scratch")
    fill(Path(buildah("mount", first)))
    buildah("config", "--cmd", "/bin/sh", "--env", "A=b", "--label", "by=buildah", first)
    base = buildah("commit", "-q", f"--format={request.param}", first)
    second = buildah("from", base)
    mounted = Path(buildah("mount", second))
    (mounted / "old").unlink()
    (mounted / "new").write_bytes(b"new")
    buildah("commit", "-q", f"--format={request.param}", second, name)
    buildah("push", "-q", "--tls-verify=false", name)
    buildah("rm", first, second)
    manifest = json.loads(skopeo("inspect", "--raw", "--tls-verify=false", f"docker://{name}"))
    return name, manifest["config"]["digest"]


def test_what_buildah_pushed_comes_whole_and_goes_back_the_same(
    image: tuple[str, str], command: Command, podman: Peer
) -> None:
    name, identity = image
    command("pull", name)
    with command.store() as store:
        pulled = store.image(name)
        assert pulled.id == identity
        assert len(pulled.layers) == 2
        base = pulled.layers[0].directory
        status = os.stat(base / "bin/setuid")
        assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o4755, 12, 34)
        assert os.stat(base / "tmp").st_mode & 0o7777 == 0o1777
        assert os.readlink(base / "bin/sh") == "busybox"
        assert os.path.samefile(base / "bin/hard", base / "bin/busybox")
        assert (pulled.layers[1].directory / "new").read_bytes() == b"new"
        digest = pulled.manifest_digest
    back = name.replace("/peer/", "/back/")
    command.tag(name, back)
    assert f"digest: {digest}" in command("push", back)
    podman("pull", "-q", "--tls-verify=false", back)
    assert "sha256:" + podman("image", "inspect", "--format={{.Id}}", back) == identity


@pytest.mark.parametrize(("form", "compression"), FORMS)
def test_what_is_pushed_runs_in_podman(
    image: tuple[str, str], command: Command, podman: Peer, form: str, compression: str
) -> None:
    name, identity = image
    command("pull", name)
    back = name.replace("/peer/", f"/runs/{form}-{compression}/")
    command.tag(name, back)
    command("push", "--format", form, "--compression", compression, back)
    podman("pull", "-q", "--tls-verify=false", back)
    listed = podman(
        *(
            "run",
            "--rm",
            "--network=none",
            "--ulimit=nofile=256:256",
            "--ulimit=nproc=256:256",
            back,
        ),
        *("/bin/busybox", "sh", "-c", "/bin/busybox ls / && echo $A"),
    )
    assert {"new", "bin", "b"} <= set(listed.split()) and "old" not in listed.split()
    inspected = json.loads(podman("image", "inspect", back))[0]
    assert "sha256:" + inspected["Id"] == identity
