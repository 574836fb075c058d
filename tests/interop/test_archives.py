"""Archives that docker, podman, skopeo and umoci make and take: digests are compared both ways."""

import json
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from harness.command import Command, make_command
from harness.inside import Inside
from harness.peers import container_storage, peer_directory
from harness.registry import run
from harness.tars import archive, member, tree
from unionimage.digest import Digest

PODMAN = ["--cgroup-manager=cgroupfs", "--runtime=runc", "--events-backend=none"]
NAME = "registry.test/app:1"

Peer = Callable[..., str]


@pytest.fixture
def unionfuse(scratch: Path, tmp_path: Path) -> Iterator[Command]:
    root = scratch / f"interop-{tmp_path.name}-{os.getpid()}"
    command = Inside(root, make_command(tmp_path, "store").environment)
    yield command
    command("check")
    shutil.rmtree(command.root)


@pytest.fixture(scope="module")
def podman() -> Iterator[Peer]:
    with container_storage() as options:
        yield lambda *words: run("podman", *options, *PODMAN, *words).strip()


@pytest.fixture(scope="module")
def docker() -> Iterator[Peer]:
    """A docker daemon of its own, that touches no network."""
    with peer_directory() as folder:
        yield from _docker_in(folder)


def _docker_in(folder: Path) -> Iterator[Peer]:
    socket = f"unix://{folder}/socket"
    words = ["--data-root", f"{folder}/data", "--exec-root", f"{folder}/run", "--host", socket]
    words += ["--pidfile", f"{folder}/pid", "--bridge=none", "--iptables=false"]
    words += ["--storage-driver=vfs", "--log-level=error"]
    daemon = subprocess.Popen(["/usr/sbin/dockerd", *words], stdout=-3, stderr=-3)

    def client(*words: str) -> str:
        return run("docker", "--host", socket, *words, DOCKER_CONFIG=str(folder)).strip()

    try:
        for _ in range(300):
            with suppress(subprocess.CalledProcessError, AssertionError):
                client("version")
                break
            time.sleep(0.1)
        yield client
    finally:
        daemon.terminate()
        daemon.wait(30)


