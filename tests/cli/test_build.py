"""`unionfuse build` as its users meet it: every instruction and flag, the cache, failures."""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.building import PROGRAM, Builder, write_files
from unionimage.store import Store


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(tmp_path_factory.mktemp("build"))


def context(path: Path, dockerfile: str, **files: str) -> Path:
    """A context with a Dockerfile on the image `base`; in names `__` stands for a dot."""
    path.mkdir(exist_ok=True)
    (path / "Dockerfile").write_text("FROM base\n" + dockerfile)
    write_files(path, {name.replace("__", "."): text for name, text in files.items()})
    return path


def added(builder: Builder, image: str) -> dict[str, str]:
    """What an image has that `base` has not, or has otherwise."""
    base = builder.tree("base")
    return {k: v for k, v in builder.tree(image).items() if base.get(k) != v}


def short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# ---- what buildah 1.28 refuses: the trees are written out


def test_copy_heredocs(builder: Builder, tmp_path: Path) -> None:
    image = builder.build(
        context(
            tmp_path,
            'ENV A=value\nCOPY <<one.txt <<"two.txt" /docs/\n$A "quoted"\none.txt\n$A\ntwo.txt\n'
            "COPY --chmod=700 --chown=app:other <<-END /script\n\t\t#!/bin/sh\n\techo $A\nEND\n",
        )
    )
    assert added(builder, image) == {
        "docs": "directory 755 0:0",
        "docs/one.txt": "file 644 0:0 " + short('value "quoted"\n'),
        "docs/two.txt": "file 644 0:0 " + short("$A\n"),
        "script": "file 700 1000:2000 " + short("#!/bin/sh\necho value\n"),
    }


def test_run_heredocs(builder: Builder, tmp_path: Path) -> None:
    image = builder.build(
        context(
            tmp_path,
            "RUN <<EOF\necho one > /one\necho two > /two\nEOF\n"
            "RUN <<EOF cat > /three\nthree\nEOF\n"
            'RUN <<"EOF"\n#!/bin/sh -e\necho "$0" > /four\nEOF\n',
        )
    )
    assert added(builder, image) == {
        name: f"file 644 0:0 {short(text)}"
        for name, text in {
            "one": "one\n", "two": "two\n", "three": "three\n", "four": "/dev/pipes/EOF\n",
        }.items()
    }  # fmt: skip


def test_copy_parents_and_exclude(builder: Builder, tmp_path: Path) -> None:
    files = {
        "a/b/one.txt": "1",
        "a/b/two.md": "2",
        "a/c/one.txt": "3",
        "top.txt": "4",
        "x/y/z": "5",
    }
    (tmp_path / "c").mkdir()
    write_files(tmp_path / "c", files)
    image = builder.build(
        context(
            tmp_path / "c",
            "COPY --parents a/*/one.txt top.txt /kept/\n"
            "COPY --parents x/./y/z /pivot/\n"
            "COPY --exclude=**/*.md --exclude=c a /excluded/\n"
            "COPY --exclude=top* *.txt a/b /some/\n",
        )
    )
    found = added(builder, image)
    assert sorted(name for name, what in found.items() if what.startswith("file")) == [
        "excluded/b/one.txt", "kept/a/b/one.txt", "kept/a/c/one.txt", "kept/top.txt",
        "pivot/y/z", "some/one.txt", "some/two.md",
    ]  # fmt: skip
    assert found["kept/a/b"] == "directory 755 0:0"


def test_copy_link_makes_a_layer_that_needs_no_base(builder: Builder, tmp_path: Path) -> None:
    def top_layer(number: int) -> str:
        text = f"RUN echo {number} > /number; ln -s /tmp /target\nCOPY --link file /target/\n"
        return builder.config(builder.build(context(tmp_path, text, file="x"))).diff_ids[-1]

    assert top_layer(1) == top_layer(2)
    image = builder.build(tmp_path)
    assert added(builder, image)["target/file"].startswith("file 644")  # the link was replaced


def test_chmod_takes_octal_and_symbolic_modes(builder: Builder, tmp_path: Path) -> None:
    text = "COPY --chmod=u=rwX,go=rX tree /tree\nCOPY --chmod=0600 tree /other\n"
    (tmp_path / "tree").mkdir()
    write_files(tmp_path / "tree", {"plain": "p", "program": "#!/bin/sh", "sub/x": "x"})
    found = added(builder, builder.build(context(tmp_path, text)))
    modes = {name: what.split()[1] for name, what in found.items()}
    assert modes["tree/plain"] == "644" and modes["tree/program"] == "755"
    assert modes["tree/sub"] == "755" and modes["other/plain"] == "600"


