"""rename in all its forms; directories that lie below are renamed by a redirect, never by EXDEV."""

import errno
import os
import stat

import pytest
from harness import linux
from harness.layers import Dir, File, Special, Symlink
from harness.mounts import Mounted, Stack, Workshop
from harness.snapshot import assert_equal

STACK = (
    {"d/top": "top", "both/x": "bx", "w": None},
    {"d/base": "base", "d/sub/deep": "deep", "lower/file": "lf", "lower/in/ner": "i",
     "f": File(data="f", mode=0o640), "g": "g", "s": Symlink("f"), "both/y": "by",
     "empty": Dir(), "fifo": Special(), "w/old": ""},
)  # fmt: skip


def both_ways(workshop: Workshop, change, *, options=None, stack=STACK) -> None:
    """Do `change` on a union and on a plain directory: the trees must be equal, remounted too."""
    tree, plain = workshop(*stack, options=options), workshop(*stack, kind="plain")
    outcomes = []
    for root in (tree.root, plain.root):
        try:
            outcomes.append(change(root))
        except OSError as error:
            outcomes.append(error.errno)
    assert outcomes[0] == outcomes[1]
    wanted = plain.snapshot()
    assert_equal(tree.snapshot(), wanted)
    tree.remount()
    assert_equal(tree.snapshot(), wanted)
    if tree.kind != "plain" and not options:
        tree.remount("overlay" if tree.is_unionfuse else "unionfuse")
        assert_equal(tree.snapshot(), wanted)


RENAMES = {
    "a file": ("f", "new"),
    "a file over a file": ("f", "g"),
    "a file into a directory": ("f", "d/f"),
    "a file from a merged directory": ("d/base", "new"),
    "a symlink": ("s", "d/s"),
    "a fifo": ("fifo", "d/fifo"),
    "a file over a symlink": ("f", "s"),
    "a file over a whiteout": ("f", "w"),
    "a directory over a whiteout": ("lower", "w"),
    "a lower directory": ("lower", "moved"),
    "a merged directory": ("d", "moved"),
    "a merged directory into another": ("d", "both/d"),
    "a lower directory into a merged one": ("lower", "d/lower"),
    "a directory over an empty one": ("d", "empty"),
    "a directory over a full one": ("d", "both"),
    "a directory over a file": ("d", "f"),
    "a file over a directory": ("f", "d"),
    "a directory into itself": ("d", "d/sub/d"),
    "a name to itself": ("f", "f"),
    "a directory to itself": ("d", "d"),
    "nothing": ("missing", "new"),
    "into nothing": ("f", "missing/f"),
    "over its own parent": ("d/sub", "d"),
}


@pytest.mark.on("overlay", "unionfuse")
@pytest.mark.parametrize("case", RENAMES)
def test_rename_does_what_a_plain_directory_does(workshop: Workshop, case: str) -> None:
    old, new = RENAMES[case]
    both_ways(workshop, lambda root: os.rename(root / old, root / new))


@pytest.mark.on("overlay", "unionfuse")
@pytest.mark.parametrize(
    "pair",
    [("f", "g"), ("f", "d"), ("d", "lower"), ("d", "both"), ("lower", "s"), ("f", "missing"),
     ("d/base", "lower/file"), ("d/sub", "both"), ("empty", "d"), ("d", "d/sub"), ("f", "w")],
)  # fmt: skip
def test_exchange(workshop: Workshop, pair: tuple[str, str]) -> None:
    old, new = pair
    both_ways(workshop, lambda root: linux.renameat2(root / old, root / new, linux.RENAME_EXCHANGE))


@pytest.mark.on("overlay", "unionfuse")
@pytest.mark.parametrize("pair", [("f", "g"), ("f", "new"), ("d", "both"), ("d", "n"), ("f", "w")])
def test_noreplace(workshop: Workshop, pair: tuple[str, str]) -> None:
    old, new = pair
    both_ways(
        workshop, lambda root: linux.renameat2(root / old, root / new, linux.RENAME_NOREPLACE)
    )


@pytest.mark.on("overlay", "unionfuse")
def test_flags_that_cannot_be(workshop: Workshop) -> None:
    tree = workshop(*STACK)
    for flags in (
        linux.RENAME_WHITEOUT,
        linux.RENAME_NOREPLACE | linux.RENAME_EXCHANGE,
        1 << 10,
    ):
        with pytest.raises(OSError) as caught:
            linux.renameat2(tree / "f", tree / "new", flags)
        assert caught.value.errno == errno.EINVAL
    assert (tree / "f").exists() and not (tree / "new").exists()


