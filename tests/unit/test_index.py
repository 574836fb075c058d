"""The lookup index against the union without one (the oracle), extended, outdated and damaged."""

import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest
from harness.layers import Dir, File, HardLink, Layer, Special, Symlink, Whiteout, build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unionfuse.index.builder import build as build_index
from unionfuse.index.builder import extend
from unionfuse.index.check import damage, differences
from unionfuse.index.lookup import CHECKSUM, HEADER_SIZE, LookupIndex, LookupIndexError, _hash
from unionfuse.layers.layer import LayerStack
from unionfuse.options import parse
from unionfuse.union import Union

REDIRECT = "trusted.overlay.redirect"

STACKS: dict[str, list[Layer]] = {
    "one layer": [{"a": "x", "d/e/f": "deep", "s": Symlink("d/e"), "p": Special()}],
    "whiteouts": [
        {"a": None, "d/x": Whiteout("aufs"), "e": None, "e2/new": "n"},
        {"a": "1", "d/x": "2", "d/y": "3", "e/below": "4", "e2/old": "5"},
    ],
    "opaque": [
        {"d": Dir(opaque="kernel"), "d/new": "n", "f": Dir(opaque="aufs")},
        {"d/old": "o", "d/sub/deep": "x", "f/gone": "g"},
        {"d/older": "o"},
    ],
    "kinds replace each other": [
        {"file": "now a file", "directory/in": "now a directory", "link": "plain"},
        {"file/was": "a directory", "directory": "was a file", "link": Symlink("x")},
    ],
    "hard links": [
        {"b/two": None, "new": "n"},
        {"a/one": "x", "b/two": HardLink("a/one"), "three": HardLink("a/one")},
    ],
    "redirect": [
        {"new": Dir(xattrs={REDIRECT: b"/old"}), "new/mine": "m", "old": None},
        {"old/a": "1", "old/sub/b": "2", "old/sub/c": Symlink("b")},
        {"old/sub/base": "3"},
    ],
    "redirect to a sibling": [
        {"d/new": Dir(xattrs={REDIRECT: b"old"}), "d/old": None},
        {"d/old/sub/x": "1", "d/keep": "2"},
    ],
    "attributes": [
        {"f": File(data="x", mode=0o4755, uid=7, gid=8, xattrs={"user.a": b"1"})},
        {"f": "hidden", "g": File(size=1 << 20), "d": Dir(mode=0o1777)},
    ],
    "old times": [{"f": File(data="x", mtime_ns=-1), "g": File(mtime_ns=-1_500_000_000_5)}],
}


@contextmanager
def opened(directories: list[Path]) -> Iterator[LayerStack]:
    stack = LayerStack.open([os.fsencode(path) for path in directories])
    try:
        yield stack
    finally:
        stack.close()


def index_of(directories: list[Path], path: Path) -> LookupIndex:
    with opened(directories) as stack:
        build_index(stack.layers).write(str(path))
    return LookupIndex.open(str(path))


def by_union(directories: list[Path]) -> dict[bytes, object]:
    """path -> what the union says without an index."""
    option = "lowerdir=" + ":".join(str(path) for path in directories)
    stack = LayerStack.open([os.fsencode(path) for path in directories])
    union = Union(stack, parse(["-o", option, "/mnt"]).options)
    found: dict[bytes, object] = {}

    def walk(node: int, path: bytes) -> None:
        with union.lock:
            entries = list(union.listing(node, 0))
        for name, _, entry in entries:
            a, inside = entry.attributes, path + b"/" + name
            if a.mode >> 12 == 0o4:
                walk(entry.node, inside)  # only then it is known what a redirect merges with
                a = union.getattr(entry.node)
            link = union.readlink(entry.node) if a.mode >> 12 == 0o12 else b""
            xattrs = bool(union.listxattr(entry.node, os.getpid()))
            layer = union.getxattr(entry.node, b"user.unionfuse.layer")
            found[inside] = (
                *(a.ino, a.size, a.blocks, a.mtime_ns, a.ctime_ns, a.mode, a.nlink),
                *(a.uid, a.gid, a.rdev, a.blksize, link, xattrs, layer),
            )

    walk(1, b"")
    union.close()
    return found


def by_index(index: LookupIndex, directories: list[Path]) -> dict[bytes, object]:
    """path -> what the index says; checks on the way that listing and lookup agree."""
    found: dict[bytes, object] = {}
    todo = [(1, b"")]
    while todo:
        directory, path = todo.pop()
        cookies = []
        for name, node, cookie in index.entries(directory):
            assert index.lookup(directory, name) == node
            cookies.append(cookie)
            a, inside, info = index.status(node), path + b"/" + name, index.info(node)
            assert (directory, name) in index.names(node)
            link = index.readlink(node) if a.st_mode >> 12 == 0o12 else b""
            found[inside] = (
                *(a.st_ino, a.st_size, a.st_blocks, a.st_mtime_ns, a.st_ctime_ns, a.st_mode),
                *(a.st_nlink, a.st_uid, a.st_gid, a.st_rdev, a.st_blksize, link),
                *(bool(info.flags & 1), os.fsencode(directories[info.layer])),
            )
            if a.st_mode >> 12 == 0o4:
                todo.append((node, inside))
        assert cookies == list(range(3, 3 + len(cookies)))
        assert index.lookup(directory, b"no such name") == 0
    return found


