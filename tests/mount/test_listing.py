"""Directories that are read while they change, that are huge, and whose names are strange."""

import errno
import os

import pytest
from harness import linux
from harness.mounts import Workshop


def listing(path: os.PathLike[str]) -> list[bytes]:
    return [name for name, _ in linux.telldir_listing(path) if name not in (b".", b"..")]


@pytest.mark.doors
def test_seekdir_returns_to_what_telldir_told(workshop: Workshop) -> None:
    tree = workshop({f"d/top{n}": "" for n in range(40)}, {f"d/base{n}": "" for n in range(40)})
    told = list(linux.telldir_listing(tree / "d"))
    names = [name for name, _ in told]
    stream = linux.opendir(tree / "d")
    try:
        for index in (0, 5, 40, 79, 20, 81):
            linux.seekdir(stream, told[index][1])
            rest = []
            while (name := linux.readdir(stream)) is not None:
                rest.append(name)
            assert rest == names[index + 1 :]
        linux.rewinddir(stream)
        assert linux.readdir(stream) == names[0]
    finally:
        linux.closedir(stream)


@pytest.mark.doors
def test_a_listing_goes_on_while_names_come_and_go(workshop: Workshop) -> None:
    tree = workshop(
        {f"d/top{n:03}": "" for n in range(150)}, {f"d/base{n:03}": "" for n in range(150)}
    )
    steady = {os.fsencode(name) for name in os.listdir(tree / "d")}
    stream, seen, changed = linux.opendir(tree / "d"), [], set()
    try:
        count = 0
        while (name := linux.readdir(stream)) is not None:
            seen.append(name)
            count += 1
            if count % 10 == 0 and count < 300:
                (tree / f"d/new{count}").write_text("")
                victim = f"top{count // 2:03}" if count % 20 else f"base{count // 2:03}"
                (tree / "d" / victim).unlink()
                changed |= {victim.encode(), b"new%d" % count}
    finally:
        linux.closedir(stream)
    assert len(seen) == len(set(seen)), "no name twice"
    assert steady - changed <= set(seen), "what was there all the time was listed"
    assert set(listing(tree / "d")) == {os.fsencode(name) for name in os.listdir(tree / "d")}


def test_removing_all_while_listing(workshop: Workshop) -> None:
    # what rm -r does: the offsets of the names that are left must not move
    layers = [{f"d/{kind}{n}": "" for n in range(500)} for kind in ("top", "base")]
    tree = workshop(*layers)
    stream, count = linux.opendir(tree / "d"), 0
    try:
        while (name := linux.readdir(stream)) is not None:
            if name not in (b".", b".."):
                os.unlink(os.fsencode(tree / "d") + b"/" + name)
                count += 1
    finally:
        linux.closedir(stream)
    assert count == 1000
    os.rmdir(tree / "d")


def test_rewinddir_shows_what_came_since(workshop: Workshop) -> None:
    tree = workshop({"d/a": ""}, {"d/b": ""})
    stream = linux.opendir(tree / "d")
    try:
        while linux.readdir(stream) is not None:
            pass
        (tree / "d/c").write_text("")
        (tree / "d/b").unlink()
        linux.rewinddir(stream)
        seen = set()
        while (name := linux.readdir(stream)) is not None:
            seen.add(name)
    finally:
        linux.closedir(stream)
    assert seen == {b".", b"..", b"a", b"c"}


@pytest.mark.on("overlay", "unionfuse")
@pytest.mark.timeout(120)
def test_a_hundred_thousand_entries(workshop: Workshop) -> None:
    count = 100_000
    tree = workshop({"d/first": ""}, {"d/last": ""})
    tree.unmount()
    (tree.stack.lowers[1] / "many").mkdir()
    directory = os.open(tree.stack.lowers[1] / "many", os.O_RDONLY)
    for number in range(count):
        os.close(os.open(f"file-{number}", os.O_CREAT | os.O_WRONLY, dir_fd=directory))
    os.close(directory)
    workshop.forget_layer(tree.stack.lowers[1])
    tree.mount()
    names = os.listdir(tree / "many")
    assert len(names) == len(set(names)) == count
    (tree / "many/file-77").unlink()
    (tree / "many/new").write_text("new")
    names = os.listdir(tree / "many")
    assert len(names) == len(set(names)) == count
    assert "new" in names and "file-77" not in names


def test_the_longest_name_and_longer_ones(workshop: Workshop) -> None:
    tree = workshop({"n" * 255: "from below", "d/x": ""})
    assert (tree / ("n" * 255)).read_text() == "from below"
    (tree / ("m" * 255)).write_text("new")
    (tree / ("n" * 255)).write_text("changed")
    (tree / ("n" * 255)).rename(tree / ("o" * 255))
    assert (tree / ("o" * 255)).read_text() == "changed"
    assert not (tree / ("n" * 255)).exists()
    for length in (256, 300, 1024, 1025):
        name = tree / ("x" * length)
        calls = {
            "stat": lambda name=name: os.stat(name),
            "open": lambda name=name: os.open(name, os.O_RDONLY),
            "create": lambda name=name: os.open(name, os.O_CREAT | os.O_WRONLY),
            "mkdir": lambda name=name: os.mkdir(name),
            "symlink": lambda name=name: os.symlink("t", name),
            "mknod": lambda name=name: os.mknod(name),
            "unlink": lambda name=name: os.unlink(name),
            "rmdir": lambda name=name: os.rmdir(name),
            "link": lambda name=name: os.link(tree / "d/x", name),
            "rename": lambda name=name: os.rename(tree / "d/x", name),
            "rename from": lambda name=name: os.rename(name, tree / "y"),
        }
        for what, call in calls.items():
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == errno.ENAMETOOLONG, (what, length)


