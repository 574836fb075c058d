"""POSIX ACLs, enforced and inherited, and extended attributes."""

import errno
import os
import stat
import subprocess

import pytest
from harness.layers import Dir, File, Symlink
from harness.mounts import Workshop
from harness.snapshot import assert_equal
from harness.users import as_user

ALICE, BOB, CAROL, STAFF = 4001, 4002, 4003, 4500


def setfacl(*arguments: str | os.PathLike[str]) -> None:
    subprocess.run(["setfacl", *arguments], check=True)


def getfacl(path: os.PathLike[str]) -> list[str]:
    output = subprocess.run(
        ["getfacl", "-n", "-p", "--omit-header", path],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return [line for line in output.splitlines() if line]


def readable(path: os.PathLike[str], uid: int, groups: tuple[int, ...] = ()) -> bool:
    def read() -> bool:
        try:
            os.close(os.open(path, os.O_RDONLY))
        except PermissionError:
            return False
        return True

    return as_user(uid, read, groups=groups)


@pytest.mark.doors
def test_acls_are_enforced(workshop: Workshop) -> None:
    tree = workshop({"f": File(data="x", mode=0o640, gid=STAFF), "g": File(data="x", mode=0o644)})
    assert not readable(tree / "f", ALICE)
    setfacl("-m", f"u:{ALICE}:r,g:{CAROL}:---", tree / "f")
    assert readable(tree / "f", ALICE)
    assert readable(tree / "f", BOB, (STAFF,))
    assert not readable(tree / "f", BOB)
    # a group that is denied: the mask must not be taken for its bits
    setfacl("-m", f"g:{CAROL}:---", tree / "g")
    assert not readable(tree / "g", BOB, (CAROL,))
    assert readable(tree / "g", BOB)
    tree.remount()
    assert not readable(tree / "g", BOB, (CAROL,))
    assert readable(tree / "f", ALICE)


def test_acls_of_lower_files_are_enforced_and_survive_copy_up(workshop: Workshop) -> None:
    tree = workshop({"d/f": File(data="x", mode=0o600)})
    tree.unmount()
    where = tree.root if tree.kind == "plain" else tree.stack.lowers[0]
    setfacl("-m", f"u:{ALICE}:rw,g:{STAFF}:r", where / "d/f")
    for layer in tree.stack.lowers:
        workshop.forget_layer(layer)
    tree.mount()
    acl = getfacl(tree / "d/f")
    assert f"user:{ALICE}:rw-" in acl
    assert readable(tree / "d/f", ALICE) and not readable(tree / "d/f", BOB)
    assert readable(tree / "d/f", BOB, (STAFF,))
    as_user(ALICE, os.truncate, str(tree / "d/f"), 0)
    assert getfacl(tree / "d/f") == acl
    tree.remount()
    assert getfacl(tree / "d/f") == acl
    assert readable(tree / "d/f", ALICE) and not readable(tree / "d/f", BOB)


def test_chmod_and_acl_change_each_other(workshop: Workshop) -> None:
    tree = workshop({"f": File(data="x", mode=0o664)})
    setfacl("-m", f"u:{ALICE}:rw", tree / "f")
    os.chmod(tree / "f", 0o640)
    assert "mask::r--" in getfacl(tree / "f")
    assert stat.S_IMODE(os.stat(tree / "f").st_mode) == 0o640
    setfacl("-m", "m::rwx", tree / "f")
    assert stat.S_IMODE(os.stat(tree / "f").st_mode) == 0o670
    setfacl("-b", tree / "f")
    assert os.listxattr(tree / "f") == []
    tree.remount()
    assert stat.S_IMODE(os.stat(tree / "f").st_mode) == 0o660


@pytest.mark.doors
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_default_acls_are_inherited_by_every_kind_of_create(workshop: Workshop, umask: int) -> None:
    stack = {"d": Dir(mode=0o755), "d/x": ""}
    trees = [workshop(stack)]
    if workshop.kind != "plain":
        trees.append(workshop(stack, kind="plain"))
    os.umask(umask)
    for tree in trees:
        setfacl("-d", "-m", f"u::rwx,g::r-x,o::---,u:{ALICE}:rwx,m::rwx", tree / "d")
        (tree / "d/file").write_text("x")
        os.close(os.open(tree / "d/narrow", os.O_CREAT | os.O_WRONLY, 0o600))
        os.mkdir(tree / "d/dir")
        os.mkdir(tree / "d/dir/inner")
        os.mknod(tree / "d/node", stat.S_IFREG | 0o666)
        os.mkfifo(tree / "d/fifo")
        os.symlink("x", tree / "d/link")
        os.link(tree / "d/x", tree / "d/linked")
        if tree.kind != "plain":
            os.unlink(tree / "d/x")
            (tree / "d/x").write_text("over a whiteout")
        else:
            os.unlink(tree / "d/x")
            (tree / "d/x").write_text("over a whiteout")
    os.umask(0o022)
    wanted = trees[-1].snapshot()
    assert_equal(trees[0].snapshot(), wanted)
    assert f"user:{ALICE}:rwx" in getfacl(trees[0] / "d/dir/inner")
    trees[0].remount()
    assert_equal(trees[0].snapshot(), wanted)


def test_xattrs_come_and_go(workshop: Workshop) -> None:
    tree = workshop({"f": File(data="x", xattrs={"user.below": b"1"}), "d": Dir()})
    for path in (tree / "f", tree / "d"):
        os.setxattr(path, "user.a", b"value")
        os.setxattr(path, "user.empty", b"")
        os.setxattr(path, "trusted.t", bytes(range(256)))
        assert os.getxattr(path, "user.a") == b"value"
        assert os.getxattr(path, "user.empty") == b""
        assert os.getxattr(path, "trusted.t") == bytes(range(256))
        with pytest.raises(FileExistsError):
            os.setxattr(path, "user.a", b"", os.XATTR_CREATE)
        with pytest.raises(OSError) as caught:
            os.setxattr(path, "user.none", b"", os.XATTR_REPLACE)
        assert caught.value.errno == errno.ENODATA
        os.setxattr(path, "user.a", b"replaced", os.XATTR_REPLACE)
        os.removexattr(path, "user.empty")
        for missing in ("user.empty", "user.never"):
            with pytest.raises(OSError) as caught:
                os.getxattr(path, missing)
            assert caught.value.errno == errno.ENODATA
            with pytest.raises(OSError) as caught:
                os.removexattr(path, missing)
            assert caught.value.errno == errno.ENODATA
    assert sorted(os.listxattr(tree / "f")) == ["trusted.t", "user.a", "user.below"]
    os.removexattr(tree / "f", "user.below")
    tree.remount()
    assert sorted(os.listxattr(tree / "f")) == ["trusted.t", "user.a"]
    assert os.getxattr(tree / "f", "user.a") == b"replaced"


@pytest.mark.doors
def test_names_of_trusted_xattrs_are_for_the_privileged_alone(workshop: Workshop) -> None:
    xattrs = {"trusted.t": b"1", "user.u": b"2"}
    tree = workshop({"f": File(data="x", xattrs=xattrs), "d": Dir(xattrs=xattrs), "plain": "x"})
    tree.root.chmod(0o755)
    for name, own in (("f", ["user.u"]), ("d", ["user.u"]), ("plain", [])):
        trusted = ["trusted.t"] if own else []
        path = tree / name
        assert sorted(os.listxattr(path)) == trusted + own
        assert _names_as(path, "setpriv", f"--reuid={ALICE}", "--clear-groups") == own
        # the capability counts, not who has it, and not one that holds in a namespace alone
        powerless = "setpriv", "--inh-caps=-sys_admin", "--bounding-set=-sys_admin"
        assert _names_as(path, *powerless) == own
        powerful = "--inh-caps=+sys_admin", "--ambient-caps=+sys_admin"
        assert _names_as(path, "setpriv", f"--reuid={ALICE}", *powerful) == trusted + own
        assert _names_as(path, "unshare", "--user", "--map-root-user") == own
    for name in ("f", "d"):
        with pytest.raises(OSError) as caught:
            as_user(ALICE, os.getxattr, str(tree / name), "trusted.t")
        assert caught.value.errno == errno.ENODATA


def _names_as(path: os.PathLike[str], *before: str) -> list[str]:
    """The names of extended attributes that a program sees, run as `before` says."""
    code = "import os, sys; print(*sorted(os.listxattr(sys.argv[1])))"
    command = [*before, "/usr/bin/python3", "-c", code, path]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()


def test_sizes_of_xattrs(workshop: Workshop) -> None:
    tree = workshop({"f": "x"})
    os.setxattr(tree / "f", "user." + "n" * 250, b"v" * 1000)
    assert os.getxattr(tree / "f", "user." + "n" * 250) == b"v" * 1000
    with pytest.raises(OSError) as caught:
        os.setxattr(tree / "f", "user." + "n" * 251, b"")
    assert caught.value.errno in (errno.ERANGE, errno.ENAMETOOLONG)
    with pytest.raises(OSError) as caught:
        os.setxattr(tree / "f", "user.big", bytes(65537))
    assert caught.value.errno == errno.E2BIG
    with pytest.raises(OSError) as caught:
        os.setxattr(tree / "f", "nonsense", b"")
    assert caught.value.errno == errno.EOPNOTSUPP


def test_xattrs_of_symlinks_stay_with_the_symlink(workshop: Workshop) -> None:
    tree = workshop({"target": "x", "s": Symlink("target"), "out": Symlink("/etc/hostname")})
    for name in ("s", "out"):
        os.setxattr(tree / name, "trusted.mark", b"on the link", follow_symlinks=False)
        assert os.getxattr(tree / name, "trusted.mark", follow_symlinks=False) == b"on the link"
        assert os.listxattr(tree / name, follow_symlinks=False) == ["trusted.mark"]
    assert os.listxattr(tree / "target") == []
    assert "trusted.mark" not in os.listxattr("/etc/hostname")
    with pytest.raises(PermissionError):
        os.setxattr(tree / "s", "user.x", b"", follow_symlinks=False)
    os.removexattr(tree / "s", "trusted.mark", follow_symlinks=False)
    tree.remount()
    assert os.listxattr(tree / "s", follow_symlinks=False) == []
    assert os.listxattr(tree / "out", follow_symlinks=False) == ["trusted.mark"]


@pytest.mark.on("unionfuse")
def test_a_symlink_that_leads_into_the_mount_itself(workshop: Workshop) -> None:
    # a daemon that follows it would wait for itself
    tree = workshop({"f": "x"})
    os.symlink(tree / "f", tree / "s")
    os.symlink(tree.root, tree / "loop")
    for name in ("s", "loop"):
        os.setxattr(tree / name, "trusted.x", b"y", follow_symlinks=False)
        os.lchown(tree / name, 5, 6)
        os.utime(tree / name, ns=(1, 2), follow_symlinks=False)
        os.link(tree / name, tree / f"{name}2", follow_symlinks=False)
        os.listxattr(tree / name, follow_symlinks=False)
    assert os.listxattr(tree / "f") == []


@pytest.mark.on("unionfuse")
def test_the_layer_of_a_file_is_told_when_asked(workshop: Workshop) -> None:
    tree = workshop(
        {"a": "top", "d/x": ""}, {"a": "base", "b": "base", "d/y": "", "s": Symlink("a")}
    )
    top, base = (os.fsencode(layer) for layer in tree.stack.lowers)
    name = "user.unionfuse.layer"
    assert os.getxattr(tree / "a", name) == top
    assert os.getxattr(tree / "b", name) == base
    assert os.getxattr(tree / "d", name) == top
    assert os.getxattr(tree / "d/y", name) == base
    assert os.listxattr(tree / "a") == []
    os.chmod(tree / "b", 0o600)
    (tree / "new").write_text("")
    assert os.getxattr(tree / "b", name) == b"upper"
    assert os.getxattr(tree / "new", name) == b"upper"
    assert os.listxattr(tree / "b") == []
    with pytest.raises(OSError):
        os.setxattr(tree / "a", name, b"lie")