def make(base: Path, layers: list[Layer]) -> list[Path]:
    return [build(base / f"layer{number}", layer) for number, layer in enumerate(layers)]


@pytest.mark.parametrize("name", STACKS)
def test_the_index_says_what_the_union_says(name: str, tmp_path: Path) -> None:
    directories = make(tmp_path, STACKS[name])
    index = index_of(directories, tmp_path / "index")
    assert by_index(index, directories) == by_union(directories)
    assert list(damage(index)) == []


@pytest.mark.parametrize("name", [name for name in STACKS if len(STACKS[name]) > 1])
def test_extending_gives_what_building_gives(name: str, tmp_path: Path) -> None:
    directories = make(tmp_path, STACKS[name])
    index_of(directories, tmp_path / "whole")
    below = index_of(directories[1:], tmp_path / "below")
    with opened(directories) as stack:
        extend(below, stack.layers).write(str(tmp_path / "extended"))
    extended = LookupIndex.open(str(tmp_path / "extended"))
    assert by_index(extended, directories) == by_union(directories)
    assert list(damage(extended)) == []


names = st.sampled_from(["a", "b", "c", "d/a", "d/b", "d/e/a", "d/e/b", "b/a", "b/b"])
specs = st.sampled_from(["text", None, Dir(), Dir(opaque="kernel"), Symlink("a"), Whiteout("aufs")])


def consistent(layer: dict[str, object]) -> dict[str, object]:
    """Without names that lie below something that is no directory."""
    files = {path for path, spec in layer.items() if not isinstance(spec, Dir)}
    return {
        path: spec
        for path, spec in layer.items()
        if not any(str(parent) in files for parent in Path(path).parents)
    }


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.dictionaries(names, specs, max_size=6).map(consistent), min_size=1, max_size=4))
def test_random_stacks(tmp_path_factory: pytest.TempPathFactory, layers: list[Layer]) -> None:
    base = tmp_path_factory.mktemp("stack")
    directories = make(base, layers)
    expected = by_union(directories)
    index = index_of(directories[-1:], base / "index0")
    for count in range(2, len(directories) + 1):
        with opened(directories[-count:]) as stack:
            extend(index, stack.layers).write(str(base / f"index{count}"))
        index = LookupIndex.open(str(base / f"index{count}"))
    assert by_index(index, directories) == expected
    assert list(damage(index)) == []


def test_deep_and_wide(tmp_path: Path) -> None:
    layer = tmp_path / "layer"
    path = layer
    path.mkdir()
    for _ in range(400):
        path = path / "d"
    os.makedirs(path)
    for number in range(3000):
        (layer / f"file-{number}-{'x' * (number % 200)}").touch()
    index = index_of([layer], tmp_path / "index")
    assert len(list(index.entries(1))) == 3001
    node = 1
    for _ in range(400):
        node = index.lookup(node, b"d")
        assert node
    assert index.places(node) == [(0, b"/".join([b"d"] * 400))]
    assert list(damage(index)) == []


def test_a_changed_layer_is_refused_or_found_out(tmp_path: Path) -> None:
    directories = make(tmp_path, [{"top/f": "x"}, {"base/f": "y"}])
    index = index_of(directories, tmp_path / "index")
    with opened(directories) as stack:
        assert list(differences(index, stack.layers)) == []
    (directories[1] / "base/f").write_text("longer")  # deep: only verify sees it
    with opened(directories) as stack:
        index.check([os.stat(layer.descriptor) for layer in stack.layers])
        assert any("/base/f: size" in line for line in differences(index, stack.layers))
    (directories[0] / "new").touch()
    with (
        opened(directories) as stack,
        pytest.raises(LookupIndexError, match=r"outdated: layer 0 .*names were added"),
    ):
        index.check([os.stat(layer.descriptor) for layer in stack.layers])
    with opened(directories[:1]) as stack, pytest.raises(LookupIndexError, match="2 layers, not"):
        index.check([os.stat(layer.descriptor) for layer in stack.layers])


def test_a_layer_may_be_renamed(tmp_path: Path) -> None:
    directories = make(tmp_path, [{"f": "x"}])
    index = index_of(directories, tmp_path / "index")
    directories[0].rename(tmp_path / "elsewhere")
    with opened([tmp_path / "elsewhere"]) as stack:
        index.check([os.stat(layer.descriptor) for layer in stack.layers])


