"""The survey behind the explore page: kinds of change, and bytes that nobody sees."""

import itertools
import json
import os
import shutil
import stat
import tempfile
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unionimage.chain import Chain
from unionimage.explore import page
from unionimage.explore.survey import Entries, LayerSurvey, readable, survey


@dataclass
class Layer:
    directory: Path
    diff_id: str = "sha256:0"


def make(directory: Path, files: dict[str, int | str | None]) -> Layer:
    """A layer: None is a directory, a number a file of that size, a string a link's target."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir(exist_ok=True)
        elif isinstance(content, str):
            path.symlink_to(content)
        else:
            path.write_bytes(bytes(content))
    directory.mkdir(exist_ok=True)
    return Layer(directory)


def changes(entries: Entries) -> dict[str, str]:
    """path → letter."""
    found, above = {}, []
    for entry in entries:
        above[entry.depth - 1 :] = [entry.name.decode()]
        found["/".join(above)] = entry.change
    return found


def test_added_changed_deleted_and_wasted(tmp_path: Path) -> None:
    base = make(
        tmp_path / "0",
        {"etc/a": 100, "etc/b": 20, "lib/x/1": 7, "lib/x/2": 8, "file": 50, "dir/in": 9, "l": "a"},
    )
    top = make(
        tmp_path / "1",
        {"etc/a": 130, "etc/.wh.b": 0, "etc/c": 1, "lib/.wh.x": 0, "file/now/dir": 2, "dir": 3},
    )
    again = make(tmp_path / "2", {"etc/b": 5, "etc/.wh.a": 0})
    found = survey([base, top, again])
    assert set(changes(found.layers[0].entries).values()) == {"A"}
    assert changes(found.layers[1].entries) == {
        "dir": "C",
        "etc": "=",
        "etc/a": "C",
        "etc/b": "D",
        "etc/c": "A",
        "file": "C",
        "file/now": "A",
        "file/now/dir": "A",
        "lib": "=",
        "lib/x": "D",
        "lib/x/1": "D",
        "lib/x/2": "D",
    }
    assert changes(found.layers[2].entries) == {"etc": "=", "etc/a": "D", "etc/b": "A"}
    wasted = {
        path.decode(): (list(one.layers), one.total, one.hidden)
        for path, one in found.wasted.items()
    }
    assert wasted == {
        "etc/a": ([0, 1, 2], 230, 230),
        "etc/b": ([0, 1], 25, 20),
        "lib/x/1": ([0, 1], 7, 7),
        "lib/x/2": ([0, 1], 8, 8),
        "file": ([0, 1], 50, 50),
        "dir/in": ([0, 1], 9, 9),
    }
    assert [layer.size for layer in found.layers] == [194, 136, 5]


def test_an_opaque_directory_hides_what_is_below(tmp_path: Path) -> None:
    base = make(tmp_path / "0", {"d/s/old": 10, "d/s/both": 4, "d/gone": 3})
    top = make(tmp_path / "1", {"d/.wh..wh..opq": 0, "d/s/both": 5})
    found = survey([base, top])
    assert changes(found.layers[1].entries) == {
        "d": "=",
        "d/gone": "D",
        "d/s": "=",
        "d/s/both": "C",
        "d/s/old": "D",
    }
    assert found.hidden == 17


def test_hard_links_count_once_and_special_files_not_at_all(tmp_path: Path) -> None:
    layer = make(tmp_path / "0", {"a": 1000, "link": "a"})
    os.link(tmp_path / "0/a", tmp_path / "0/b")
    os.mkfifo(tmp_path / "0/fifo")
    found = survey([layer])
    assert {e.name: (e.kind, e.size) for e in found.layers[0].entries} == {
        b"a": ("f", 1000),
        b"b": ("h", 0),
        b"fifo": ("p", 0),
        b"link": ("l", 0),
    }
    assert list(found.layers[0].entries)[-1].target == b"a"


def test_a_file_costs_little_memory(tmp_path: Path) -> None:
    """200,000 of them have to fit into 100 MB."""
    count = 4000
    layers = []
    for number in "01":
        for folder in range(count // 20):
            (tmp_path / number / f"usr/share/package-{folder}").mkdir(parents=True)
            for file in range(20):
                path = tmp_path / number / f"usr/share/package-{folder}/name-{number}-{file}.txt"
                path.write_bytes(bytes(300))
        layers.append(Layer(tmp_path / number))
    survey(layers[:1])  # imports and the like
    tracemalloc.start()
    found = survey(layers)
    length = sum(len(piece) for layer in found.layers for piece in page.columns(layer))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert length > 40 * count
    assert most < 300 * 2 * count, most / count


@pytest.mark.parametrize("piece", [1, 3, 10_000])
def test_columns_are_the_same_in_pieces_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    files: dict[str, int | str | None] = {f"name-{n}/\N{SNOWMAN}'\"<": n for n in range(200)}
    layer = survey([make(tmp_path / "0", files)]).layers[0]
    monkeypatch.setattr(page, "PIECE", piece)
    for one in (layer, LayerSurvey("empty", Entries())):
        found = json.loads("".join(page.columns(one)))
        entries = list(one.entries)
        assert found["names"] == "/".join(entry.name.decode() for entry in entries)
        assert found["bytes"] == [entry.size for entry in entries]
        assert found["mode"] == [entry.mode for entry in entries]
        assert [found["owners"][number] for number in found["owner"]] == ["0:0"] * len(entries)
        assert found["kind"] == "".join(entry.kind for entry in entries)


NAMES = st.sampled_from("abc")
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
LAYER = st.dictionaries(PATHS, st.one_of(st.none(), st.integers(0, 500)), max_size=6)
WHITEOUTS = st.lists(PATHS, max_size=3)


def build(directory: Path, files: dict[str, int | None], whiteouts: list[str]) -> Layer:
    """A layer out of what fits together of `files` and `whiteouts`."""
    directory.mkdir()
    for name, content in sorted(files.items()):
        path = directory / name
        if any(parent.is_file() for parent in path.parents):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir(exist_ok=True)
        elif not path.is_dir():
            path.write_bytes(bytes(content))
    for name in whiteouts:
        path = directory / name
        if path.parent.is_dir() and not path.exists():
            (path.parent / f".wh.{path.name}").touch()
        elif path.is_dir():
            (path / ".wh..wh..opq").touch()
    return Layer(directory)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(LAYER, WHITEOUTS), min_size=1, max_size=4))
def test_what_is_not_wasted_is_what_the_merged_tree_shows(layers: list[Any]) -> None:
    folder = Path(tempfile.mkdtemp(prefix="survey-"))
    try:
        made = [build(folder / str(n), *layer) for n, layer in enumerate(layers)]
        found = survey(made)
        with Chain([layer.directory for layer in reversed(made)]) as chain:
            shown = sum(
                chain.status(one.places[0]).st_size
                for one in chain.walk()
                if one.kind == stat.S_IFREG
            )
        assert found.size - found.hidden == shown
        assert found.size == sum(
            file.stat().st_size
            for layer in made
            for file in layer.directory.rglob("*")
            if file.is_file()
        )
        for entry, after in itertools.pairwise(found.layers[-1].entries):
            assert after.depth <= entry.depth + 1
    finally:
        shutil.rmtree(folder)


@given(st.binary(min_size=1, max_size=40))
def test_every_name_can_be_shown(name: bytes) -> None:
    assert readable(name).isprintable()


def test_names_are_shown_as_they_are_where_they_can_be() -> None:
    assert readable("café ☕".encode()) == "café ☕"
    assert readable(b"\xff\x1b[31m\n") == "\\xff\\x1b[31m\\x0a"