# ---- ADD from a URL


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A server of the directory `www`; its address."""
    (tmp_path / "www").mkdir()
    (tmp_path / "www/file.txt").write_text("from the network\n")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as http_server:
        thread = threading.Thread(target=http_server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()
        thread.join()


def test_add_fetches_urls(builder: Builder, tmp_path: Path, server: str) -> None:
    digest = hashlib.sha256(b"from the network\n").hexdigest()
    text = f"ADD {server}/file.txt /dir/\n"
    text += f"ADD --checksum=sha256:{digest} --chmod=644 {server}/file.txt /named\n"
    found = added(builder, builder.build(context(tmp_path / "c", text)))
    content = short("from the network\n")
    assert found["dir/file.txt"] == f"file 600 0:0 {content}"
    assert found["named"] == f"file 644 0:0 {content}"
    (tmp_path / "www/file.txt").write_text("changed\n")
    context(tmp_path / "c", f"ADD {server}/file.txt /dir/\n")
    again = added(builder, builder.build(tmp_path / "c"))
    assert again["dir/file.txt"].endswith(short("changed\n")), "without a checksum it is looked at"


def test_a_wrong_checksum_is_refused(builder: Builder, tmp_path: Path, server: str) -> None:
    text = f"ADD --checksum=sha256:{'0' * 64} {server}/file.txt /x\n"
    said = builder.failing(context(tmp_path / "c", text))
    assert "line 2" in said and "--checksum says sha256:000" in said
    assert "HTTP" in builder.failing(context(tmp_path / "c", f"ADD {server}/missing /x\n"))


# ---- RUN


def test_bind_mounts_come_from_context_stage_and_image(builder: Builder, tmp_path: Path) -> None:
    text = (
        "RUN mkdir /made && echo stage > /made/file\n"
        "FROM base\n"
        "RUN --mount=target=/ctx cat /ctx/file /ctx/sub/other > /one; echo no > /ctx/x || true\n"
        "RUN --mount=type=bind,source=file,target=/single cat /single > /two\n"
        "RUN --mount=from=0,source=made,target=/made,rw cat /made/file > /three; echo > /made/new\n"
        "RUN --mount=from=base,target=/base ls /base/bin/busybox > /four\n"
    )
    (tmp_path / "sub").mkdir()
    write_files(tmp_path, {"sub/other": "other\n", "ignored": "secret", ".dockerignore": "ignored"})
    image = builder.build(context(tmp_path, text, file="context\n"))
    found = added(builder, image)
    assert sorted(found) == ["four", "one", "three", "two"]
    assert builder.read(image, "/one") == "context\nother\n"
    assert builder.read(image, "/three") == "stage\n"
    assert not (tmp_path / "x").exists()


def test_ignored_files_are_not_in_a_bind_mount(builder: Builder, tmp_path: Path) -> None:
    text = "RUN --mount=target=/ctx,rw ls -A /ctx > /list && touch /ctx/new\n"
    image = builder.build(context(tmp_path, text, __dockerignore="hidden\n", hidden="h", seen="s"))
    assert builder.read(image, "/list").split() == [".dockerignore", "Dockerfile", "seen"]
    assert not (tmp_path / "new").exists()


def test_cache_mounts_stay_and_are_not_in_the_image(builder: Builder, tmp_path: Path) -> None:
    text = "ARG n\nRUN --mount=type=cache,target=/cache,id=t,mode=750,uid=7 echo $n >> /cache/log;"
    text += " cat /cache/log > /seen; stat -c '%a %u' /cache > /look\n"
    context(tmp_path, text)
    builder.build(tmp_path, "--build-arg", "n=1")
    image = builder.build(tmp_path, "--build-arg", "n=2")
    assert builder.read(image, "/seen") == "1\n2\n"
    assert builder.read(image, "/look") == "750 7\n"
    assert "cache" not in builder.tree(image)


def test_tmpfs_mounts_and_networks(builder: Builder, tmp_path: Path) -> None:
    text = (
        "RUN --mount=type=tmpfs,target=/t/mp,size=64k echo x > /t/mp/f;"
        " grep /t/mp /proc/mounts > /fs\n"
        "RUN --network=none ls /sys/class/net > /none\n"
        "RUN --network=host ls /sys/class/net > /host\n"
    )
    image = builder.build(context(tmp_path, text))
    assert "tmpfs" in builder.read(image, "/fs") and "size=64k" in builder.read(image, "/fs")
    assert builder.read(image, "/none").split() == ["lo"]
    assert set(builder.read(image, "/host").split()) == set(os.listdir("/sys/class/net"))
    context(
        tmp_path, "RUN ls /sys/class/net > /seen\nRUN --network=host ls /sys/class/net > /host\n"
    )
    image = builder.build(tmp_path, "--network", "none")
    assert builder.read(image, "/seen").split() == ["lo"] != builder.read(image, "/host").split()
    assert "t" not in builder.tree(image)


def test_secrets_reach_the_step_and_nothing_else(builder: Builder, tmp_path: Path) -> None:
    value = "s3cr3t-" + os.urandom(8).hex()
    (tmp_path / "key").write_text(value)
    text = (
        "RUN --mount=type=secret,id=key --mount=type=secret,id=var,env=TOKEN,required"
        " --mount=type=secret,id=key,target=/etc/key,mode=444,uid=5"
        " test $(cat /run/secrets/key) = $TOKEN && stat -c '%a %u' /etc/key > /look"
        " && cat /etc/key | wc -c > /size; ls /run > /left\n"
        "RUN --mount=type=secret,id=absent ls /run/secrets > /absent 2>&1 || true\n"
    )
    (tmp_path / "c").mkdir()
    image = builder.build(
        context(tmp_path / "c", text),
        "--secret", f"id=key,src={tmp_path}/key", "--secret", "id=var,env=MY_TOKEN",
        env={"MY_TOKEN": value},
    )  # fmt: skip
    assert builder.read(image, "/look") == "444 5\n"
    assert set(added(builder, image)) == {"look", "size", "left", "absent"}
    for path in builder.root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert value.encode() not in path.read_bytes(), path
    said = builder.failing(tmp_path / "c", "--no-cache")
    assert "secret 'var' is required" in said and "line 2" in said


def test_secrets_are_in_no_process_list(builder: Builder, tmp_path: Path) -> None:
    value = "s3cr3t-" + os.urandom(8).hex()
    text = "RUN --mount=type=secret,id=k,env=K sleep 1.5\n"
    environment = {**os.environ, "K": value}
    command = ["build", "--secret", "id=k,env=K", str(context(tmp_path, text))]
    process = subprocess.Popen(
        [PROGRAM, "--root", str(builder.root), *command],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    seen = b""
    while process.poll() is None:
        seen += b"".join(command_lines())
        time.sleep(0.05)
    assert process.returncode == 0 and b"sleep" in seen
    assert value.encode() not in seen


def test_both_drivers_make_the_same(builder: Builder, tmp_path: Path) -> None:
    text = "RUN mkdir -p /d/e && echo x > /d/e/f && rm /etc/group && chmod 700 /tmp\n"
    text += "RUN rm -r /d && mkdir /d && ln /bin/busybox /d/hard\n"
    context(tmp_path, text)
    trees = [
        builder.tree(builder.build(tmp_path, "--no-cache", "--driver", driver))
        for driver in ("fuse", "overlay")
    ]
    assert trees[0] == trees[1]
    assert "etc/group" not in trees[0] and "d/e" not in trees[0]


def test_a_step_that_changes_nothing_makes_no_layer(builder: Builder, tmp_path: Path) -> None:
    image = builder.build(context(tmp_path, "RUN true\nWORKDIR /tmp\nENV A=b\nRUN ls /\n"))
    config = builder.config(image)
    assert config.diff_ids == builder.config("base").diff_ids
    assert [step.empty_layer for step in config.history[-4:]] == [True] * 4


# ---- history and config


def test_history_reads_as_dockers(builder: Builder, tmp_path: Path) -> None:
    text = (
        "ARG V=1\nENV A=b C='d e'\nRUN echo $V\nCOPY --chown=1:2 file /\nWORKDIR /w\nEXPOSE 80\n"
        'VOLUME /v\nCMD echo hi\nENTRYPOINT ["x", "y"]\nHEALTHCHECK --interval=90s CMD true\n'
    )
    image = builder.build(context(tmp_path, text, file="x"), "--label", "l=m")
    assert [step.created_by for step in builder.config(image).history[-11:]] == [
        "ARG V=1",
        "ENV A=b C=d e",
        "RUN |1 V=1 /bin/sh -c echo $V",
        "COPY --chown=1:2 file /",
        "WORKDIR /w",
        "EXPOSE [80/tcp]",
        "VOLUME [/v]",
        'CMD ["/bin/sh" "-c" "echo hi"]',
        'ENTRYPOINT ["x" "y"]',
        "HEALTHCHECK {Test:[CMD-SHELL true] Interval:1m30s Timeout:0s StartPeriod:0s"
        " StartInterval:0s Retries:0}",
        "LABEL l=m",
    ]


def test_onbuild_triggers_run_in_the_child(builder: Builder, tmp_path: Path) -> None:
    text = "ONBUILD COPY file /from/child\nONBUILD RUN echo $PATH > /ran\nONBUILD ENV SET=1\n"
    builder.build(context(tmp_path / "parent", text), "-t", "parent")
    child = tmp_path / "child"
    child.mkdir()
    (child / "file").write_text("c")
    (child / "Dockerfile").write_text("FROM parent\n")
    config = builder.config(builder.build(child, "-t", "child"))
    assert "from/child" in builder.tree("child") and "ran" in builder.tree("child")
    assert "SET=1" in config.run.env and config.run.on_build == ()
    (child / "file").unlink()
    assert "'file' is not in the build context" in builder.failing(child)


# ---- the cache


def made(builder: Builder, *words: str | Path) -> list[str]:
    """The steps that a build carried out, the others came from the cache."""
    lines = builder.run("build", "--progress", "plain", *words).stderr.splitlines()
    cached = {line.split()[0] for line in lines if line.endswith(" CACHED")}
    steps = [line for line in lines if line.split()[1:2] and line.split()[1].startswith("[")]
    return [line.partition("] ")[2] for line in steps if line.split()[0] not in cached]


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


# ---- flags


def test_squash_makes_one_layer_with_the_same_tree(builder: Builder, tmp_path: Path) -> None:
    text = "RUN mkdir -p /d/e && echo 1 > /d/e/f && echo k > /keep && rm /etc/group\n"
    text += "RUN rm -r /d/e && mkdir /d/e && echo 2 > /d/e/g && ln /keep /hard\nRUN rm -r /d\n"
    text += "RUN mkdir /d && ln -s /keep /d/link && chown 3:4 /d\nENV A=b\n"
    context(tmp_path, text)
    plain, squashed = builder.build(tmp_path), builder.build(tmp_path, "--squash")
    base = builder.config("base").diff_ids
    config = builder.config(squashed)
    assert config.diff_ids[:-1] == base and len(builder.config(plain).diff_ids) == len(base) + 4
    assert builder.tree(squashed) == builder.tree(plain)
    assert config.run == builder.config(plain).run
    assert config.history[-1].comment.startswith("merge 4 layers onto sha256:")


def test_names_iidfile_and_quiet(builder: Builder, tmp_path: Path) -> None:
    context(tmp_path / "c", "ENV Q=1\n")
    iid = tmp_path / "iid"
    done = builder.run(
        "build", "-q", "-t", "one:1", "-t", "r.example/two", "--iidfile", iid, tmp_path / "c"
    )
    assert done.stdout == iid.read_text() + "\n" and done.stdout.startswith("sha256:")
    assert done.stderr == ""
    with Store.open(builder.root) as store:
        assert {name.familiar for name in store.image("one:1").names} == {
            "one:1",
            "r.example/two:latest",
        }
    said = builder.run("build", "-t", "one:1", tmp_path / "c")
    assert said.stdout == "" and "CACHED" in said.stderr and "one:1" in said.stderr


def test_the_last_name_wins_and_images_can_be_bases_by_id(builder: Builder, tmp_path: Path) -> None:
    image = builder.build(context(tmp_path, "ENV BY=id\n"))
    (tmp_path / "Dockerfile").write_text(f"FROM {image}\nENV MORE=1\n")
    assert "BY=id" in builder.config(builder.build(tmp_path)).run.env


def test_another_platform_is_refused_when_it_is_not_there(builder: Builder, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\nARG TARGETARCH\nLABEL arch=$TARGETARCH\n")
    config = builder.config(builder.build(tmp_path, "--platform", "linux/arm64"))
    assert str(config.platform) == "linux/arm64" and config.run.labels["arch"] == "arm64"
    builder.build(tmp_path, "--platform", "linux/arm64", "-t", "r.invalid/arm")
    (tmp_path / "Dockerfile").write_text("FROM r.invalid/arm\n")
    said = builder.failing(tmp_path)
    assert "r.invalid/arm for linux/amd64: here it is for linux/arm64" in said


# ---- contexts


def test_contexts_of_every_kind(builder: Builder, tmp_path: Path) -> None:
    directory = context(tmp_path / "dir", "COPY file /file\n", file="the same")
    expected = builder.build(directory)
    plain, packed = tmp_path / "c.tar", tmp_path / "c.tar.gz"
    for path, mode in ((plain, "w"), (packed, "w:gz")):
        with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
            archive.add(directory, ".")
    git = ["git", "-C", str(directory), "-c", "user.name=n", "-c", "user.email=e@x"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "m"]):
        subprocess.run([*git, *words], check=True)
    assert builder.build(plain) == expected
    assert builder.build("-", text=plain.read_bytes()) == expected
    assert builder.build("-", text=packed.read_bytes()) == expected
    assert builder.build(f"file://{directory}/.git") == expected
    assert builder.build(f"{directory}/.git#HEAD") == expected
    assert builder.build(f"{directory}/.git#HEAD:.") == expected
    assert builder.build(directory, "-f", "-", text=(directory / "Dockerfile").read_bytes())
    assert "SAW=1" in builder.config(builder.build("-", text="FROM base\nENV SAW=1\n")).run.env
    assert "couldn't find remote ref nope" in builder.failing(f"file://{directory}/.git#nope")


def test_dockerfiles_elsewhere_and_their_own_ignore_file(builder: Builder, tmp_path: Path) -> None:
    directory = context(tmp_path / "c", "COPY . /c/\n", one="1", two="2", __dockerignore="one\n")
    write_files(tmp_path, {"d/My.Dockerfile": "FROM base\nCOPY . /c/\n"})
    write_files(tmp_path, {"d/My.Dockerfile.dockerignore": "*\n!two\n"})
    image = builder.build(directory, "-f", tmp_path / "d/My.Dockerfile")
    assert [name for name in added(builder, image) if name.startswith("c/")] == ["c/two"]
    assert "c/one" not in builder.tree(builder.build(directory))


# ---- what is refused


@pytest.mark.parametrize(
    ("dockerfile", "expected"),
    [
        ("COPY missing /x\n", "line 2: 'missing' is not in the build context"),
        ("COPY ignored /x\n", "line 2: 'ignored' is not in the build context (.dockerignore"),
        ("COPY a b /x\n", "line 2: COPY of several sources needs a destination that ends"),
        ("COPY --link=maybe a /x\n", "line 2: the flag --link is true or false"),
        ("COPY --fancy a /x\n", "line 2: COPY does not take the flag --fancy"),
        ("COPY --from=later a /x\nFROM base AS later\nCOPY --from=0 / /\n", "line 2: from=later"),
        ("COPY --from=$X a /x\n", "line 2: from=$X: variables are not expanded"),
        ("COPY http://x/y /x\n", "line 2: COPY takes no URL"),
        ("ADD https://x/y.git /x\n", "line 2: ADD does not clone repositories"),
        ("COPY --chmod=9 a /x\n", "line 2: --chmod=9"),
        ("COPY --chown=nobody a /x\n", "line 2: COPY --chown=nobody a /x: unable to find user"),
        ("RUN --mount=type=ssh true\n", "line 2: --mount=type=ssh is not offered"),
        ("RUN --mount=type=bind true\n", "line 2: --mount=type=bind: it needs target="),
        ("RUN --mount=target=/x,size=3 true\n", "line 2: --mount=target=/x,size=3: 'size' is not"),
        ("RUN --security=insecure true\n", "line 2: --security=insecure is not offered"),
        ("RUN --network=bridge true\n", "line 2: --network=bridge"),
        ("EXPOSE 99999\n", "line 2: EXPOSE 99999"),
        ("STOPSIGNAL SIGNONE\n", "line 2: STOPSIGNAL SIGNONE: no such signal"),
        ("HEALTHCHECK --interval=3 CMD x\n", "line 2: --interval=3: a duration"),
        ("WORKDR /x\n", "line 2: unknown instruction: WORKDR (did you mean WORKDIR?)"),
        ("ENV a\n", "line 2: ENV must have two arguments"),
        ("SHELL bash\n", "line 2: SHELL requires the arguments as JSON"),
        ("ONBUILD FROM x\n", "line 2: FROM isn't allowed as an ONBUILD trigger"),
        ("ENV X=\"${a:?set a}\"\n", "line 2: a: set a"),
        ("RUN <<E\nx\n", "unterminated heredoc"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_that_names_the_place(
    builder: Builder, tmp_path: Path, dockerfile: str, expected: str
) -> None:
    files = {"a": "a", "b": "b", "ignored": "i", ".dockerignore": "ignored\n"}
    said = builder.failing(
        context(tmp_path, dockerfile, **{k.replace(".", "__"): v for k, v in files.items()})
    )
    assert expected in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere"], "the build context 'nowhere' is not there"),
        (["-t", "UPPER", "."], "must be lower case"),
        (["--platform", "a/b/c/d", "."], "is not a platform"),
        (["--secret", "src=x", "."], "--secret 'src=x'"),
        (["--secret", "id=x,src=/nowhere", "."], "cannot read the file /nowhere"),
        (["--secret", "id=x,env=NOT_SET_HERE", "."], "the variable NOT_SET_HERE is not set"),
        (["--label", "=x", "."], "--label '=x'"),
        (["--build-arg", "=x", "."], "--build-arg '=x'"),
        (["-f", "missing", "."], "cannot read the Dockerfile missing"),
        (["--build-arg", "SOURCE_DATE_EPOCH=soon", "."], "SOURCE_DATE_EPOCH=soon"),
    ],
)  # fmt: skip
def test_bad_flags(builder: Builder, tmp_path: Path, words: list[str], expected: str) -> None:
    context(tmp_path, "ENV X=1\n")
    place = [str(tmp_path) if word == "." else word for word in words]
    assert expected in builder.failing(place[-1], *place[:-1])


def test_unused_arguments_are_warned_of(builder: Builder, tmp_path: Path) -> None:
    done = builder.run("build", "--build-arg", "typo=1", context(tmp_path, "ARG type\n"))
    assert "warning: build-arg typo was not used" in done.stderr


# ---- killed builds


def test_a_killed_build_leaves_nothing_behind(builder: Builder, tmp_path: Path) -> None:
    """Neither a container, nor a daemon, nor staged files; the finished step stays cached."""
    context(tmp_path, "RUN echo k1 > /k1\nRUN sleep 77\n")
    process = subprocess.Popen(
        [PROGRAM, "--root", str(builder.root), "build", "--progress", "plain", str(tmp_path)],
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if b"RUN sleep 77" in line:
            break
    until(lambda: any(b"sleep\x0077" in words for words in command_lines()))
    process.kill()
    process.wait()
    process.stderr.close()
    staging = os.fsencode(builder.root / "staging")
    until(lambda: not any(b"sleep\x0077" in w or staging in w for w in command_lines()))
    context(tmp_path, "RUN echo k1 > /k1\nRUN echo k2 > /k2\n")
    assert made(builder, tmp_path) == ["RUN echo k2 > /k2"]
    assert os.listdir(staging) == []


def command_lines() -> list[bytes]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(entry.read_bytes())
        except OSError:
            continue
    return found


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 20 seconds"
        time.sleep(0.05)


# ---- progress


def test_progress_on_a_terminal(builder: Builder, tmp_path: Path) -> None:
    """A live picture of the steps that run, a line for each that is done; nothing hangs."""
    text = "RUN echo t1; sleep 0.3; printf '\\033[31mcolour\\033[0m\\n' > /a\n"
    text += (
        "FROM base\nRUN echo t2; sleep 0.3\nFROM base\nCOPY --from=0 /a /a\nCOPY --from=1 /etc /e\n"
    )
    command = [PROGRAM, "--root", str(builder.root), "build", str(context(tmp_path, text))]
    master, slave = os.openpty()
    process = subprocess.Popen(command, stderr=slave, env={**os.environ, "COLUMNS": "100"})
    os.close(slave)
    shown = b""
    while data := _read_terminal(master):
        shown += data
    os.close(master)
    assert process.wait(30) == 0
    for label in (b"=> [0 1/1] RUN echo t1", b"=> [1 1/1] RUN echo t2", b" => # t1", b"built "):
        assert label in shown
    plain = builder.run("build", "--progress", "tty", tmp_path).stderr
    assert plain.count("=> CACHED [") == 4 and "\x1b" not in plain


def _read_terminal(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # EIO: nobody has the other end any more
        return b""


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
    until(lambda: not any(staging in words for words in command_lines()))
    assert builder.run("images", "-q").stdout.split()