def _many_moves(root) -> None:
    os.rename(root / "d", root / "d2")
    os.mkdir(root / "d")
    (root / "d/own").write_text("own")
    os.rename(root / "d2/sub", root / "d/sub")
    os.rename(root / "d2", root / "both/d3")
    (root / "both/d3/base").write_text("written after two moves")
    os.unlink(root / "both/d3/top")
    os.rename(root / "both", root / "all")
    os.rename(root / "lower/in", root / "all/d3/in")
    os.rename(root / "lower", root / "in")
    os.rename(root / "all/d3/in/ner", root / "ner")
    os.rename(root / "d/sub/deep", root / "in/deep")


def _swap_by_three(root) -> None:
    os.rename(root / "d", root / "tmp")
    os.rename(root / "lower", root / "d")
    os.rename(root / "tmp", root / "lower")
    (root / "d/file").write_text("1")
    (root / "lower/base").write_text("2")
    (root / "lower/file").write_text("3")


def _move_and_empty(root) -> None:
    os.rename(root / "d", root / "both/d")
    os.rename(root / "both/d/sub", root / "sub")
    for name in ("top", "base"):
        os.unlink(root / "both/d" / name)
    os.rmdir(root / "both/d")
    os.rename(root / "sub", root / "both/d")
    os.mkdir(root / "d")


def _there_and_back(root) -> None:
    os.rename(root / "d", root / "e")
    os.rename(root / "e", root / "d")
    os.rename(root / "d/sub", root / "sub")
    os.rename(root / "sub", root / "d/sub")
    os.rename(root / "f", root / "f2")
    os.rename(root / "f2", root / "f")


def _exchange_twice(root) -> None:
    linux.renameat2(root / "d", root / "both", linux.RENAME_EXCHANGE)
    linux.renameat2(root / "d/x", root / "both/top", linux.RENAME_EXCHANGE)
    linux.renameat2(root / "both/sub", root / "d/y", linux.RENAME_EXCHANGE)


@pytest.mark.doors
@pytest.mark.on("overlay", "unionfuse")
@pytest.mark.parametrize(
    "moves", [_many_moves, _swap_by_three, _move_and_empty, _there_and_back, _exchange_twice]
)
def test_many_moves_of_directories(workshop: Workshop, moves) -> None:
    both_ways(workshop, moves)


@pytest.mark.on("overlay", "unionfuse")
def test_a_moved_directory_keeps_its_open_files_and_its_inode(workshop: Workshop) -> None:
    tree = workshop(*STACK)
    inode, inner = os.stat(tree / "d").st_ino, os.stat(tree / "d/base").st_ino
    directory = os.open(tree / "d", os.O_RDONLY)
    with open(tree / "d/base") as reader, open(tree / "d/sub/deep", "a") as writer:
        os.rename(tree / "d", tree / "both/d")
        writer.write("+")
        assert reader.read() == "base"
        assert sorted(os.listdir(directory)) == ["base", "sub", "top"]
        os.close(os.open("made", os.O_CREAT | os.O_WRONLY, dir_fd=directory))
    os.close(directory)
    assert (tree / "both/d/sub/deep").read_text() == "deep+"
    assert (tree / "both/d/made").exists()
    assert os.stat(tree / "both/d").st_ino == inode
    assert os.stat(tree / "both/d/base").st_ino == inner
    tree.remount()
    assert os.stat(tree / "both/d").st_ino == inode
    assert os.stat(tree / "both/d/base").st_ino == inner


@pytest.mark.on("unionfuse")
@pytest.mark.parametrize("moves", [_many_moves, _swap_by_three, _move_and_empty, _exchange_twice])
@pytest.mark.parametrize("options", [{"userxattr": None}, {"redirect_dir": "off"}])
def test_moves_without_redirects(workshop: Workshop, moves, options) -> None:
    both_ways(workshop, moves, options=options)


@pytest.mark.on("unionfuse")
def test_moves_without_redirects_are_full_copies(workshop: Workshop) -> None:
    tree = workshop(*STACK, options={"userxattr": None})
    os.rename(tree / "d", tree / "moved")
    seen = tree.snapshot()
    tree.unmount()
    for directory in tree.upper.rglob("*"):
        names = os.listxattr(directory, follow_symlinks=False)
        assert not any(name.endswith(".redirect") for name in names)
    tree.mount()
    tree.remount("overlay", {"userxattr": None})
    assert_equal(tree.snapshot(), seen)


@pytest.mark.on("overlay", "unionfuse")
def test_redirects_are_the_kernels(workshop: Workshop) -> None:
    tree = workshop(*STACK)
    os.rename(tree / "lower", tree / "renamed")
    os.rename(tree / "d", tree / "both/elsewhere")
    assert os.getxattr(tree.upper / "renamed", "trusted.overlay.redirect") == b"lower"
    assert os.getxattr(tree.upper / "both/elsewhere", "trusted.overlay.redirect") == b"/d"


