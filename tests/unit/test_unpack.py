"""Layers unpacked: right for what is honest, and harmless for what is not."""

import os
import stat
import tarfile
from pathlib import Path

import pytest
from harness.tars import archive, member, tree, unpack_to
from harness.users import NOBODY, as_user
from unionimage.chain import Chain
from unionimage.changeset import tar
from unionimage.changeset.limits import Limits
from unionimage.changeset.pack import pack_upper
from unionimage.errors import BadContent

DIRECTORY, LINK, SYMLINK = tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE


def test_marks_are_what_overlay_mounts_want(tmp_path: Path) -> None:
    out = tmp_path / "out"
    unpack_to(out, archive(member(".wh.gone"), member("d", DIRECTORY), member("d/.wh..wh..opq")))
    assert stat.S_ISCHR((out / "gone").stat().st_mode)
    assert (out / "gone").stat().st_rdev == 0
    assert os.getxattr(out / "d", "trusted.overlay.opaque") == b"y"
    assert os.listdir(out / "d") == []


@pytest.mark.parametrize("order", [1, -1])
def test_a_whiteout_never_deletes_what_its_own_layer_has(tmp_path: Path, order: int) -> None:
    members = [member("f", data=b"new"), member(".wh.f")]
    unpack_to(tmp_path / "file", archive(*members[::order]))
    assert (tmp_path / "file/f").read_bytes() == b"new"
    members = [member("d", DIRECTORY), member(".wh.d")]
    unpack_to(tmp_path / "dir", archive(*members[::order], member("d/f", data=b"new")))
    assert (tmp_path / "dir/d/f").read_bytes() == b"new"
    assert os.getxattr(tmp_path / "dir/d", "trusted.overlay.opaque") == b"y"


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh...", "d/.wh..", ".wh../x/../../y"])
def test_odd_whiteouts_are_refused_and_touch_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadContent):
        unpack_to(tmp_path / "out", archive(member(name)))
    assert os.listdir(tmp_path) == ["out"]


def test_marks_of_aufs_mean_nothing(tmp_path: Path) -> None:
    unpack_to(tmp_path / "out", archive(member(".wh..wh.aufs"), member(".wh..wh.plnk", DIRECTORY)))
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("name", ["../x", "a/../../x", "..", "a/..", "/../x", "./../x", "a/../b"])
def test_dots_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadContent, match="outside"):
        unpack_to(tmp_path / "out", archive(member(name, data=b"x")))
    assert os.listdir(tmp_path) == ["out"]