def test_whiteouts_of_the_longest_names(workshop: Workshop) -> None:
    tree = workshop({"d/" + "n" * 255: "", "e/" + "m" * 252: ""}, {"d/other": ""})
    (tree / "d" / ("n" * 255)).unlink()
    (tree / "e" / ("m" * 252)).unlink()
    assert os.listdir(tree / "d") == ["other"]
    assert os.listdir(tree / "e") == []
    tree.remount()
    assert os.listdir(tree / "d") == ["other"]
    os.rmdir(tree / "e")


def test_names_that_are_not_utf8(workshop: Workshop) -> None:
    odd = [
        b"\xff\xfe",
        b"caf\xe9",
        b"new\nline",
        b"tab\t",
        b" ",
        b"\x01",
        b"-rf",
        b"\xf0\x9f\x98\x80",
    ]
    tree = workshop({f"d/{os.fsdecode(name)}": "below" for name in odd}, {"d/plain": ""})
    assert set(os.listdir(os.fsencode(tree / "d"))) == {*odd, b"plain"}
    for name in odd:
        path = os.fsencode(tree / "d") + b"/" + name
        with open(path, "ab") as file:
            file.write(b"+")
        with open(path, "rb") as file:
            assert file.read() == b"below+"
        os.rename(path, path + b"\xff")
        os.symlink(name, path)
        assert os.readlink(path) == name
    assert len(os.listdir(tree / "d")) == 2 * len(odd) + 1


def test_paths_as_deep_as_a_path_can_be_and_deeper(workshop: Workshop) -> None:
    tree = workshop({"a": "x"})
    part, depth = "p" * 200, 25  # 5,000 bytes: nobody can name the innermost from the root
    directory = os.open(tree.root, os.O_RDONLY)
    try:
        for _ in range(depth):
            os.mkdir(part, dir_fd=directory)
            inner = os.open(part, os.O_RDONLY, dir_fd=directory)
            os.close(directory)
            directory = inner
        file = os.open("deep", os.O_CREAT | os.O_RDWR, dir_fd=directory)
        os.write(file, b"deep down")
        os.close(file)
        os.rename("deep", "deeper", src_dir_fd=directory, dst_dir_fd=directory)
        os.chmod("deeper", 0o640, dir_fd=directory) if os.chmod in os.supports_dir_fd else None
        os.link("deeper", "again", src_dir_fd=directory, dst_dir_fd=directory)
        assert os.stat("again", dir_fd=directory).st_nlink == 2
        os.unlink("again", dir_fd=directory)
        assert os.listdir(directory) == ["deeper"]
    finally:
        os.close(directory)


def test_a_path_of_path_max_in_a_layer(workshop: Workshop) -> None:
    # the longest path that a program can use: the union must not put a prefix before it
    tree = workshop({"x": ""})
    tree.unmount()
    room = 4095 - len(str(tree.root)) - len("/f")
    parts = []
    while room > 1:
        parts.append("q" * min(200, room - 1))
        room -= len(parts[-1]) + 1
    where = tree.root if tree.kind == "plain" else tree.stack.lowers[0]
    directory = os.open(where, os.O_RDONLY)
    for part in parts:
        os.mkdir(part, dir_fd=directory)
        inner = os.open(part, os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = inner
    os.close(os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=directory))
    os.close(directory)
    for layer in tree.stack.lowers:
        workshop.forget_layer(layer)
    tree.mount()
    longest = f"{tree.root}/{'/'.join(parts)}/f"
    assert len(longest) == 4095
    with open(longest, "w") as file:
        file.write("copied up")
    os.chmod(longest, 0o600)
    os.utime(longest, ns=(1, 2))
    os.rename(longest, longest[:-1] + "g")
    with open(longest[:-1] + "g") as file:
        assert file.read() == "copied up"
    os.unlink(longest[:-1] + "g")
    assert os.listdir(os.path.dirname(longest)) == []


@pytest.mark.on("unionfuse")
def test_names_that_are_whiteouts_on_disk_cannot_be_made(workshop: Workshop) -> None:
    tree = workshop({"file": "", "d/x": ""})
    for call in (
        lambda: (tree / "d/.wh.name").write_text(""),
        lambda: (tree / "d/.wh.name").mkdir(),
        lambda: os.symlink("x", tree / "d/.wh.name"),
        lambda: os.mknod(tree / "d/.wh.name"),
        lambda: os.link(tree / "file", tree / "d/.wh.name"),
        lambda: os.rename(tree / "file", tree / "d/.wh.name"),
        lambda: (tree / "d/.wh..wh..opq").write_text(""),
    ):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EINVAL
    assert not (tree / "d/.wh.name").exists()
    (tree / "d/.whatever").write_text("fine")
    assert sorted(os.listdir(tree / "d")) == [".whatever", "x"]