@pytest.mark.on("overlay", "unionfuse")
def test_redirects_in_lower_layers(workshop: Workshop) -> None:
    redirect = {"trusted.overlay.redirect": b"/a/old"}
    tree = workshop(
        {"new": Dir(xattrs=redirect), "new/top": "", "a/old": None},
        {"a/old/base": "base", "a/old/sub/x": "x"},
    )
    assert sorted(os.listdir(tree / "new")) == ["base", "sub", "top"]
    assert not (tree / "a/old").exists()
    (tree / "new/sub/x").write_text("changed")
    os.rename(tree / "new", tree / "a/newer")
    tree.remount()
    assert sorted(os.listdir(tree / "a/newer")) == ["base", "sub", "top"]
    assert (tree / "a/newer/sub/x").read_text() == "changed"


@pytest.mark.on("unionfuse")
@pytest.mark.parametrize(
    "value", [b"../../etc", b"/../etc", b"/etc/../../x", b"", b"/", b"a/b", b"\xff\x00x", b"//d"]
)
def test_a_hostile_redirect_leads_nowhere(workshop: Workshop, value: bytes) -> None:
    (workshop.directory / "etc").mkdir()
    (workshop.directory / "etc/secret").write_text("")
    tree = workshop(
        {"new": Dir(xattrs={"trusted.overlay.redirect": value}), "new/own": ""},
        {"d/x": "", "new/below": ""},
    )
    try:
        names = os.listdir(tree / "new")
    except OSError as error:
        assert error.errno in (errno.EIO, errno.ESTALE, errno.EINVAL)
    else:
        assert "secret" not in names and "passwd" not in names


@pytest.mark.on("overlay", "unionfuse")
def test_nofollow_refuses_redirects(workshop: Workshop) -> None:
    tree = workshop(
        {"new": Dir(xattrs={"trusted.overlay.redirect": b"/old"}), "new/top": ""},
        {"old/base": ""},
        options={"redirect_dir": "nofollow"},
    )
    with pytest.raises(OSError) as caught:
        os.listdir(tree / "new")
    assert caught.value.errno == errno.EPERM


def test_a_sticky_directory_and_setgid_move_along(workshop: Workshop) -> None:
    tree = workshop({"d": Dir(mode=0o3777, uid=4, gid=5), "d/x": ""})
    os.rename(tree / "d", tree / "e")
    info = os.stat(tree / "e")
    assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid) == (0o3777, 4, 5)


@pytest.mark.on("unionfuse", "unionfuse-pyfuse3", "unionfuse-indexed")
def test_redirects_inside_redirected_directories(workshop: Workshop) -> None:
    """A redirect that is a mere name means a sibling in what the parent stands for below."""
    options = {"metacopy": "on"}
    first = workshop(
        {"d/f": "data", "d/sub/f": "deep", "d/sub/s/x": "deeper"}, kind="overlay", options=options
    )
    os.chmod(first / "d/f", 0o600)
    os.chmod(first / "d/sub/f", 0o600)
    os.rename(first / "d", first / "d2")
    os.rename(first / "d2/sub", first / "d2/sub2")
    os.rename(first / "d2/f", first / "d2/f2")
    os.rename(first / "d2/sub2/s", first / "s")
    wanted = {"d2/f2": "data", "d2/sub2/f": "deep", "s/x": "deeper"}

    def check(tree: Mounted) -> None:
        assert {path: (tree / path).read_text() for path in wanted} == wanted
        assert not (tree / "d").exists() and not (tree / "d2/sub").exists()

    check(first)
    first.remount(workshop.kind)
    check(first)
    first.unmount()
    lowers = [first.upper, *first.stack.lowers]
    again = workshop.mount(Stack.around(workshop.directory / "again", lowers), options=options)
    check(again)
    os.chmod(again / "d2/sub2/f", 0o640)
    (again / "s/x").write_text("deeper")
    os.rename(again / "d2/sub2", again / "d2/sub3")
    os.rename(again / "d2/sub3", again / "d2/sub2")
    check(again)
    again.remount()
    check(again)


@pytest.mark.on("plain", "unionfuse")  # overlayfs says so of upper's directories only
@pytest.mark.parametrize("name", ["lower", "upper"])
def test_a_directory_that_another_was_moved_over_has_no_links(
    workshop: Workshop, name: str
) -> None:
    tree = workshop({"d/x": "1", "lower": Dir()})
    os.mkdir(tree / "upper")
    os.mkdir(tree / "new")
    held = os.open(tree / name, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.rename(tree / "new", tree / name)
        assert os.fstat(held).st_nlink == 0
    finally:
        os.close(held)
