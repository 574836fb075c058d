"""`unionfuse build` as its users meet it: every instruction, flag and kind of context."""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import shutil
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.building import (
    PROGRAM,
    Builder,
    added,
    command_lines,
    context,
    short,
    write_files,
)
from unionimage.store import Store


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(tmp_path_factory.mktemp("build"))


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
    with http.server.ThreadingHTTPServer(("0.0.0.0", 0), handler) as http_server:
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
        "RUN ls /sys/class/net > /own; cat /etc/resolv.conf > /names; touch /tmp/a\n"
    )
    image = builder.build(context(tmp_path, text))
    assert "tmpfs" in builder.read(image, "/fs") and "size=64k" in builder.read(image, "/fs")
    assert builder.read(image, "/none").split() == ["lo"]
    assert set(builder.read(image, "/host").split()) == set(os.listdir("/sys/class/net"))
    assert builder.read(image, "/own").split() == ["eth0", "lo"]
    assert "nameserver 10.0.2.3" in builder.read(image, "/names")
    context(
        tmp_path, "RUN ls /sys/class/net > /seen\nRUN --network=host ls /sys/class/net > /host\n"
    )
    image = builder.build(tmp_path, "--network", "none")
    assert builder.read(image, "/seen").split() == ["lo"] != builder.read(image, "/host").split()
    assert "t" not in builder.tree(image)


def test_a_step_reaches_the_world_and_not_this_host(
    builder: Builder, tmp_path: Path, server: str
) -> None:
    """What listens on the host's `lo` is out of reach, unless the host's network is asked for."""
    port = server.rpartition(":")[2]
    shown = subprocess.run(
        ["ip", "-o", "-4", "addr", "show", "scope", "global"], capture_output=True, text=True
    )
    outside = shown.stdout.split()[3].partition("/")[0]
    text = (
        f"RUN wget -q -O /far http://{outside}:{port}/file.txt\n"
        f"RUN ! wget -q -O /dev/null http://127.0.0.1:{port}/file.txt\n"
        f"RUN ! wget -q -O /dev/null http://10.0.2.2:{port}/file.txt\n"
        f"RUN --network=host wget -q -O /near http://127.0.0.1:{port}/file.txt\n"
    )
    image = builder.build(context(tmp_path / "c", text))
    assert builder.read(image, "/far") == builder.read(image, "/near") == "from the network\n"


def test_without_slirp4netns_a_step_says_what_it_has(builder: Builder, tmp_path: Path) -> None:
    bare = tmp_path / "bin"
    bare.mkdir()
    for name in ("crun", "runc", "unshare", "sh", "umount"):  # what starts a runtime
        if found := shutil.which(name):
            (bare / name).symlink_to(found)
    done = builder.run(
        "build", context(tmp_path / "c", "RUN ls /sys/class/net; date +%N\n"),
        env={"PATH": str(bare)},
    )  # fmt: skip
    assert "RUN has the host's network: networks without root need slirp4netns" in done.stderr


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


def test_the_comment_of_a_base_is_not_inherited(builder: Builder, tmp_path: Path) -> None:
    (tmp_path / "upper").mkdir()
    words = ("commit", "--upper", tmp_path / "upper", "--parent", "base", "-m", "mine")
    builder.run(*words, "commented")
    directory = context(tmp_path, "")
    (directory / "Dockerfile").write_text("FROM commented\nENV A=b\n")
    image = builder.build(directory)
    assert builder.config(image).comment == ""
    assert [step.comment for step in builder.config(image).history][-2:] == [
        "mine",
        "unionfuse.dockerfile.v0",
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
        with tarfile.open(path, mode) as archive:
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
