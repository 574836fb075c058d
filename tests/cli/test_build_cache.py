"""What `unionfuse build` does again and what not, in which order, and after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness.building import (
    PROGRAM,
    Builder,
    command_lines,
    context,
    made,
    write_files,
)
from harness.waiting import wait_until
from unionimage.store import Store


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(tmp_path_factory.mktemp("build"))


# ---- the cache


def test_the_cache_goes_by_content_and_mode(builder: Builder, tmp_path: Path) -> None:
    context(tmp_path, "COPY file /f\nRUN echo 1 > /one\nCMD x\n", file="unique to this test")
    assert made(builder, tmp_path) == ["COPY file /f", "RUN echo 1 > /one"]
    first = builder.build(tmp_path)
    os.utime(tmp_path / "file", (1, 1))
    assert made(builder, tmp_path) == [] and builder.build(tmp_path) == first
    (tmp_path / "file").chmod(0o600)
    assert made(builder, tmp_path) == ["COPY file /f", "RUN echo 1 > /one"]
    (tmp_path / "file").write_text("other")
    assert made(builder, tmp_path) == ["COPY file /f", "RUN echo 1 > /one"]
    assert made(builder, "--no-cache", tmp_path) == ["COPY file /f", "RUN echo 1 > /one"]


def test_a_changed_line_builds_from_there_on(builder: Builder, tmp_path: Path) -> None:
    context(tmp_path, "RUN echo a1 > /a\nRUN echo a2 > /b\nRUN echo a3 > /c\n")
    assert len(made(builder, tmp_path)) == 3
    context(tmp_path, "RUN echo a1 > /a\nRUN echo other > /b\nRUN echo a3 > /c\n")
    assert made(builder, tmp_path) == ["RUN echo other > /b", "RUN echo a3 > /c"]
    context(tmp_path, "RUN echo a1 > /a\nENV X=1\nRUN echo a2 > /b\n")
    assert made(builder, tmp_path) == ["RUN echo a2 > /b"], "the environment counts"


def test_arguments_count_where_they_are_declared(builder: Builder, tmp_path: Path) -> None:
    context(tmp_path, "RUN echo v0 > /a\nARG V\nRUN echo v$V > /b\n")
    made(builder, "--build-arg", "V=1", tmp_path)
    assert made(builder, "--build-arg", "V=2", tmp_path) == ["RUN echo v$V > /b"]
    assert made(builder, "--build-arg", "V=1", tmp_path) == []
    proxy = ("--build-arg", "http_proxy=http://127.0.0.1:9")
    assert made(builder, "--build-arg", "V=1", *proxy, tmp_path) == []


def test_a_failing_step_shows_itself_and_keeps_the_others(builder: Builder, tmp_path: Path) -> None:
    context(tmp_path, "RUN echo f1 > /a\nRUN echo out; echo err >&2; \\\n  exit 7\nRUN never\n")
    said = builder.failing(tmp_path)
    last = said.splitlines()[-1]
    assert last.startswith("unionfuse build: Dockerfile, line 3:") and "exit code 7" in last
    assert "\nout\nerr\n" in said and "   3 | >>> RUN echo out" in said and "   4 | >>>" in said
    context(tmp_path, "RUN echo f1 > /a\nRUN true\n")
    assert made(builder, tmp_path) == ["RUN true"]


def test_copies_between_stages_go_by_content(builder: Builder, tmp_path: Path) -> None:
    text = "ARG N\nRUN echo $N > /other; echo same > /same\nFROM base\nCOPY --from=0 /same /same\n"
    context(tmp_path, text + "RUN echo after > /after\n")
    assert len(made(builder, "--build-arg", "N=1", tmp_path)) == 3
    assert len(made(builder, "--build-arg", "N=2", tmp_path)) == 1
    assert made(builder, "--build-arg", "N=2", tmp_path) == []


def test_cached_layers_that_were_collected_are_made_again(builder: Builder, tmp_path: Path) -> None:
    builder.build(context(tmp_path, "RUN echo collected > /c\n"), "-t", "collected")
    with Store.open(builder.root) as store:
        store.release("build-cache")
        found = store.image("collected")
        for name in found.names:
            store.untag(name)
        store.delete_image(found)
        store.collect()
        assert not store.has_layer(found.diff_ids[-1])
    assert made(builder, tmp_path) == ["RUN echo collected > /c"]


# ---- stages


def test_the_cache_is_counted_and_given_up(builder: Builder, tmp_path: Path) -> None:
    def run(*words: str) -> str:
        return builder.run(*words).stdout

    run("builder", "prune", "-a", "-f")
    dockerfile = "RUN head -c 300000 /dev/zero > /x && echo given up\n"
    dockerfile += "RUN --mount=type=cache,target=/c head -c 200000 /dev/zero | tee /c/y > /y\n"
    context(tmp_path, dockerfile)
    image = builder.build(tmp_path)
    df = {row["Type"]: row for row in map(json.loads, run("system", "df", "--json").splitlines())}
    row = df["Build Cache"]
    assert (row["TotalCount"], row["Active"], row["Size"][:2]) == ("3", "2", "20")
    detail = json.loads(run("system", "df", "-v", "--json"))["BuildCache"]
    assert sorted(one["Shared"] for one in detail) == ["false", "true", "true"]
    assert "Build cache space usage:" in run("system", "df", "-v")

    said = run("builder", "prune", "-f", "--filter", "type=regular")  # an image has these
    assert said == "Total reclaimed space: 0B\n" and made(builder, tmp_path) == []
    run("rmi", "-f", image)  # both steps and the mount are the cache's alone now: 700 kB
    assert "Deleted" not in run("builder", "prune", "-f", "--filter", "until=1h")
    assert "Deleted" not in run("builder", "prune", "-f", "--keep-storage", "1g")
    said = run("builder", "prune", "-f", "--keep-storage", "450k")
    assert said.splitlines()[-1].startswith("Total reclaimed space: 300")
    assert made(builder, tmp_path)[0].startswith("RUN head")
    run("builder", "prune", "-a", "-f")
    assert json.loads(run("system", "df", "-v", "--json"))["BuildCache"] == []
    for mistake in ("soon", "inf", "nan"):  # told also where there is nothing to prune
        done = builder.run("builder", "prune", "-f", "--filter", f"until={mistake}", check=False)
        assert done.returncode == 1 and f"until= '{mistake}': write a time" in done.stderr


def test_only_needed_stages_are_built(builder: Builder, tmp_path: Path) -> None:
    text = "RUN false\nFROM base AS wanted\nRUN echo w > /w\nFROM nowhere.invalid/none AS last\n"
    image = builder.build(context(tmp_path, text), "--target", "wanted")
    assert "w" in builder.tree(image)
    assert "'nope' not found" in builder.failing(tmp_path, "--target", "nope")


def test_independent_stages_run_side_by_side(builder: Builder, tmp_path: Path) -> None:
    """Each of two stages waits until the other has begun; one after the other would fail."""
    wait = "for i in $(seq 100); do test -e /c/{} && exit 0; sleep 0.1; done; exit 1"
    mount = "--mount=type=cache,id=meet,target=/c"
    text = (
        f"RUN {mount} touch /c/one; {wait.format('two')}\n"
        f"FROM base\nRUN {mount} touch /c/two; {wait.format('one')}\n"
        "FROM base\nCOPY --from=0 /etc/passwd /a\nCOPY --from=1 /etc/passwd /b\n"
    )
    builder.build(context(tmp_path, text))


def test_a_failing_stage_stops_the_others(builder: Builder, tmp_path: Path) -> None:
    text = "RUN sleep 60\nFROM base\nRUN sleep 0.5; exit 4\nFROM base\n"
    text += "COPY --from=0 /etc/passwd /a\nCOPY --from=1 /etc/passwd /b\n"
    began = time.monotonic()
    assert "exit code 4" in builder.failing(context(tmp_path, text)).splitlines()[-1]
    assert time.monotonic() - began < 20


# ---- reproducible layers


def test_source_date_epoch_gives_the_same_bytes(builder: Builder, tmp_path: Path) -> None:
    text = "COPY dir /dir\nRUN echo x > /new && touch -d '1999-01-01 00:00:00' /old\n"
    text += "WORKDIR /w\nCOPY <<E /e\nE\n"
    (tmp_path / "dir").mkdir()
    write_files(tmp_path / "dir", {"a": "1", "sub/b": "2"})
    context(tmp_path, text)
    environment = {"SOURCE_DATE_EPOCH": "1000000000"}
    first = builder.build(tmp_path, "--no-cache", env=environment)
    for path in [*tmp_path.rglob("*")]:
        os.utime(path, (5, 5))
    time.sleep(1.1)
    second = builder.build(tmp_path, "--no-cache", "--build-arg", "SOURCE_DATE_EPOCH=1000000000")
    mine = len(builder.config("base").diff_ids)
    one, two = builder.config(first), builder.config(second)
    assert one.diff_ids[mine:] == two.diff_ids[mine:]
    assert one.created == two.created == "2001-09-09T01:46:40Z"
    assert first == second
    other = builder.build(tmp_path, env={"SOURCE_DATE_EPOCH": "1000000001"})
    assert builder.config(other).diff_ids[mine:] != one.diff_ids[mine:]


# ---- killed builds


@pytest.mark.parametrize("spawner", [False, True])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_build_leaves_nothing_behind(
    builder: Builder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    number: signal.Signals,
    spawner: bool,
) -> None:
    """Neither a container, nor a daemon, nor staged files; the finished step stays cached."""
    sockets = tmp_path / "run"
    sockets.mkdir()
    request.addfinalizer(lambda: shutil.rmtree(sockets))  # a spawner ends with it
    monkeypatch.setenv("UNIONFUSE_RUNROOT", str(sockets))
    if spawner:
        code = "from unionimage import spawn; spawn.start()"
        subprocess.run([sys.executable, "-c", code], check=True)
        wait_until(lambda: list(sockets.glob("spawner-*")), 30, "the spawner")
    tmp_path = tmp_path / "context"
    tmp_path.mkdir()
    first = f"RUN echo k1 {number} {spawner} > /k1\n"
    context(tmp_path, f"{first}RUN sleep 77\n")
    process = subprocess.Popen(
        [PROGRAM, "--root", str(builder.root), "build", "--progress", "plain", str(tmp_path)],
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if b"RUN sleep 77" in line:
            break
    wait_until(lambda: any(b"sleep\x0077" in words for words in command_lines()), 20)
    process.send_signal(number)
    process.wait()
    process.stderr.close()
    staging = os.fsencode(builder.root / "staging")
    wait_until(lambda: not any(b"sleep\x0077" in w or staging in w for w in command_lines()), 20)
    second = f"RUN echo k2 {number} {spawner} > /k2"
    context(tmp_path, f"{first}{second}\n")
    assert made(builder, tmp_path) == [second]
    assert os.listdir(staging) == []


KILLING = """
import os, sys
from harness.killing import kill_at_every_step
from unionimage.cli import main
root, context = sys.argv[1:]
options = ["-q", "-t", "killed", "--driver", "overlay", "--no-cache"]
build = ["--root", root, "build", *options, context]
for step in kill_at_every_step(lambda: main(build), 12):
    assert main(["--root", root, "check"]) == 0, step
"""


def test_a_build_killed_at_any_step_leaves_a_store_that_is_whole(
    builder: Builder, tmp_path: Path
) -> None:
    text = "COPY file /new/file\nWORKDIR /new/dir\nRUN echo x > /ran && rm /etc/group\nCMD x\n"
    context(tmp_path / "c", text, file="f")
    command = [sys.executable, "-c", KILLING, str(builder.root), str(tmp_path / "c")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "new/file" in builder.tree("killed")
    staging = os.fsencode(builder.root / "staging")
    wait_until(lambda: not any(staging in words for words in command_lines()), 20)
    assert builder.run("images", "-q").stdout.split()