def test_absolute_names_stay_inside(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    unpack_to(tmp_path / "out", archive(member(str(outside), data=b"x")))
    assert not outside.exists()
    assert Path(f"{tmp_path}/out{outside}").read_bytes() == b"x"


@pytest.mark.parametrize("target", ["/", "{}", "..", "../..", "/proc/self/root", "/proc/self/cwd"])
def test_links_lead_nowhere_else(tmp_path: Path, target: str) -> None:
    """Everything that could go through a link to the outside, at once and one by one."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "secret").write_text("secret")
    before = tree(victim)
    target = target.format(victim)
    hostile = [
        member("l/secret", data=b"evil"),
        member("l/victim/secret", data=b"evil"),
        member("l/new", DIRECTORY, mode=0o777),
        member("l/.wh.secret"),
        member("l/.wh..wh..opq"),
        member("hard", LINK, linkname="l/secret"),
        member("l/secret", LINK, linkname="l"),
        member("l", DIRECTORY, mode=0o777),
    ]
    for number, one in enumerate(hostile):
        try:
            unpack_to(
                tmp_path / f"out{number}", archive(member("l", SYMLINK, linkname=target), one)
            )
        except BadContent as error:
            assert "\n" not in error.message
    assert tree(victim) == before
    assert not (tmp_path / "new").exists()
    inodes = {path.stat().st_ino for path in tmp_path.glob("out*/**/*") if path.is_file()}
    assert (victim / "secret").stat().st_ino not in inodes


@pytest.mark.parametrize("target", ["", "x" * 5000])
def test_a_symlink_target_that_no_kernel_takes_is_refused(tmp_path: Path, target: str) -> None:
    with pytest.raises(BadContent, match="'d/s' is a symbolic link to"):
        unpack_to(tmp_path / "out", archive(member("d/s", SYMLINK, linkname=target)))


def test_hard_links_need_their_target_in_the_layer(tmp_path: Path) -> None:
    for target in ("/etc/passwd", "missing", "../../etc/passwd", "hard", "d", "gone"):
        with pytest.raises(BadContent):
            unpack_to(
                tmp_path / f"out-{target.replace('/', '_')}",
                archive(
                    member("d", DIRECTORY),
                    member(".wh.gone"),
                    member("hard", LINK, linkname=target),
                ),
            )


def test_a_name_may_come_twice_and_the_last_wins(tmp_path: Path) -> None:
    out = tmp_path / "out"
    unpack_to(
        out,
        archive(
            member("f", data=b"first"),
            member("f", data=b"second"),
            member("d", DIRECTORY),
            member("d/inside", data=b"x"),
            member("d", data=b"now a file"),
            member("h", SYMLINK, linkname="f"),
            member("h", DIRECTORY),
            member("h/below", data=b"y"),
        ),
    )
    assert (out / "f").read_bytes() == b"second"
    assert (out / "d").read_bytes() == b"now a file"
    assert (out / "h/below").read_bytes() == b"y"


def test_a_file_as_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadContent):
        unpack_to(tmp_path / "out", archive(member("f", data=b"x"), member("f/below", data=b"x")))


def test_limits_stop_bombs(tmp_path: Path) -> None:
    many = archive(*[member(f"f{number}") for number in range(30)])
    with pytest.raises(BadContent, match="more than 20 entries"):
        unpack_to(tmp_path / "many", many, limits=Limits(entries=20))
    with pytest.raises(BadContent, match="more than 1000000 bytes"):
        big = archive(member("f", data=bytes(2_000_000)))
        unpack_to(tmp_path / "big", big, limits=Limits(size=1_000_000))


def test_names_of_255_bytes_and_not_utf8(tmp_path: Path) -> None:
    name = b"\xff\xfe" + b"n" * 253
    data = tar.header(tar.Entry(name, tar.FILE)) + tar.header(
        tar.Entry(b".wh." + b"w" * 255, tar.FILE)
    )
    unpack_to(tmp_path / "out", data + tar.END)
    assert set(os.listdir(os.fsencode(tmp_path / "out"))) == {name, b"w" * 255}
    with pytest.raises(BadContent, match="too long"):
        unpack_to(tmp_path / "bad", tar.header(tar.Entry(b"n" * 256, tar.FILE)) + tar.END)


def test_parents_that_are_missing_are_made(tmp_path: Path) -> None:
    deep = "/".join("d" * 700)
    unpack_to(tmp_path / "out", archive(member(f"{deep}/f", data=b"x")))
    assert (tmp_path / "out/d").stat().st_mode & 0o777 == 0o755


def test_foreign_overlay_marks_do_not_become_marks(tmp_path: Path) -> None:
    """Else a layer could redirect a directory to anywhere in the layers below."""
    xattrs = {"SCHILY.xattr.trusted.overlay.redirect": "/etc"}
    unpack_to(tmp_path / "out", archive(member("d", DIRECTORY, pax_headers=xattrs)))
    assert os.listxattr(tmp_path / "out/d") == ["trusted.overlay.overlay.redirect"]
    with Chain([tmp_path / "out"]) as chain:
        (entry,) = tar.Reader(_Stream(b"".join(pack_upper(chain))))
    assert entry.xattrs == {b"trusted.overlay.redirect": b"/etc"}


def test_directories_get_their_times_although_they_are_filled_later(tmp_path: Path) -> None:
    data = archive(member("d", DIRECTORY, mtime=1000, mode=0o500), member("d/f", data=b"x"))
    unpack_to(tmp_path / "out", data)
    assert (tmp_path / "out/d").stat().st_mtime == 1000
    assert (tmp_path / "out/d").stat().st_mode & 0o7777 == 0o500


def test_set_id_bits_and_capabilities_survive_the_owner(tmp_path: Path) -> None:
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    entry = tar.Entry(b"f", tar.FILE, 0o6755, 12, 34, xattrs={b"security.capability": capability})
    unpack_to(tmp_path / "out", tar.header(entry) + tar.END)
    status = (tmp_path / "out/f").stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o6755, 12, 34)
    assert os.getxattr(tmp_path / "out/f", "security.capability") == capability


def test_without_privilege_owners_are_kept_as_xattrs(scratch: Path) -> None:
    """And the same tar comes out again."""
    directory = scratch / "rootless"
    directory.mkdir()
    os.chown(directory, NOBODY, NOBODY)
    parts = [
        tar.Entry(b"d/", tar.DIRECTORY, 0o500, 7, 8, mtime_ns=5),
        tar.Entry(b"d/f", tar.FILE, 0o4000, 9, 10, mtime_ns=6, xattrs={b"user.x": b"y"}),
        tar.Entry(b"d/null", tar.CHAR, 0o666, 0, 0, major=1, minor=3, mtime_ns=7),
    ]
    data = b"".join(tar.header(part) for part in parts) + tar.END

    def run() -> bytes:
        unpack_to(directory / "out", data)
        with Chain([directory / "out"]) as chain:
            return b"".join(pack_upper(chain))

    assert as_user(NOBODY, run) == data
    override = os.getxattr(directory / "out/d/f", "user.containers.override_stat")
    assert override == b"9:10:4000"


class _Stream:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, size: int = -1, /) -> bytes:
        """Seven bytes at a time: a stream may give less than it is asked for."""
        data, self._data = self._data[:7], self._data[7:]
        return data
