"""Listings that leave out what is known of files: who walks by name pays for names alone."""

import os
import subprocess
from collections.abc import Callable

import pytest
from harness.layers import HardLink, Symlink
from harness.mounts import Mounted, Workshop
from harness.snapshot import assert_equal
from harness.waiting import wait_until

pytestmark = [
    pytest.mark.on("unionfuse"),
    pytest.mark.through("unionfuse", "unionfuse-indexed"),
]

NAMES, DIRECTORIES = 20, 30
TOP = {f"d{number}/top": "t" for number in range(0, DIRECTORIES, 2)}
BASE = {
    **{f"d{d}/f{n}": "x" * n for d in range(DIRECTORIES) for n in range(NAMES)},
    **{f"d{d}/sub/link": Symlink("../f1") for d in range(DIRECTORIES)},
    "large/one": HardLink("d1/f1"),
    **{f"large/{number}": "x" for number in range(200)},
}


def find(tree: Mounted) -> set[str]:
    words = ["find", ".", "-name", "*"]
    found = subprocess.run(words, cwd=tree.root, check=True, capture_output=True, text=True)
    return set(found.stdout.split())


def list_all(tree: Mounted) -> None:
    subprocess.run(["ls", "-lR"], cwd=tree.root, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.doors
def test_find_is_told_of_directories_and_ls_of_everything(workshop: Workshop) -> None:
    tree = workshop(TOP, BASE, options={"stats": None})
    with tree.asked() as finding:
        found = find(tree)
    assert finding.get("LOOKUP", 0) == 0
    expected = workshop(TOP, BASE, kind="plain")
    assert found == find(expected)
    with tree.asked() as listing:
        list_all(tree)
    assert listing["READDIRPLUS"] > 0  # once some files were looked up, the rest came as ever

    def knows_all() -> bool:
        with tree.asked() as again:
            list_all(tree)
        return again.get("LOOKUP", 0) == 0

    wait_until(knows_all)
    assert_equal(expected.snapshot(), tree.snapshot(), ("a plain directory", "the mount"))


def test_a_large_directory_comes_as_a_whole(workshop: Workshop) -> None:
    tree = workshop(TOP, BASE, options={"stats": None})
    find(tree)
    with tree.asked() as requests:
        for number in range(200):
            assert os.stat(tree / f"large/{number}").st_size == 1
    assert requests.get("LOOKUP", 0) == 0


def test_names_come_with_the_inode_numbers_that_stat_shows(workshop: Workshop) -> None:
    tree = workshop(TOP, BASE)
    for number in range(DIRECTORIES):
        with os.scandir(tree / f"d{number}") as entries:
            listed = {entry.name: entry.inode() for entry in entries}
        assert len(listed) > NAMES
        for name, inode in listed.items():
            assert os.lstat(tree / f"d{number}" / name).st_ino == inode


CHANGES: dict[str, Callable[[Mounted], object]] = {
    "write": lambda tree: (tree / "d5/f3").write_text("longer than it was"),
    "unlink": lambda tree: (tree / "d5/f3").unlink(),
    "rename": lambda tree: (tree / "d5/f3").rename(tree / "d6/moved"),
    "make": lambda tree: (tree / "d5/new").mkdir(),
    "link": lambda tree: os.link(tree / "d5/f3", tree / "d7/linked"),
    "replace": lambda tree: (tree / "d5/f3").replace(tree / "d5/f4"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_show_after_a_listing_without_files(workshop: Workshop, change: str) -> None:
    tree, expected = workshop(TOP, BASE), workshop(TOP, BASE, kind="overlay")
    for each in (tree, expected):
        find(each)
        CHANGES[change](each)
    assert find(tree) == find(expected)
    list_all(tree)
    assert_equal(expected.snapshot(), tree.snapshot(), ("overlayfs", "the mount"))


def test_listings_are_right_while_others_look_names_up(workshop: Workshop) -> None:
    tree = workshop(TOP, BASE)
    expected = find(workshop(TOP, BASE, kind="plain"))
    programs = [
        subprocess.Popen(["ls", "-lR"], cwd=tree.root, stdout=subprocess.DEVNULL) for _ in range(3)
    ]
    for _ in range(5):
        assert find(tree) == expected
    for program in programs:
        assert program.wait(60) == 0
    wait_until(lambda: find(tree) == expected)
