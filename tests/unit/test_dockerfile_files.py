"""Copying and extracting into hostile trees: nothing is read or written outside of them."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unionimage.dockerfile import extract
from unionimage.dockerfile.ignore import Patterns
from unionimage.dockerfile.parser import DockerfileError
from unionimage.dockerfile.place import Style, Target, changed_mode
from unionimage.dockerfile.select import Found, Tree, digest, find

NONE = Patterns(())
ME = (os.getuid(), os.getgid())


class Place:
    """A directory `inside`, and beside it what must stay as it is."""

    def __init__(self, path: Path) -> None:
        self.inside = path / "inside"
        self.outside = path / "outside"
        self.inside.mkdir()
        self.outside.mkdir()
        (self.outside / "file").write_text("untouched")
        self.root = os.open(self.inside, os.O_PATH | os.O_DIRECTORY)
        self.before = self.look()

    def look(self) -> list[tuple[str, int, str]]:
        return sorted(
            (str(p), p.lstat().st_mode, p.read_text() if p.is_file() else "")
            for p in self.outside.rglob("*")
        )

    def check(self) -> None:
        assert self.look() == self.before


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "file").write_text("content")
    (directory / "dir").mkdir()
    (directory / "dir/inner").write_text("inner")
    return directory


def tree_of(path: Path) -> Tree:
    return Tree(os.open(path, os.O_PATH | os.O_DIRECTORY))


def found_in(path: Path, *sources: str, parents: bool = False) -> list[Found]:
    return find(tree_of(path), sources, NONE, parents, "the build context")


def copy(place: Place, source: Path, name: str, destination: bytes) -> None:
    target = Target(place.root, Style())
    for found in found_in(source, name):
        target.copy(tree_of(source), found, destination)
    target.finish()


# ---- destinations


def test_links_in_the_target_stay_inside_of_it(place: Place, source: Path) -> None:
    (place.inside / "absolute").symlink_to(place.outside)
    (place.inside / "up").symlink_to("../../outside")
    (place.inside / "etc").mkdir()
    (place.inside / "to-etc").symlink_to("/etc")
    copy(place, source, "file", b"to-etc/")
    assert (place.inside / "etc/file").read_text() == "content"
    for link in (b"absolute/", b"up/"):
        with pytest.raises(DockerfileError, match="in the way"):
            copy(place, source, "file", link)
    place.check()


def test_a_file_replaces_a_link_and_does_not_follow_it(place: Place, source: Path) -> None:
    (place.inside / "file").symlink_to(place.outside / "file")
    copy(place, source, "file", b"")
    assert not (place.inside / "file").is_symlink()
    (place.inside / "dir").mkdir()
    (place.inside / "dir/inner").symlink_to(place.outside / "file")
    copy(place, source, "dir", b"dir/")
    assert (place.inside / "dir/inner").read_text() == "inner"
    place.check()


def test_kinds_that_clash_are_refused(place: Place, source: Path) -> None:
    (place.inside / "file").mkdir()
    (place.inside / "plain").write_text("x")
    with pytest.raises(DockerfileError, match="over the directory /file/file"):
        (place.inside / "file/file").mkdir()
        copy(place, source, "file", b"file")
    with pytest.raises(DockerfileError, match="/plain is in the way"):
        copy(place, source, "dir", b"plain/")


# ---- sources


def test_sources_cannot_leave_the_context(place: Place, tmp_path: Path) -> None:
    (place.inside / "link").symlink_to(place.outside / "file")
    (place.inside / "up").symlink_to("../outside")
    for source in (
        "../outside/file",
        "/../outside/file",
        "link",
        "up/file",
        "a/../../outside/file",
    ):
        with pytest.raises(DockerfileError, match="is not in the build context"):
            found_in(place.inside, source)


def test_links_are_followed_at_the_top_and_kept_below(place: Place) -> None:
    (place.inside / "dir").mkdir()
    (place.inside / "dir/link").symlink_to("../file")
    (place.inside / "file").write_text("x")
    (place.inside / "top").symlink_to("dir")
    (found,) = found_in(place.inside, "top")
    assert found.is_directory and [entry.place for entry in found.entries] == [b"", b"link"]
    (found,) = found_in(place.inside, "top/link")
    assert not found.is_directory and found.name == b"link"


def test_odd_names_are_copied(place: Place, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    odd.mkdir()
    names = [b"x" * 255, b"\xff\xfe", b"new\nline", b".wh.name", b" ", b"-rf", "ü".encode()]
    for name in names:
        (odd / os.fsdecode(name)).write_bytes(name)
    os.mkfifo(odd / "fifo")
    copy(place, odd, ".", b"/")
    assert sorted(os.listdir(os.fsencode(place.inside))) == sorted([*names, b"fifo"])


def test_wildcards_match_within_one_component(source: Path) -> None:
    for name in ("a1", "a2", "b[1]", "back\\slash"):
        (source / name).write_text("")
    assert [f.name for f in found_in(source, "a?", "[b]*", "d*/in*")] == [
        b"a1", b"a2", b"b[1]", b"back\\slash", b"inner",
    ]  # fmt: skip
    assert [f.name for f in found_in(source, "b\\[1\\]")] == [b"b[1]"]
    assert found_in(source, "none*") == []
    with pytest.raises(DockerfileError):
        found_in(source, "[")


# ---- digests


def test_the_digest_forgets_times_and_sees_the_rest(source: Path) -> None:
    def value() -> str:
        return digest(tree_of(source), found_in(source, "."))

    seen = {first := value()}
    os.utime(source / "file", (1, 1))
    (source / "file").rename(source / "other")
    (source / "other").rename(source / "file")
    assert value() == first
    changes = [
        lambda: (source / "file").chmod(0o600),
        lambda: (source / "file").write_text("changed"),
        lambda: (source / "dir/inner").rename(source / "dir/renamed"),
        lambda: (source / "link").symlink_to("file"),
        lambda: ((source / "link").unlink(), (source / "link").symlink_to("dir")),
        lambda: os.link(source / "file", source / "hard"),
        lambda: (source / "empty").mkdir(),
        lambda: os.setxattr(source / "file", "user.note", b"x"),
    ]
    for change in changes:
        change()
        assert value() not in seen
        seen.add(value())


# ---- archives


def archive_of(*members: tarfile.TarInfo) -> io.BytesIO:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(b"evil"[: member.size]))
    buffer.seek(0)
    return buffer


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.mode = kind, link, 0o644
    made.uid, made.gid = ME
    made.size = 4 if kind == tarfile.REGTYPE else 0
    return made


def unpack(place: Place, buffer: io.BytesIO) -> None:
    archive = extract.open_archive(buffer)
    if archive is not None:
        extract.extract(archive, place.root, Style())


LINK, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE


@pytest.mark.parametrize(
    "members",
    [
        [member("../outside/file")],
        [member("/../../outside/new")],
        [member("a/../../outside/file")],
        [member("link", LINK, "../outside"), member("link/file")],
        [member("link", LINK, "/"), member("link/outside/file")],
        [member("one", LINK, ".."), member("two", LINK, "one/../outside"), member("two/file")],
        [member("hard", HARD, "../outside/file"), member("hard")],
        [member("link", LINK, "../outside/file"), member("hard", HARD, "link"), member("hard")],
        [member("dir", tarfile.DIRTYPE), member("dir", LINK, "../outside"), member("dir/file")],
        [member("file"), member("file/below")],
    ],
)  # fmt: skip
def test_members_that_want_out(place: Place, members: list[tarfile.TarInfo]) -> None:
    try:
        unpack(place, archive_of(*members))
    except DockerfileError as error:
        assert "\n" not in str(error)
    place.check()


def test_damaged_archives_are_refused(place: Place) -> None:
    whole = archive_of(member("a"), member("b")).getvalue()
    with pytest.raises(DockerfileError, match="damaged"):
        unpack(place, io.BytesIO(whole[:1500]))
    for data in (b"", b"no archive", b"\x1f\x8b broken gzip", b"\x28\xb5\x2f\xfd broken zstd"):
        assert extract.open_archive(io.BytesIO(data)) is None


_names = st.lists(st.sampled_from(["a", "b", "..", ".", ""]), min_size=1, max_size=4).map("/".join)
_members = st.builds(
    member, _names, st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, LINK, HARD]), _names
)


@given(members=st.lists(_members, max_size=6))
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_archive_reaches_outside(
    tmp_path_factory: pytest.TempPathFactory, members: list[tarfile.TarInfo]
) -> None:
    place = Place(tmp_path_factory.mktemp("hostile"))
    try:
        unpack(place, archive_of(*members))
    except DockerfileError:
        pass
    finally:
        os.close(place.root)
    place.check()


# ---- modes


@pytest.mark.parametrize(
    ("text", "mode", "expected"),
    [
        ("", 0o100640, 0o640),
        ("755", 0o100640, 0o755),
        ("4711", 0o100640, 0o4711),
        ("u=rwX,go=rX", 0o100600, 0o644),
        ("u=rwX,go=rX", 0o100700, 0o755),
        ("u=rwX,go=rX", 0o040700, 0o755),
        ("a+x", 0o100644, 0o755),
        ("-w", 0o100666, 0o444),
        ("u+s,g-r", 0o100755, 0o4715),
        ("+t", 0o040777, 0o1777),
        ("o=", 0o100777, 0o770),
    ],
)
def test_modes(text: str, mode: int, expected: int) -> None:
    assert changed_mode(text, mode) == expected


@pytest.mark.parametrize("text", ["9", "77777", "rwx", "u=z", "u=r,", "0o755"])
def test_bad_modes(text: str) -> None:
    with pytest.raises(DockerfileError, match="--chmod"):
        changed_mode(text, 0o100644)