@pytest.fixture(scope="module")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an archive could lose: links, owners, modes, xattrs, long and odd names, times."""
    path = tmp_path_factory.mktemp("rootfs") / "rootfs.tar"
    path.write_bytes(
        archive(
            member("bin", tarfile.DIRTYPE, mtime=5),
            member("bin/busybox", data=Path("/bin/busybox").read_bytes(), mode=0o755, mtime=7),
            member("bin/sh", tarfile.LNKTYPE, linkname="bin/busybox"),
            member("bin/su", data=b"x", mode=0o4755, uid=12, gid=34, mtime=9),
            member("tmp", tarfile.DIRTYPE, mode=0o1777),
            member("n" * 120, data=b"long", pax_headers={"mtime": "1234567890.123456789"}),
            member("é" * 60, tarfile.SYMTYPE, linkname="../" * 50),
            member("x", data=b"x", pax_headers={"SCHILY.xattr.user.a": "b"}),
        )
    )
    return path


def described(command: Command, name: str) -> tuple[str, list[str]]:
    (shown,) = json.loads(command("inspect", name))
    return shown["Id"], shown["RootFS"]["Layers"]


@pytest.mark.parametrize("form", ["docker-archive", "oci-archive", "oci-dir"])
def test_podman_saves_what_we_load_and_the_other_way_round(
    unionfuse: Command, podman: Peer, rootfs: Path, tmp_path: Path, form: str
) -> None:
    podman("import", "-q", str(rootfs), NAME)
    identity = podman("inspect", "-f", "{{.Id}}", NAME)
    layers = json.loads(podman("inspect", "-f", "{{json .RootFS.Layers}}", NAME))
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    podman("save", "-q", "--format", form, "-o", str(theirs), NAME)
    assert unionfuse("load", "-q", "-i", str(theirs)) == f"Loaded image: {NAME}\n"
    found, found_layers = described(unionfuse, NAME)
    assert found_layers == layers
    if form == "docker-archive":
        assert found == f"sha256:{identity}"
    unionfuse("save", "-q", "--format", form, "-o", str(ours), NAME)
    podman("rmi", "-f", NAME)
    loaded = podman("load", "-q", "-i", str(ours)).split()[-1]
    assert f"sha256:{podman('inspect', '-f', '{{.Id}}', loaded)}" == found
    assert json.loads(podman("inspect", "-f", "{{json .RootFS.Layers}}", loaded)) == layers
    podman("rmi", "-f", loaded)


def test_docker_saves_what_we_load_and_the_other_way_round(
    unionfuse: Command, docker: Peer, rootfs: Path, tmp_path: Path
) -> None:
    identity = docker("import", str(rootfs), NAME)
    context = tmp_path / "context"
    context.mkdir()
    (context / "Dockerfile").write_text(f"FROM {NAME}\nENV A=b\nCOPY Dockerfile /new\n")
    docker("build", "-q", "-t", "registry.test/built:2", str(context))
    built = docker("inspect", "-f", "{{.Id}}", "registry.test/built:2")
    theirs, ours = tmp_path / "theirs.tar", tmp_path / "ours.tar"
    docker("save", "-o", str(theirs), NAME, "registry.test/built:2")
    unionfuse("load", "-q", "-i", str(theirs))
    assert described(unionfuse, NAME)[0] == identity
    assert described(unionfuse, "registry.test/built:2")[0] == built
    assert unionfuse("diff", "registry.test/built:2") == "A /new\n"
    unionfuse("save", "-q", "-o", str(ours), NAME, "registry.test/built:2")
    docker("rmi", NAME, "registry.test/built:2")
    assert "registry.test/built:2" in docker("load", "-i", str(ours))
    assert docker("inspect", "-f", "{{.Id}}", NAME, "registry.test/built:2").split() == [
        identity,
        built,
    ]
    docker("rmi", NAME, "registry.test/built:2")


@pytest.mark.parametrize(
    ("form", "compression"), [("docker-archive", "gzip"), ("oci-dir", "zstd"), ("oci-dir", "none")]
)
def test_skopeo_converts_what_we_save(
    unionfuse: Command, rootfs: Path, tmp_path: Path, form: str, compression: str
) -> None:
    identity = unionfuse("import", "-c", "ENV A=b", str(rootfs), NAME).strip()
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    unionfuse("save", "-q", "--format", form, "-o", str(ours), NAME)
    source = f"docker-archive:{ours}" if form == "docker-archive" else f"oci:{ours}"
    target = f"oci:{theirs}:{NAME}" if compression != "none" else f"oci-archive:{theirs}:{NAME}"
    options = ["--dest-compress-format", compression] if compression != "none" else []
    run("skopeo", "copy", "-q", *options, source, target)
    other = Inside(tmp_path / "other", unionfuse.environment)
    other("load", "-q", "-i", str(theirs))
    found, layers = described(other, NAME)
    assert layers == described(unionfuse, NAME)[1]
    if form == "oci-dir":  # of docker's archive it writes the config anew
        assert found == identity
    other("check")


def test_umoci_unpacks_the_same_tree(unionfuse: Command, rootfs: Path, tmp_path: Path) -> None:
    """What our layer directories hold is what umoci makes of the same layers, and back."""
    unionfuse("import", str(rootfs), NAME)
    upper = unionfuse.root / "staging-upper"
    upper.mkdir()
    (upper / "bin").mkdir()
    os.mknod(upper / "bin/su", 0o020000, 0)
    (upper / "new").write_text("new")
    unionfuse("commit", "--upper", str(upper), "--parent", NAME, "registry.test/app:2")
    layout, bundle, target = tmp_path / "layout", tmp_path / "bundle", tmp_path / "target"
    unionfuse("save", "-q", "--format", "oci-dir", "-o", str(layout), "registry.test/app:2")
    run("skopeo", "copy", "-q", f"oci:{layout}", f"oci:{tmp_path}/tagged:latest")
    run("umoci", "unpack", "--image", f"{tmp_path}/tagged:latest", str(bundle))
    target.mkdir()
    unionfuse("mount", "--driver", "overlay", "registry.test/app:2", str(target))
    try:
        assert tree(bundle / "rootfs") == tree(target)
    finally:
        unionfuse("umount", str(target))
    (bundle / "rootfs/new").unlink()
    (bundle / "rootfs/other").write_text("other")
    run("umoci", "repack", "--image", f"{tmp_path}/tagged:three", str(bundle))
    run(
        "skopeo",
        "copy",
        "-q",
        f"oci:{tmp_path}/tagged:three",
        f"oci-archive:{tmp_path}/3.tar:a/b:3",
    )
    unionfuse("load", "-q", "-i", f"{tmp_path}/3.tar")
    assert unionfuse("diff", "a/b:3").splitlines() == ["D /new", "A /other"]


def test_the_oldest_form_of_docker(unionfuse: Command, tmp_path: Path) -> None:
    """VERSION, json and layer.tar for each layer, as docker 1.9 wrote them."""
    layers = [archive(member("a", data=b"1")), archive(member("b", data=b"2"))]
    one, two = "1" * 64, "2" * 64
    first = {"id": one, "created": "2015-01-01T00:00:00Z", "os": "linux", "architecture": "amd64"}
    first["container_config"] = {"Cmd": ["/bin/sh", "-c", "#(nop) ADD file"]}
    second = first | {"id": two, "parent": one, "config": {"Env": ["A=b"], "Cmd": ["sh"]}}
    members = []
    for identity, table, data in ((two, second, layers[1]), (one, first, layers[0])):
        members += [
            member(identity, tarfile.DIRTYPE),
            member(f"{identity}/VERSION", data=b"1.0"),
            member(f"{identity}/json", data=json.dumps(table).encode()),
            member(f"{identity}/layer.tar", data=data),
        ]
    members.append(member("repositories", data=json.dumps({"old": {"1": two}}).encode()))
    path = tmp_path / "old.tar"
    path.write_bytes(archive(*members))
    for words, stdin in ((["-i", str(path)], None), ([], path)):
        with open(stdin or os.devnull, "rb") as source:
            done = subprocess.run(
                unionfuse.line("load", *words), stdin=source, capture_output=True, text=True
            )
        assert done.stdout == "Loaded image: old:1\n", done.stderr
    (shown,) = json.loads(unionfuse("inspect", "old:1"))
    assert shown["RootFS"]["Layers"] == [Digest.of(data) for data in layers]
    assert shown["Config"]["Env"] == ["A=b"]
    assert "ADD file" in unionfuse("history", "old:1")


BROKEN = {
    "nothing": lambda table: table.clear(),
    "no config": lambda table: table.pop("config.json"),
    "no layer": lambda table: table.pop("layer.tar"),
    "not JSON": lambda table: table.update({"manifest.json": b"{nonsense"}),
    "another kind": lambda table: table.update({"manifest.json": b'{"a": 1}'}),
    "wrong types": lambda table: table.update({"manifest.json": b'[{"Config": 1, "Layers": 2}]'}),
    "too few layers": lambda table: table.update(
        {"manifest.json": b'[{"Config": "config.json", "Layers": []}]'}
    ),
    "another layer": lambda table: table.update({"layer.tar": archive(member("other"))}),
    "hostile layer": lambda table: table.update({"layer.tar": archive(member("../../evil"))}),
    "config not JSON": lambda table: table.update({"config.json": b"\xff"}),
    "deep JSON": lambda table: table.update({"config.json": b"[" * 100_000}),
    "bad tag": lambda table: table.update(
        {
            "manifest.json": b'[{"Config": "config.json", "Layers": ["layer.tar"],'
            b' "RepoTags": ["A b"]}]'
        }
    ),
}


@pytest.mark.parametrize("piped", [False, True])
@pytest.mark.parametrize("how", BROKEN)
def test_broken_archives_are_refused_in_one_line(
    unionfuse: Command, tmp_path: Path, how: str, piped: bool
) -> None:
    layer = archive(member("f", data=b"x"))
    rootfs = {"type": "layers", "diff_ids": [Digest.of(layer)]}
    config = {"architecture": "amd64", "os": "linux", "rootfs": rootfs}
    table = {
        "layer.tar": layer,
        "config.json": json.dumps(config).encode(),
        "manifest.json": b'[{"Config": "config.json", "Layers": ["layer.tar"]}]',
    }
    BROKEN[how](table)
    path = tmp_path / "broken.tar"
    path.write_bytes(archive(*[member(name, data=data) for name, data in table.items()]))
    with open(path, "rb") as source:
        words = ["-q"] if piped else ["-q", "-i", str(path)]
        done = subprocess.run(
            unionfuse.line("load", *words), stdin=source, capture_output=True, text=True
        )
    assert done.returncode == 1
    assert done.stderr.startswith("unionfuse load: ") and done.stderr.count("\n") == 1
    assert "internal error" not in done.stderr
    assert unionfuse("images", "-aq") == ""
    for place in ("staging", "partial"):
        assert os.listdir(unionfuse.root / place) == []
