"""`unionfuse layers`: another stack under a running mount. The oracle is a fresh mount of it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from harness.layers import Dir, HardLink, Layer, build
from harness.mounts import Mounted, Stack, Workshop
from harness.snapshot import assert_equal

pytestmark = [
    pytest.mark.on("unionfuse"),
    # Layers are changed by way of the keeper, which needs the express lane.
    pytest.mark.through("unionfuse", "unionfuse-indexed"),
    pytest.mark.timeout(120),
]

BASE: Layer = {
    "f": "base",
    "only-base": "base",
    "d/a": "base a",
    "d/b": "base b",
    "d/sub/x": "base x",
    "gone/x": "base",
    "replaced/x": "base",
    "changed": "base",
}
ADDED: Layer = {
    "f": "added, and longer",
    "only-added": "added",
    "d/b": "added b",
    "d/c": "added c",
    "gone": None,
    "replaced": "a file now",
    "new/deep/y": "added",
    "cut": Dir(opaque="kernel"),
    "cut/z": "added",
}
BASE_CUT: Layer = {**BASE, "cut/w": "base", "cut/v": "base"}


def layers(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("unionfuse"), "layers", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def change_something(root: Path) -> None:
    (root / "changed").write_text("by upper")
    (root / "d/a").chmod(0o600)
    (root / "d/mine").write_text("mine")
    (root / "d/sub/x").unlink()
    os.rename(root / "only-base", root / "renamed")


def look_everywhere(root: Path) -> None:
    """Have the kernel remember names that are there, names that are not, and listings."""
    for name in ("only-added", "d/c", "new", "new/deep", "cut/z", "gone/y", "f", "d/b"):
        (root / name).exists()
    subprocess.run(["ls", "-lR", root], check=True, stdout=subprocess.DEVNULL)
    for path in root.rglob("*"):
        if path.is_file():
            path.read_bytes()


def fresh(workshop: Workshop, tree: Mounted, lowers: list[Path]) -> Mounted:
    """The same upper over other layers, mounted by kernel overlayfs at another place."""
    base = workshop.directory / f"fresh{len(list(workshop.directory.glob('fresh*')))}"
    stack = Stack.around(base, lowers)
    for name in ("upper", "work"):
        os.rmdir(base / name)
        subprocess.run(["cp", "-a", tree.stack.base / name, base / name], check=True)
    return workshop.mount(stack, kind="overlay")


def assert_shows(workshop: Workshop, tree: Mounted, lowers: list[Path]) -> None:
    oracle = fresh(workshop, tree, lowers)
    assert_equal(oracle.snapshot(), tree.snapshot(), ("a fresh mount", "after the change"))


@pytest.mark.parametrize("touch", [lambda root: None, change_something], ids=["clean", "changed"])
def test_a_layer_comes_and_goes(workshop: Workshop, touch: Callable[[Path], None]) -> None:
    tree = workshop(BASE_CUT)
    added = build(workshop.directory / "added", ADDED)
    base = tree.stack.lowers[0]
    touch(tree.root)
    look_everywhere(tree.root)
    numbers = {name: (tree / name).stat().st_ino for name in ("d", "d/a", "d/sub", "changed")}
    for _ in range(2):
        said = layers("add", tree.root, added)
        assert (said.returncode, said.stderr) == (0, "")
        assert layers("ls", tree.root).stdout.splitlines() == [str(added), str(base)]
        assert_shows(workshop, tree, [added, base])
        assert (tree / "f").read_text() == "added, and longer"
        look_everywhere(tree.root)
        said = layers("remove", tree.root, added)
        assert (said.returncode, said.stderr) == (0, "")
        assert layers("ls", tree.root).stdout.splitlines() == [str(base)]
        assert_shows(workshop, tree, [base])
        assert (tree / "f").read_text() == "base"
        look_everywhere(tree.root)
        assert {name: (tree / name).stat().st_ino for name in numbers} == numbers


def test_below_another_layer(workshop: Workshop) -> None:
    tree = workshop({"f": "top"}, {"f": "base", "g": "base"})
    added = build(workshop.directory / "added", {"f": "added", "g": "added", "h": "added"})
    top, base = tree.stack.lowers
    (tree / "h").exists()
    assert layers("add", tree.root, added, "--below", top).returncode == 0
    assert layers("ls", tree.root).stdout.splitlines() == [str(top), str(added), str(base)]
    assert [(tree / name).read_text() for name in "fgh"] == ["top", "added", "added"]


def test_what_is_open_stays_open(workshop: Workshop) -> None:
    tree = workshop(BASE)
    added = build(workshop.directory / "added", ADDED)
    with (
        open(tree / "f") as hidden,
        open(tree / "only-base") as shown,
        open(tree / "new", "w+") as mine,
        open(tree / "gone/x") as deleted,
    ):
        here = os.open(tree / "d", os.O_RDONLY | os.O_DIRECTORY)
        os.unlink(tree / "new")  # the layer has a directory of this name
        assert layers("add", tree.root, added).returncode == 0
        assert (hidden.read(), shown.read(), deleted.read()) == ("base", "base", "base")
        mine.write("written")
        mine.seek(0)
        assert mine.read() == "written"
        assert sorted(os.listdir(here)) == ["a", "b", "c", "sub"]
        assert os.stat("c", dir_fd=here).st_size == len("added c")
        os.close(here)
        assert (tree / "f").read_text() == "added, and longer"
        with open(tree / "f") as of_added:
            said = layers("remove", tree.root, added)
            assert (
                said.returncode == 1 and "is open" in said.stderr and said.stderr.count("\n") == 1
            )
            assert (tree / "f").read_text() == "added, and longer"
            assert layers("remove", "--force", tree.root, added).returncode == 0
            assert of_added.read() == "added, and longer"
            assert (tree / "f").read_text() == "base"
    (tree / "f").write_text("and can be changed")
    assert (tree / "f").read_text() == "and can be changed"


def test_a_refused_change_leaves_nothing_open(workshop: Workshop) -> None:
    tree = workshop({"top/x": ""}, {f"d{n}/e/f": "" for n in range(5)})
    assert tree.daemon is not None
    names = [f"d{n}/e/f" for n in range(5)] + ["top/x"]
    opened = [os.open(tree / name, os.O_RDONLY) for name in names]
    descriptors = []
    for _ in range(3):
        said = layers("remove", tree.root, tree.stack.lowers[0])
        assert said.returncode == 1 and "is open" in said.stderr
        descriptors.append(len(os.listdir(f"/proc/{tree.daemon.pid}/fd")))
    for file in opened:
        os.close(file)
    assert descriptors[1:] == descriptors[:1] * 2


def test_a_working_directory_inside(workshop: Workshop) -> None:
    tree = workshop(BASE)
    added = build(workshop.directory / "added", ADDED)
    script = "read line; cat b c; read line; cat b; ls"
    inside = subprocess.Popen(
        ["sh", "-c", script], cwd=tree / "d", stdin=-1, stdout=-1, stderr=-1, text=True
    )
    assert inside.stdin is not None
    assert layers("add", tree.root, added).returncode == 0
    inside.stdin.write("go\n")
    inside.stdin.flush()
    assert inside.stdout is not None
    assert inside.stdout.read(len("added badded c")) == "added badded c"
    assert layers("remove", tree.root, added).returncode == 0
    output, errors = inside.communicate("go\n")
    assert (output, errors) == ("base ba\nb\nsub\n", "")


def test_the_daemon_is_killed_afterwards(workshop: Workshop) -> None:
    tree = workshop(BASE)
    added = build(workshop.directory / "added", ADDED)
    said = layers("add", tree.root, added)
    assert (said.returncode, said.stderr) == (0, "")
    assert tree.daemon is not None
    with open(tree / "only-added") as opened:
        os.kill(tree.daemon.pid, 9)
        assert opened.read() == "added"
        assert_shows(workshop, tree, [added, tree.stack.lowers[0]])
        assert layers("ls", tree.root).stdout.splitlines()[0] == str(added)


@pytest.mark.parametrize("touch", [lambda root: None, change_something], ids=["clean", "changed"])
def test_the_daemon_was_killed_before(workshop: Workshop, touch: Callable[[Path], None]) -> None:
    """What the kernel may know of the dead daemon's tables is carried over, hard links too."""
    tree = workshop(BASE_CUT | {"linked": "x", "d/linked too": HardLink("linked")})
    added = build(workshop.directory / "added", ADDED)
    look_everywhere(tree.root)
    with open(tree / "d/b") as opened, open(tree / "linked") as linked:
        numbers = {name: (tree / name).stat().st_ino for name in ("d", "d/a", "d/sub", "changed")}
        assert tree.daemon is not None
        os.kill(tree.daemon.pid, 9)
        touch(tree.root)
        said = layers("add", tree.root, added)
        assert (said.returncode, said.stderr) == (0, "")
        assert_shows(workshop, tree, [added, tree.stack.lowers[0]])
        assert {name: (tree / name).stat().st_ino for name in numbers} == numbers
        assert (opened.read(), linked.read()) == ("base b", "x")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["add", "MNT", "/does/not/exist"], "No such file"),
        (["add", "MNT", "MNT/d"], "in the mount itself"),
        (["add", "MNT", "/etc/hostname"], "not a directory"),
        (["add", "MNT", "BASE"], "a layer already"),
        (["remove", "MNT", "BASE"], "the only layer"),
        (["remove", "MNT", "/etc"], "no layer of this mount"),
        (["ls", "/etc"], "no union is mounted"),
    ],
)
def test_it_refuses_in_one_line(workshop: Workshop, words: list[str], reason: str) -> None:
    tree = workshop(BASE)
    places = {"MNT": str(tree.root), "BASE": str(tree.stack.lowers[0])}
    said = layers(*[place.replace("MNT", places["MNT"]).replace("BASE", places["BASE"])
                    for place in words])  # fmt: skip
    assert said.returncode == 1
    assert reason in said.stderr and said.stderr.count("\n") == 1 and "Traceback" not in said.stderr
    assert (tree / "f").read_text() == "base"


def test_a_lookup_index_is_in_the_way(workshop: Workshop) -> None:
    tree = workshop(BASE, kind="unionfuse-indexed")
    said = layers("add", tree.root, build(workshop.directory / "added", ADDED))
    assert said.returncode == 1 and "lookup index" in said.stderr
    assert (tree / "f").read_text() == "base"
