"""Volumes, bind mounts and tmpfs: what is mounted, what stays, what is removed."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from harness.containers import COMMAND, Box


def test_a_new_volume_is_filled_from_the_image(box: Box) -> None:
    out = box.sh(
        "cat /srv/seed; stat -c %a /srv/seed /srv/sub/deep; echo more > /srv/new", "-v", "site:/srv"
    )
    assert out.split() == ["seed", "640", "600"]
    data = Path(json.loads(box.out("volume", "inspect", "site"))[0]["Mountpoint"])
    assert sorted(path.name for path in data.iterdir()) == ["new", "seed", "sub"]
    box.sh("rm /srv/seed", "-v", "site:/srv")
    assert box.sh("ls /srv", "-v", "site:/srv").split() == ["new", "sub"]
    assert box.sh("ls /srv", "-v", "bare:/srv:nocopy") == ""


def test_a_volume_is_shared_and_outlives_its_containers(box: Box) -> None:
    box.start("writer", "-v", "shared:/data", command="echo one > /data/file; sleep 1000")
    assert box.sh("cat /data/file; echo two > /data/file", "-v", "shared:/data") == "one\n"
    assert box.out("exec", "writer", "cat", "/data/file") == "two\n"
    assert "in use" in box("volume", "rm", "shared", code=1).stderr
    box("stop", "-t", "0", "writer")
    assert "in use" in box("volume", "rm", "shared", code=1).stderr
    box("rm", "-v", "writer")
    assert box.sh("cat /data/file", "-v", "shared:/data") == "two\n"
    assert box.out("volume", "rm", "shared") == "shared\n"
    assert "no such volume" in box("volume", "rm", "shared", code=1).stderr


def test_anonymous_volumes(box: Box) -> None:
    box.image("declares", volumes=("/srv",))

    def volumes() -> list[str]:
        return box.out("volume", "ls", "-q").split()

    box("run", "--rm", "--network", "none", "declares", "true")
    assert volumes() == []
    box("run", "--name", "kept", "--network", "none", "declares", "touch", "/srv/x")
    assert len(volumes()) == 1 and len(volumes()[0]) == 64
    assert box.out("start", "-a", "kept") == ""
    box("rm", "kept")
    assert len(volumes()) == 1
    box("volume", "prune", "-f")
    assert volumes() == []
    box("run", "--name", "gone", "--network", "none", "-v", "/other", "declares", "true")
    assert len(volumes()) == 2
    box("rm", "-v", "gone")
    assert volumes() == []


def test_bind_mounts(box: Box, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("host\n")
    script = "cat /mnt/file; echo in > /mnt/made; touch /mnt/x || echo refused"
    assert box.sh(script, "-v", f"{tmp_path}:/mnt") == "host\n"
    assert (tmp_path / "made").read_text() == "in\n"
    assert "refused" in box.sh(f"({script}) 2>&1", "-v", f"{tmp_path}:/mnt:ro")
    assert "refused" in box.sh(
        f"({script}) 2>&1", "--mount", f"type=bind,src={tmp_path},dst=/mnt,readonly"
    )
    assert box.sh("cat /etc/motd", "-v", f"{tmp_path}/file:/etc/motd") == "host\n"
    done = box("run", "-v", f"{tmp_path}/none:/mnt", "busybox", code=125)
    assert done.stderr.count("\n") == 1 and "does not exist" in done.stderr
    assert not (tmp_path / "none").exists()


def test_mistakes(box: Box, tmp_path: Path) -> None:
    for words, said in (
        (("-v", "a:b"), "must be absolute"),
        (("-v", "/a:/b:sideways"), "sideways"),
        (("-v", "a/b:/x"), "invalid volume name"),
        (("-v", "vol:/"), "cannot be '/'"),
        (("-v", "one:/x", "-v", "two:/x"), "duplicate mount point"),
        (("--mount", "type=odd,dst=/x"), "type is one of"),
        (("--mount", "type=bind,dst=/x"), "needs src"),
        (("--mount", "type=volume,dst=/x,colour=red"), "colour"),
        (("--tmpfs", "/x:size=much"), "not a size"),
    ):
        assert said in box("run", *words, "busybox", "true", code=125).stderr
    assert box.out("volume", "ls", "-q") == ""
    assert box.names("-a") == []


@pytest.mark.parametrize("kind", ["volume", "network"])
def test_inspect_shows_what_there_is_and_complains_of_the_rest(box: Box, kind: str) -> None:
    box(kind, "create", "here")
    done = box(kind, "inspect", "lost", "here", code=1)
    assert [one["Name"] for one in json.loads(done.stdout)] == ["here"]
    assert done.stderr.count("\n") == 1 and "lost" in done.stderr
    assert box(kind, "inspect", "lost", code=1).stdout == "[]\n"


def test_tmpfs_mount(box: Box) -> None:
    out = box.sh(
        "grep ' /t ' /proc/mounts; df -k /t | tail -1",
        "--mount",
        "type=tmpfs,dst=/t,tmpfs-size=2m,tmpfs-mode=700",
    )
    assert "tmpfs /t tmpfs rw,nosuid,nodev,noexec" in out
    assert "size=2048k" in out and "mode=700" in out


def test_volumes_from(box: Box, tmp_path: Path) -> None:
    box("create", "--name", "source", "-v", "data:/data", "-v", f"{tmp_path}:/host", "busybox")
    box.sh("echo x > /data/x; echo y > /host/y", "--volumes-from", "source")
    assert (tmp_path / "y").exists()
    out = box.sh("cat /data/x; touch /data/z 2>&1", "--volumes-from", "source:ro", code=1)
    assert out.startswith("x\n") and "Read-only" in out


def test_volume_verbs(box: Box) -> None:
    assert box.out("volume", "create", "--label", "a=b", "vol-a") == "vol-a\n"
    name = box.out("volume", "create").strip()
    assert len(name) == 64
    assert box.out("volume", "ls", "-q", "--filter", "label=a=b") == "vol-a\n"
    assert box.out("volume", "ls", "-q", "--filter", "name=vol") == "vol-a\n"
    box("create", "--name", "user", "-v", "vol-a:/x", "busybox")
    assert box.out("volume", "ls", "-q", "--filter", "dangling=true").split() == [name]
    shown = json.loads(box.out("volume", "inspect", "vol-a"))[0]
    assert (shown["Name"], shown["Driver"], shown["Labels"]) == ("vol-a", "local", {"a": "b"})
    assert "Total reclaimed space" in box.out("volume", "prune", "-f")
    assert box.out("volume", "ls", "-q") == "vol-a\n"


def test_copy(box: Box, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub/file").write_text("data\n")
    (tree / "link").symlink_to("sub/file")
    box.start("cc", "-v", "vol:/vol")
    box("cp", str(tree), "cc:/root")
    box("cp", f"{tree}/.", "cc:/vol")
    assert box.out("exec", "cc", "cat", "/root/tree/link", "/vol/sub/file") == "data\ndata\n"
    assert box.out("exec", "cc", "stat", "-c", "%u", "/root/tree/sub/file") == "0\n"
    box("cp", "cc:/root/tree", str(tmp_path / "back"))
    assert (tmp_path / "back/link").readlink() == Path("sub/file")
    box("cp", "cc:/etc/passwd", str(tmp_path))
    assert "tester" in (tmp_path / "passwd").read_text()
    stream = box.out("cp", "cc:/root/tree", "-")
    box("cp", "-", "cc:/vol", input=stream)
    assert box.out("exec", "cc", "cat", "/vol/tree/sub/file") == "data\n"
    box("stop", "-t", "0", "cc")
    box("cp", str(tree / "sub/file"), "cc:/stopped")
    assert (box.directory("cc") / "upper/stopped").read_text() == "data\n"
    box("cp", "cc:/stopped", str(tmp_path / "again"))
    assert (tmp_path / "again").read_text() == "data\n"
    assert "could not find" in box("cp", "cc:/nothing", str(tmp_path), code=1).stderr
    assert "no such file" in box("cp", str(tmp_path / "nothing"), "cc:/", code=1).stderr


def test_copy_keeps_extended_attributes_and_owners(box: Box, tmp_path: Path) -> None:
    capability = bytes.fromhex("0100000200040000000000000000000000000000")  # net_bind_service
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_text("x")
    os.chown(tree / "file", 1234, 1235)
    os.chmod(tree / "file", 0o4750)
    binary = bytes(range(256))
    os.setxattr(tree / "file", "user.binary", binary)
    os.setxattr(tree, "user.directory", "für".encode())
    os.setxattr(tree / "file", "security.capability", capability)
    box.start("cc")
    box("cp", "-a", str(tree), "cc:/root/tree")
    box("cp", "-a", "cc:/root/tree", str(tmp_path / "back"))
    (tmp_path / "tar").write_bytes(_stream(box, "cc:/root/tree"))
    (tmp_path / "unpacked").mkdir()
    box("cp", str(tree), "cc:/root/plain")
    box("cp", "cc:/root/plain", str(tmp_path / "plain"))
    words = ["tar", "--xattrs", "--xattrs-include=*", "-xpf", str(tmp_path / "tar")]
    subprocess.run([*words, "-C", str(tmp_path / "unpacked")], check=True)
    for there, owner in ((tmp_path / "back", 1234), (tmp_path / "unpacked/tree", 1234),
                         (tmp_path / "plain", os.geteuid())):  # fmt: skip
        assert os.getxattr(there / "file", "user.binary") == binary
        assert os.getxattr(there, "user.directory") == "für".encode()
        assert os.getxattr(there / "file", "security.capability") == capability
        assert (there / "file").stat().st_uid == owner
        assert (there / "file").stat().st_mode & 0o7777 == 0o4750


def _stream(box: Box, source: str) -> bytes:
    return subprocess.run(
        [COMMAND, "cp", source, "-"], env=box.environment, capture_output=True, check=True
    ).stdout


def test_copy_never_leaves_the_container(box: Box, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("mine")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (tmp_path / "evil").write_text("evil")
    script = (
        f"ln -s {target} /root/name; ln -s {tmp_path} /root/dir; ln -s {secret} /root/s; sleep 999"
    )
    box.start("hostile", command=script)
    box("cp", str(tmp_path / "evil"), "hostile:/root/name", code=None)
    box("cp", str(tmp_path / "evil"), "hostile:/root/dir/precious", code=None)
    box("cp", "-L", "hostile:/root/s", str(tmp_path / "got"), code=None)
    assert target.read_text() == "mine"
    assert not (tmp_path / "got").exists()


def test_volumes_by_name_and_what_they_do_not_have(box: Box) -> None:
    assert box.out("volume", "create", "--name", "called") == "called\n"
    assert box.out("volume", "rm", "-f", "called", "not-there") == "called\nnot-there\n"
    said = box("volume", "create", "-o", "type=nfs", "far", code=125).stderr
    assert "-o is not supported" in said and said.count("\n") == 1
