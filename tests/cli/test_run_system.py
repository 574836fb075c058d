"""`system`, and what happens when there is no room left."""

import json
import subprocess
from pathlib import Path

from harness.containers import Box, nothing_left


def test_info(box: Box) -> None:
    box.start("one")
    facts = json.loads(box.out("system", "info", "--format", "json"))[0]
    assert (facts["Containers"], facts["ContainersRunning"], facts["Images"]) == (1, 1, 1)
    assert {"crun", "runc"} <= set(facts["Runtimes"])
    assert facts["DockerRootDir"] == str(box.root)
    assert "Containers: 1" in box.out("info").splitlines()


def test_df(box: Box) -> None:
    box.start("big", "-v", "vol:/v", command="head -c 300000 /dev/zero > /file; sleep 1000")
    box("exec", "big", "sh", "-c", "while [ $(stat -c %s /file) -lt 300000 ]; do sleep 0.1; done")
    rows = {
        row["Type"]: row
        for row in map(json.loads, box.out("system", "df", "--format", "json").splitlines())
    }
    assert rows["Containers"]["TotalCount"] == rows["Containers"]["Active"] == "1"
    assert rows["Containers"]["Size"].startswith("300")
    assert rows["Local Volumes"]["Active"] == "1"
    assert rows["Images"]["Reclaimable"].startswith("0B")


def test_df_one_by_one(box: Box) -> None:
    box("create", "--name", "one", "-v", "vol:/v", "busybox", "true")
    detail = json.loads(box.out("system", "df", "-v", "--json"))
    assert [(row["Name"], row["Links"]) for row in detail["Volumes"]] == [("vol", "1")]
    assert [(row["Names"], row["LocalVolumes"]) for row in detail["Containers"]] == [("one", "1")]
    (image,) = detail["Images"]
    assert (image["Repository"], image["Containers"]) == ("busybox", "1")
    assert (image["SharedSize"], image["UniqueSize"]) == ("0B", image["Size"])
    lines = box.out("system", "df", "-v").splitlines()
    for title in ("Images", "Containers", "Local Volumes"):
        assert f"{title} space usage:" in lines
    assert "no template" in box("system", "df", "-v", "--format", "{{.ID}}", code=1).stderr


def test_prune_by_label(box: Box) -> None:
    for value in ("keep", "go"):
        box("create", "--name", value, "-l", f"what={value}", "busybox")
        box("volume", "create", "--label", f"what={value}", value)
        box("network", "create", "--label", f"what={value}", value)
    box("volume", "prune", "-a", "-f", "--filter", "label=what=go")
    assert box.out("volume", "ls", "-q").split() == ["keep"]
    box("network", "prune", "-f", "--filter", "label=what=other")
    box("system", "prune", "-f", "--filter", "label=what=go")
    assert box.names("-a") == ["keep"]
    networks = set(box.out("network", "ls", "--format", "{{.Name}}").split())
    assert networks & {"keep", "go"} == {"keep"}
    assert "there are: label" in box("network", "prune", "-f", "--filter", "a=b", code=1).stderr
    box("volume", "rm", "keep")
    box("network", "rm", "keep")


def test_prune(box: Box) -> None:
    box.start("lives", "-v", "/anonymous")
    box("create", "--name", "idle", "-v", "/other", "busybox")
    box("network", "create", "unused")
    assert "--force" in box("system", "prune", code=1).stderr
    out = box.out("system", "prune", "-f", "--volumes")
    assert "Deleted Networks:\nunused" in out
    assert box.names("-a") == ["lives"]
    assert len(box.out("volume", "ls", "-q").split()) == 1
    assert box.out("images", "-q") != ""


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "full", str(place)], check=True)
    try:
        box = Box(place)
        box.image("busybox")
        box.sh("true")
        subprocess.run(
            ["dd", "if=/dev/zero", f"of={place}/ballast", "bs=4k"], stderr=subprocess.DEVNULL
        )
        done = box("run", "--name", "late", "--network", "none", "busybox", "true", code=125)
        assert done.stderr.count("\n") == 1
        # The kernel's words, or SQLite's, whoever meets with it first.
        said = ("No space left", "disk I/O error", "database or disk is full")
        assert any(words in done.stderr for words in said), done.stderr
        assert "room" in done.stderr
        (place / "ballast").unlink()
        assert box.names("-a") == []
        assert not list((box.root / "containers").glob(".new-*"))
        box.sh("true", "--name", "late")
        assert nothing_left(box)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
