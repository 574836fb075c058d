"""The tar reader and headers, against the standard library's and GNU tar's."""

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from harness.tars import archive, entries, member, tree, unpack_to
from hypothesis import given, settings
from hypothesis import strategies as st
from unionimage.changeset import recipe as recipes
from unionimage.changeset import tar
from unionimage.errors import BadContent, UserError

NAMES = st.binary(min_size=1, max_size=300).map(
    lambda name: name.replace(b"\0", b"x").replace(b"/", b"y").strip(b".") or b"n"
)
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(b"/".join)


@given(
    name=PATHS,
    link=PATHS,
    mode=st.integers(0, 0o7777),
    owner=st.tuples(st.integers(0, 2**32 - 2), st.integers(0, 2**32 - 2)),
    mtime=st.integers(-(2**40), 2**62),
    xattrs=st.dictionaries(
        st.sampled_from([b"user.a", b"user.b.c", b"security.capability"]), st.binary(max_size=200)
    ),
    kind=st.sampled_from([tar.FILE, tar.SYMLINK, tar.LINK, tar.DIRECTORY, tar.FIFO, tar.CHAR]),
)
def test_what_a_header_says_is_read_back(
    name: bytes,
    link: bytes,
    mode: int,
    owner: tuple[int, int],
    mtime: int,
    xattrs: dict[bytes, bytes],
    kind: int,
) -> None:
    entry = tar.Entry(name, kind, mode, *owner, mtime_ns=mtime, xattrs=xattrs)
    if kind in (tar.SYMLINK, tar.LINK):
        entry.link = link
    (read,) = entries(tar.header(entry) + tar.END)
    assert read == entry


@given(name=PATHS, size=st.integers(0, 3000), mtime=st.integers(0, 2**40))
@settings(max_examples=50)
def test_the_standard_library_reads_our_headers(name: bytes, size: int, mtime: int) -> None:
    data = tar.header(tar.Entry(name, tar.FILE, 0o640, 1, 2, size, mtime)) + bytes(size)
    data += tar.padding(size) + tar.END
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8") as read:
        (info,) = read.getmembers()
    assert os.fsencode(info.name) == name
    assert (info.size, info.mode, info.uid, info.gid) == (size, 0o640, 1, 2)
    assert abs(info.mtime - mtime / 1e9) < 1e-3


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_is_read(form: int) -> None:
    long = "d" * 90 + "/" + "f" * 90
    data = archive(
        member(long, data=b"x" * 700), member("s", tarfile.SYMTYPE, linkname="t"), form=form
    )
    first, second = entries(data)
    assert (first.name, first.size) == (long.encode(), 700)
    assert (second.kind, second.link) == (tar.SYMLINK, b"t")


def test_gnu_tar_reads_what_is_packed_and_the_other_way_round(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / ("long" * 40)).mkdir(parents=True)
    (source / ("long" * 40) / ("name" * 40)).write_text("deep")
    (source / "big").write_bytes(os.urandom(3_000_000))
    os.mkfifo(source / "pipe")
    os.symlink("nowhere" * 30, source / "link")
    os.utime(source / "big", ns=(1, 1_234_567_890_123_456_789))
    for form in ("gnu", "pax"):
        made = tmp_path / f"{form}.tar"
        subprocess.run(["tar", f"--format={form}", "-C", source, "-cf", made, "."], check=True)
        unpack_to(tmp_path / form, made.read_bytes())
    assert tree(tmp_path / "pax") == tree(source)
    assert tree(tmp_path / "gnu").keys() == tree(source).keys()


@pytest.mark.parametrize(
    "form", ["gnu", "posix --sparse-version=0.1", "posix --sparse-version=1.0"]
)
def test_sparse_files_are_read(tmp_path: Path, form: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with open(source / "holes", "wb") as file:
        for number in range(12):
            file.seek(number * 1_000_000)
            file.write(b"data %d" % number)
        file.truncate(20_000_000)
    made = tmp_path / "sparse.tar"
    options = f"--format={form}".split()
    subprocess.run(["tar", *options, "-S", "-C", source, "-cf", made, "holes"], check=True)
    assert made.stat().st_size < 1_000_000
    unpack_to(tmp_path / "out", made.read_bytes())
    assert (tmp_path / "out/holes").read_bytes() == (source / "holes").read_bytes()
    assert (tmp_path / "out/holes").stat().st_blocks * 512 < 1_000_000


VALID = archive(
    member("d", tarfile.DIRTYPE),
    member(
        "d/file", data=b"content" * 200, pax_headers={"SCHILY.xattr.user.a": "b", "mtime": "1.5"}
    ),
    member("d/hard", tarfile.LNKTYPE, linkname="d/file"),
    member("d/" + "long" * 60, data=b"x"),
    member("link", tarfile.SYMTYPE, linkname="/etc"),
    member(".wh.gone"),
    member("d/.wh..wh..opq"),
)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_no_damage_does_harm(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Bytes changed, cut or doubled anywhere: it unpacks, or is refused with one line."""
    broken = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(broken) - 1))
        match data.draw(st.sampled_from(["change", "cut", "copy"])):
            case "change":
                broken[at] = data.draw(st.integers(0, 255))
            case "cut":
                del broken[at : at + data.draw(st.integers(1, 600))]
            case "copy":
                broken[at:at] = broken[max(0, at - 512) : at]
        broken = broken or bytearray(1)
    directory = tmp_path_factory.mktemp("fuzz")
    output = io.BytesIO()
    try:
        unpack_to(directory / "in", bytes(broken), recipe=recipes.RecipeWriter(output))
    except UserError as error:
        assert "\n" not in error.message
    assert [path.name for path in directory.iterdir()] == ["in"]


@given(st.binary(max_size=3000))
def test_noise_is_refused_or_empty(noise: bytes) -> None:
    try:
        assert entries(noise) == [] or noise[257:262] == b"ustar"
    except BadContent:
        pass


@pytest.mark.parametrize("at, number", [(108, 1 << 32), (116, 1 << 55), (136, 1 << 63)])
def test_owners_and_times_that_no_system_has_are_refused(at: int, number: int) -> None:
    block = bytearray(tar.header(tar.Entry(b"f", tar.FILE)))
    width = 12 if at == 136 else 8
    block[at : at + width] = b"\x80" + number.to_bytes(width - 1, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    with pytest.raises(BadContent, match="'f' has an impossible"):
        entries(bytes(block) + tar.END)


def test_truncated_archives_are_refused_wherever_they_end() -> None:
    for end in range(1, len(VALID.rstrip(b"\0"))):
        if end % tar.BLOCK:
            with pytest.raises(BadContent, match="truncated"):
                for _ in tar.Reader(io.BytesIO(VALID[:end])):
                    pass