def sealed(data: bytearray) -> bytes:
    """With the checksum of the header put right again."""
    CHECKSUM.pack_into(data, HEADER_SIZE - 8, _hash(bytes(data[: HEADER_SIZE - 8])))
    return bytes(data)


REFUSED: dict[str, tuple[Callable[[bytearray], bytes], str]] = {
    "empty": (lambda data: b"", "too short"),
    "something else": (lambda data: b"\x7fELF" + bytes(5000), "not a lookup index"),
    "cut short": (lambda data: bytes(data[:-4096]), "bytes long where its header says"),
    "longer": (lambda data: bytes(data) + b"x", "bytes long where its header says"),
    "another version": (lambda data: sealed(patched(data, 12, "=I", 99)), "format version 99"),
    "another byte order": (lambda data: sealed(patched(data, 8, ">I", 0x01020304)), "byte order"),
    "a bad header": (lambda data: bytes(patched(data, 100, "=B", data[100] ^ 1)), "checksum"),
    "a wild section": (lambda data: sealed(patched(data, 48, "=Q", 1 << 62)), "outside"),
}


def patched(data: bytearray, at: int, form: str, value: int) -> bytearray:
    struct.pack_into(form, data, at, value)
    return data


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_good_index_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    index_of(make(tmp_path, [{"f": "x"}]), tmp_path / "index")
    change, reason = REFUSED[name]
    bad = tmp_path / "bad"
    bad.write_bytes(change(bytearray((tmp_path / "index").read_bytes())))
    with pytest.raises(LookupIndexError, match=reason):
        LookupIndex.open(str(bad))


def test_a_missing_index_and_a_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LookupIndexError, match="No such file"):
        LookupIndex.open(str(tmp_path / "none"))
    with pytest.raises(LookupIndexError, match="not a regular file"):
        LookupIndex.open(str(tmp_path))


def test_every_damaged_byte_is_found_and_read_without_an_accident(tmp_path: Path) -> None:
    directories = make(tmp_path, STACKS["hard links"])
    index = index_of(directories, tmp_path / "index")
    whole = (tmp_path / "index").read_bytes()
    covered = [at for s in index.sections.values() for at in range(s.offset, s.offset + s.length)]
    rng = random.Random(5)
    for at in rng.sample(covered, 400):
        data = bytearray(whole)
        data[at] ^= rng.randrange(1, 256)
        try:
            bad = LookupIndex.read("bad", bytes(data))
        except LookupIndexError:
            continue
        assert list(damage(bad)), f"a changed byte at {at} was not found"
        read_everything(bad)


def read_everything(index: LookupIndex) -> None:
    """Whatever it says, it says it with an answer or an OSError."""
    for node in range(index.count + 2):
        for ask in (index.status, index.info, index.names, index.readlink, index.places):
            with_errors_allowed(lambda ask=ask, node=node: ask(node))
        with_errors_allowed(lambda node=node: index.lookup(node, b"two"))
        with_errors_allowed(lambda node=node: list(islice(index.entries(node), 100)))


def with_errors_allowed(call: Callable[[], object]) -> None:
    try:
        call()
    except OSError:
        pass


def test_writing_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    with opened(make(tmp_path, [{"f": "x"}])) as stack, pytest.raises(OSError):
        build_index(stack.layers).write(str(tmp_path / "no/such/place"))
    (tmp_path / "in the way").mkdir()
    with opened([tmp_path / "layer0"]) as stack, pytest.raises(OSError):
        build_index(stack.layers).write(str(tmp_path / "in the way"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in the way", "layer0"]


def unionfuse(*words: object) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        "import sys; from unionimage.cli import main; sys.exit(main())",
    ]
    return subprocess.run([*command, *map(str, words)], capture_output=True, text=True)


def test_the_command_builds_verifies_and_shows(tmp_path: Path) -> None:
    top, base = make(tmp_path, [{"top": "x"}, {"base": "y", "link": Symlink("base")}])
    index = tmp_path / "index"
    assert unionfuse("index", "build", "-o", tmp_path / "below", base).returncode == 0
    words = ("index", "build", "--below", tmp_path / "below", "--label", "sha256:1", "-o", index)
    assert unionfuse(*words, top, base).returncode == 0
    assert "agrees with its layers" in unionfuse("index", "verify", index, top, base).stdout
    shown = unionfuse("index", "show", index, "/").stdout
    assert "layer 0   top" in shown and "link -> base" in shown
    assert "sha256:1" in unionfuse("index", "show", index).stdout
    (base / "base").write_text("changed")
    refused = unionfuse("index", "verify", index, top, base)
    assert refused.returncode == 1 and "/base: size" in refused.stdout
    assert "cannot be trusted" in refused.stderr
    assert "no such file" in unionfuse("index", "show", index, "/nope").stderr
    assert "cannot be opened" in unionfuse("index", "show", tmp_path / "none").stderr
    assert "does not exist" in unionfuse("index", "build", "-o", index, tmp_path / "x").stderr
