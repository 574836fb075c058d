"""The same Dockerfiles built by Debian's buildah and by unionfuse: the same tree and config."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.building import Builder, describe, make_root, write_files
from harness.peers import container_storage

PREFIX = "FROM scratch AS base\nCOPY root/ /\nENV PATH=/bin\n"

CORPUS: dict[str, tuple[str, dict[str, str]]] = {
    "run": (
        """FROM base
        RUN echo hello > /greeting && mkdir -p /a/b && chmod 750 /a && chown 7:8 /a/b
        RUN ["sh", "-c", "echo exec > /exec"]
        RUN rm /greeting; mv /a/b /a/c; ln -s c /a/link; ln /exec /hard
        SHELL ["/bin/sh", "-ec"]
        RUN echo "$0 $PWD $HOME" > /shell; umask > /umask
        USER app
        RUN id -u > /tmp/uid; id -g > /tmp/gid; echo $HOME > /tmp/home
        """,
        {},
    ),
    "delete-and-replace": (
        """FROM base
        RUN mkdir -p /d/e/f && touch /d/e/f/one /d/two && echo x > /file
        RUN rm -r /d/e && mkdir -p /d/e && touch /d/e/new && rm /file && mkdir /file
        RUN rmdir /file && ln -s /d /file
        """,
        {},
    ),
    "copy": (
        """FROM base
        COPY one two /dir/
        COPY one /renamed
        COPY tree /copied
        COPY tree/ /existing/
        COPY other /existing/
        COPY *.txt t?ee/in* /globbed/
        COPY ["with space", "/with space/"]
        COPY --chown=app:grp one /owned/one
        COPY --chown=app tree /owned/tree
        COPY --chown=5:6 one /numbers
        COPY --chown=5 two /number
        COPY --chmod=4711 one /modes
        COPY link /followed
        COPY . /all
        WORKDIR /work
        COPY one .
        COPY one ./sub/
        COPY two up/../../up
        """,
        {
            "one": "1", "two": "#!2", "a.txt": "a", "b.txt": "b", "tree/inner": "i",
            "tree/link": "-> inner", "tree/dangling": "-> /nowhere", "tree/deep/er/file": "d",
            "tree/empty/": "", "other/inner": "replaced", "other/more": "m", "with space": "s",
            "link": "-> one",
        },
    ),
    "dockerignore": (
        """FROM base
        COPY . /all/
        """,
        {
            ".dockerignore": "# comment\n*.log\n!keep.log\n**/cache\nsecret\n!secret/public\n"
            "docs/*\n!docs/README.md\n/rooted\ntemp?\n",
            "a.log": "1", "keep.log": "2", "sub/b.log": "3", "cache/x": "4", "sub/cache/y": "5",
            "secret/key": "6", "secret/public": "7", "docs/a": "8", "docs/README.md": "9",
            "rooted": "10", "sub/rooted": "11", "temp1": "12", "temp22": "13", "sub/temp1": "14",
        },
    ),
    "variables": (
        """FROM base
        ARG plain=one
        ARG given
        ARG late=${plain}-two
        ENV A=$plain B="quoted $late" C='single $late' D=esc\\\\$aped
        ENV OLD style  value
        ENV E=${unset:-default} F=${A:+set} G=${unset:+no}end
        RUN echo "$A|$B|$C|$D|$E|$F|$G|$OLD|$plain|$given|$late" > /values
        WORKDIR /x/$A
        LABEL version="$A" "odd name"=$B multi="a b" \\
              second=line
        EXPOSE $A 8080/udp
        USER ${unset:-app}
        COPY $plain.txt /${A}.copied
        """.replace("EXPOSE $A", "EXPOSE 80"),
        {"one.txt": "content"},
    ),
    "config": (
        """FROM base
        MAINTAINER somebody
        CMD ["first"]
        CMD echo last wins
        ENTRYPOINT ["/bin/sh", "-c"]
        EXPOSE 80 443/tcp 53/udp
        VOLUME /data ["/not json"]
        VOLUME ["/one", "/two words"]
        STOPSIGNAL SIGTERM
        HEALTHCHECK --interval=5m --timeout=3s --retries=2 CMD ["true", "x"]
        LABEL a=1
        LABEL a=2 b=3
        ONBUILD ENV later=1
        ONBUILD LABEL later=2
        SHELL ["/bin/sh", "-e", "-c"]
        USER app:grp
        WORKDIR /srv
        WORKDIR www
        """.replace('VOLUME /data ["/not json"]', "VOLUME /data"),
        {},
    ),
    "inherit": (
        """FROM base AS parent
        CMD ["from", "parent"]
        ENV KEPT=yes
        LABEL origin=parent
        EXPOSE 1
        VOLUME /v
        WORKDIR /home
        USER app
        FROM parent
        ENTRYPOINT ["forgets", "cmd"]
        LABEL more=1
        """,
        {},
    ),
    "stages": (
        """FROM base AS unneeded
        RUN false
        FROM base AS build
        RUN mkdir /out && echo binary > /out/program && chmod 755 /out/program && chown 3:4 /out
        FROM base AS also
        COPY --from=build /out/program /second
        FROM base
        COPY --from=build /out /out
        COPY --from=2 /second /moved/
        COPY --from=also --chown=app /second /moved/owned
        """.replace("--from=2", "--from=also"),
        {},
    ),
    "add": (
        """FROM base
        ADD one /one
        ADD archive.tar /unpacked/
        ADD archive.tar.gz /compressed/
        ADD --chown=9:9 one two/ /many/
        COPY archive.tar /kept/
        """,
        {"one": "1", "two/file": "2"},
    ),
    "heredoc-free-syntax": (
        """FROM base
        RUN echo a \\
            # a comment within
            b \\

            c > /joined
        RUN echo 'back\\\\slash' > /slash; \\
            echo "tab	here" > /tab
        """,
        {},
    ),
}  # fmt: skip

CONFIG_KEYS = (
    "User", "ExposedPorts", "Env", "Entrypoint", "Cmd", "Volumes", "WorkingDir", "Labels",
    "StopSignal", "Shell", "OnBuild", "Healthcheck",
)  # fmt: skip


class Buildah:
    """Debian's buildah on a storage of its own."""

    def __init__(self, storage: list[str]) -> None:
        self._command = ["buildah", *storage]

    def run(self, *words: str) -> str:
        done = subprocess.run([*self._command, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def build(self, context: Path, *words: str) -> tuple[dict[str, str], dict[str, Any]]:
        """Build; returns the tree and the config."""
        options = ["--isolation", "chroot", "--format", "docker", "--quiet", *words]
        image = self.run("build", *options, str(context))
        container = self.run("from", image)
        try:
            tree = describe(Path(self.run("mount", container)))
        finally:
            self.run("rm", container)
        return tree, json.loads(self.run("inspect", "--type", "image", image))["Docker"]["config"]


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(tmp_path_factory.mktemp("build"))


@pytest.fixture(scope="module")
def buildah() -> Iterator[Buildah]:
    with container_storage() as storage:
        peer = Buildah(storage)
        yield peer
        peer.run("rmi", "--all", "--force")


def make_context(directory: Path, name: str) -> Path:
    dockerfile, files = CORPUS[name]
    make_root(directory / "root")
    write_files(directory, files)
    lines = (line.strip() for line in dockerfile.splitlines())
    (directory / "Dockerfile").write_text(PREFIX + "\n".join(lines))
    if name == "add":
        subprocess.run(
            "mkdir -p in/d && echo x > in/d/f && ln -s f in/d/l && chmod 640 in/d/f &&"
            " tar --owner=11 --group=12 -C in -cf archive.tar d && gzip -k archive.tar && rm -r in",
            shell=True, check=True, cwd=directory,
        )  # fmt: skip
    return directory


def normal(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that a build decides; empty values are as good as none."""
    kept = {key: config[key] for key in CONFIG_KEYS if config.get(key)}
    labels = {k: v for k, v in kept.get("Labels", {}).items() if k != "io.buildah.version"}
    kept.pop("Labels", None)
    if kept.get("WorkingDir") == "/":
        del kept["WorkingDir"]
    return kept | ({"Labels": labels} if labels else {})


@pytest.mark.parametrize("name", CORPUS)
def test_buildah_builds_the_same(
    name: str, builder: Builder, buildah: Buildah, tmp_path: Path
) -> None:
    context = make_context(tmp_path, name)
    expected_tree, expected_config = buildah.build(context, "--build-arg", "given=G")
    arguments = ["--build-arg", "given=G"] if name == "variables" else []
    image = builder.build(context, *arguments)
    config = json.loads(builder.config(image).to_json())["config"]
    assert normal(config) == normal(expected_config)
    assert builder.tree(image) == expected_tree


@pytest.mark.long
def test_a_debian_base_is_the_same(builder: Builder, buildah: Buildah, tmp_path: Path) -> None:
    from harness.debian import debian_root

    root = debian_root()
    subprocess.run(["cp", "-a", "--reflink=auto", str(root), str(tmp_path / "root")], check=True)
    # buildah takes set-id bits away from what it copies, docker does not
    strip = f"find '{tmp_path}/root' -perm /6000 -exec chmod ug-s {{}} +"
    subprocess.run(strip, shell=True, check=True)
    (tmp_path / "Dockerfile").write_text(
        "FROM scratch\nCOPY root/ /\nENV PATH=/usr/sbin:/usr/bin:/sbin:/bin\n"
        "RUN useradd -m someone && rm -r /usr/share/doc && dpkg --get-selections > /packages\n"
        "RUN apt-get --version > /apt && ldconfig\n"
    )
    expected, _ = buildah.build(tmp_path)
    tree = builder.tree(builder.build(tmp_path))
    unsure = {
        "etc/hosts",
        "var/cache/ldconfig/aux-cache",
        "etc/shadow",
        "etc/shadow-",
        "etc/.pwd.lock",
    }
    assert {k: v for k, v in tree.items() if k not in unsure} == {
        k: v for k, v in expected.items() if k not in unsure
    }
