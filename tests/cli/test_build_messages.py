"""What `unionfuse build` says: mistakes in one line, progress on a terminal."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from harness.building import (
    PROGRAM,
    Builder,
    context,
)


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(tmp_path_factory.mktemp("build"))


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
        ("ADD http://127.0.0.1:1/x /\n", "fetch http://127.0.0.1:1/x: Connection refused"),
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
    for label in (
        b"=> [stage-0 1/1] RUN echo t1",
        b"=> [stage-1 1/1] RUN echo t2",
        b" => # t1",
        b"built ",
    ):
        assert label in shown
    plain = builder.run("build", "--progress", "tty", tmp_path).stderr
    assert plain.count("=> CACHED [") == 4 and "\x1b" not in plain


def _read_terminal(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # EIO: nobody has the other end any more
        return b""


def test_no_module_is_taken_from_the_working_directory(
    builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "taken"
    for name in ("unionfuse", "unionimage", "trio", "json", "struct"):
        (tmp_path / f"{name}.py").write_text(f"open({str(taken)!r}, 'w')\nraise SystemExit(3)\n")
    (tmp_path / "Dockerfile").write_text("FROM base\nRUN true\n")
    (tmp_path / "mnt").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNIONFUSE_RUNROOT", str(tmp_path / "run"))  # there is no spawner yet
    builder.run("build", "-q", "--no-cache", ".")
    for _ in range(2):
        builder.run("mount", "base", "mnt")
        builder.run("umount", "mnt")
    assert not taken.exists()


def test_a_root_that_is_no_mount_point_is_named(tmp_path: Path) -> None:
    """As in a plain `chroot`: there the kernel cannot keep mounts to one namespace (EINVAL)."""
    root = tmp_path / "root"
    root.mkdir()
    entries = {path: root / path.name for path in Path("/").iterdir()}
    for path, place in entries.items():
        if path.is_symlink():
            place.symlink_to(path.readlink())
        elif path.is_dir():
            place.mkdir()
    binds = [f"mount --rbind {path} {place}" for path, place in entries.items() if place.is_dir()]
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /\n")
    (tmp_path / ".dockerignore").write_text("root\nstore\n")
    words = ["chroot", root, PROGRAM, "--root", tmp_path / "store", "build", tmp_path]
    within = ["unshare", "--mount", "sh", "-ec", "\n".join([*binds, 'exec "$@"']), "sh", *words]
    done = subprocess.run(list(map(str, within)), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the root directory is no mount point" in done.stderr.splitlines()[-1]
