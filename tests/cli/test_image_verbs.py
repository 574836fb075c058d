"""The image verbs as users type them: output, exit codes, mistakes."""

import importlib
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.command import Command, make_command
from harness.inside import Inside
from harness.tars import archive, member
from unionimage.cli import load_verb, parser_of
from unionimage.cli.verbs import ALIASES, VERBS

from unionfuse import __version__, syscalls


@pytest.fixture
def unionfuse(scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    root = scratch / f"cli-{tmp_path.name}-{os.getpid()}"
    command = Inside(root, make_command(tmp_path, "store").environment)
    monkeypatch.setenv("UNIONFUSE_CONFIG", command.environment["UNIONFUSE_CONFIG"])
    monkeypatch.setenv("UNIONFUSE_RUNROOT", str(tmp_path / "run"))  # a spawner ends with it
    yield command
    Path(command.environment["UNIONFUSE_CONFIG"]).write_text("")
    for line in command("mounts", "-q").splitlines():
        command("umount", "--lazy", line)
    shutil.rmtree(command.root)


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    path = tmp_path / "rootfs.tar"
    path.write_bytes(
        archive(
            member("etc", tarfile.DIRTYPE),
            member("etc/passwd", data=b"root:x:0:0::/:/bin/sh\n"),
            member("etc/group", data=b"root:x:0:\n"),
            member("usr", tarfile.DIRTYPE),
            member("usr/bin", tarfile.DIRTYPE),
            member("usr/bin/sh", data=b"#!" + b"x" * 1000, mode=0o755),
            member("bin", tarfile.SYMTYPE, linkname="usr/bin"),
        )
    )
    return path


@pytest.fixture
def base(unionfuse: Command, rootfs: Path) -> str:
    return unionfuse("import", str(rootfs), "base:1").strip()


@pytest.fixture
def app(unionfuse: Command, base: str, tmp_path: Path, scratch: Path) -> str:
    """base with etc/passwd changed, etc/group deleted and new added."""
    directory = scratch / f"up-{tmp_path.name}"
    (directory / "etc").mkdir(parents=True)
    (directory / "new").write_text("new")
    (directory / "etc/passwd").write_text("changed")
    os.mknod(directory / "etc/group", stat.S_IFCHR, 0)
    words = ("commit", "--upper", str(directory), "--parent", "base:1", "-m", "a change")
    identity = unionfuse(*words, "-c", "ENV A=b", "-c", 'CMD ["sh"]', "-a", "Me", "app:2").strip()
    shutil.rmtree(directory)
    return identity


def test_every_verb_has_help_an_example_and_a_manual_page() -> None:
    from unionimage.cli.man import page

    for verb in VERBS:
        module = load_verb(verb)
        parser = parser_of(verb, module)
        assert f"unionfuse {verb}" in parser.format_help().split("Example:")[1], verb
        assert ".SH EXAMPLES" in page(verb, parser)
    for words in ALIASES.values():
        assert words[0] in VERBS


@pytest.mark.parametrize(
    ("verb", "words", "expected"),
    [
        ("images", ["--no-trunc=true", "-q=1", "-a=false"],
         {"no_trunc": True, "quiet": True, "all": False}),
        ("images", ["-q", "-q=false", "x"], {"quiet": False, "name": "x"}),
        ("history", ["-H", "x"], {"human": "true", "image": "x"}),
        ("history", ["--human=false", "x"], {"human": "false", "image": "x"}),
        ("commit", ["-p", "c", "n"], {"pause": "true", "names": ["c", "n"]}),
        ("build", ["--no-cache=false", "-qt", "a=true", "."],
         {"no_cache": False, "quiet": True, "tag": ["a=true"]}),
        ("run", ["--rm=true", "-ite", "A=b", "i", "--rm=false", "-x"],
         {"rm": True, "tty": True, "env": ["A=b"], "command": ["--rm=false", "-x"]}),
        ("exec", ["-t=false", "c", "ls", "-t=0"], {"tty": False, "command": ["ls", "-t=0"]}),
        ("rmi", ["--", "--force=false"], {"force": False, "image": ["--force=false"]}),
    ],
)  # fmt: skip
def test_switches_take_a_value_as_with_docker(
    verb: str, words: list[str], expected: dict[str, object]
) -> None:
    found = vars(parser_of(verb, load_verb(verb)).parse_args(words))
    assert {name: found[name] for name in expected} == expected


def test_a_switch_that_is_neither_on_nor_off(unionfuse: Command) -> None:
    said = unionfuse("rmi", "--force=maybe", "x", code=125)
    assert "argument --force: 'maybe' is neither true nor false" in said


# What makes a start slow: each of these costs 3 ms or more, most of them 10.
HEAVY = [
    *("asyncio", "concurrent.futures", "dataclasses", "dockerfile", "email", "http.client"),
    *("inspect", "isal", "logging", "pyfuse3", "rich", "shutil", "ssl", "subprocess", "tempfile"),
    *("trio", "unionfuse.wire.protocol", "urllib.request", "zstandard"),
]


def test_no_verb_imports_anything_heavy_before_it_runs() -> None:
    script = f"""
import sys
from unionimage.cli import load_verb, parser_of
from unionimage.cli.verbs import VERBS
known = set()
for verb in VERBS:
    parser_of(verb, load_verb(verb))
    for name in set({HEAVY}) & set(sys.modules) - known:
        known.add(name)
        print(verb, "imports", name)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_verbs_run_without_anything_heavy(
    unionfuse: Command, base: str, app: str, rootfs: Path, tmp_path: Path
) -> None:
    """Every verb that needs neither a mount nor a container; what it may import is named."""
    script = f"""
import sys
from unionimage.cli import main
code = main()
heavy = [name for name in {HEAVY} if name in sys.modules]
print(code, heavy, file=sys.stderr)
"""
    (tmp_path / "Dockerfile").write_text("FROM base:1\nENV A=b\n")
    archive = str(tmp_path / "archive.tar")
    cases: dict[str, set[str]] = {
        "--help": set(),
        "version": set(),
        "images": set(),
        "images --tree": set(),
        "images --format {{.ID}}": set(),
        "history base:1": set(),
        "tag base:1 b": set(),
        "inspect base:1": set(),
        "rmi b": set(),
        "diff app:2": set(),
        "du": set(),
        "which app:2 /new": set(),
        f"explore -o {tmp_path}/page.html base:1": set(),
        f"build -q -t built {tmp_path}": {"dockerfile"},
        f"commit --upper {tmp_path} --parent base:1 c": set(),
        f"import {rootfs} imported": set(),
        f"save -o {archive} base:1": set(),
        f"load -i {archive}": {"shutil"},
        f"export -o {archive} base:1": set(),
        "logout localhost:1": set(),
        "mounts": set(),
        "ps -a": set(),
        "volume ls": set(),
        "network ls": set(),
        "container ls": set(),
        "events --until 1s": set(),
        "system df": set(),
        "prune -f": set(),
        "check": {"shutil", "tempfile"},
        "completion bash": set(),
        "man images": set(),
    }  # fmt: skip
    for words, allowed in cases.items():
        line = unionfuse.line(*words.split())
        line[2] = script
        done = subprocess.run(line, capture_output=True, text=True, env=unionfuse.environment)
        told = done.stderr.splitlines()[-1]
        assert told.startswith("0 ["), (words, done.stderr)
        assert set(re.findall("'(.*?)'", told)) <= allowed, words


def test_pull_and_push_load_tls_only_where_they_speak_it() -> None:
    script = """
import sys
import unionimage.registry.pull, unionimage.registry.push
assert "ssl" not in sys.modules
import urllib.request
assert hasattr(urllib.request, "HTTPSHandler")
import unionimage.spawn
for name in unionimage.spawn.IMPORTS:
    __import__("unionimage." + name)
assert "dockerfile" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["images", "--filter", "dangling=maybe"], 1, "'dangling=maybe': give true or false"),
        (["imges"], 1, "did you mean 'images'?"),
        (
            ["images", "--nope"],
            125,
            "unrecognized arguments: --nope; see 'unionfuse",
        ),
        (["--nope"], 125, "unknown flag: --nope"),
        (["image"], 125, "required: ACTION"),
        (["image", "bogus"], 125, "'bogus' (choose from "),
        (["container", "bogus"], 125, "'ls'"),
        (["image", "inspect", "nope"], 1, "no such image: nope"),
        (["container", "inspect", "nope"], 1, "no such container: nope"),
        (["run"], 125, "required: IMAGE;"),
        (["history", "nope"], 1, "no such image: nope"),
        (["history"], 125, "required: IMAGE"),
        (["tag", "base:1", "UPPER"], 1, "must be lower case"),
        (["load", "-i", "/nope"], 1, "/nope does not exist"),
        (["rmi", "nope"], 1, "no such image: nope"),
        (["mount", "base:1@9", "/mnt"], 1, "base:1 has steps 1 to 1"),
        (["mount", "base:1", "/nope"], 1, "/nope is not a directory"),
        (["umount", "/usr"], 1, "no union is mounted there"),
        (["inspect", "nope"], 1, "no such container or image: nope"),
        (["images", "--filter", "x"], 125, "must be KEY=VALUE"),
        (["images", "--filter", "x=y"], 1, "invalid filter 'x'"),
        (["images", "--format", "{{.Nope}}"], 1, "there is no field '.Nope'"),
        (["images", "--format", "{{if .ID}}"], 1, "has no {{end}}"),
        (["commit", "--upper", "/nope", "x"], 1, "/nope is not a directory"),
        (["import", "/nope"], 1, "No such file"),
        (["import", "/etc/passwd"], 1, "is no tar archive"),
        (["pull", "http://localhost/x"], 1, "leave out 'http://'"),
        (["save", "-o", "/nope/x", "base:1"], 1, "No such file"),
        (["prune"], 1, "Say so with --force"),
        (["diff", "nope"], 1, "no such container, image or layer: nope"),
        (["which", "base:1", "/nope"], 1, "has no /nope"),
    ],
)
def test_mistakes(unionfuse: Command, base: str, words: list[str], code: int, message: str) -> None:
    """One line that names the thing and the remedy, docker's exit codes, no traceback."""
    said = unionfuse(*words, code=code)
    assert message in said
    assert len([line for line in said.splitlines() if line]) == 1


def test_images(unionfuse: Command, base: str, app: str) -> None:
    first, *rows = unionfuse("images").splitlines()
    assert first.split("   ")[0] == "REPOSITORY" and "IMAGE ID" in first
    assert [row.split()[:3] for row in rows] == [["app", "2", app[7:19]], ["base", "1", base[7:19]]]
    assert unionfuse("images", "-q", "--no-trunc").split() == [app, base]
    assert unionfuse("image", "ls", "-q", "base").split() == [base[7:19]]
    assert unionfuse("images", "-q", "--filter", "reference=b*").split() == [base[7:19]]
    assert unionfuse("images", "-q", "--filter", "since=base:1").split() == [app[7:19]]
    assert unionfuse("images", "--format", "{{.Repository}}:{{.Tag}}").split() == [
        "app:2",
        "base:1",
    ]
    assert (
        unionfuse("images", "--format", "table {{.ID}}\\t{{.Tag}}").split("\n")[0]
        == "IMAGE ID       TAG"
    )
    assert [json.loads(line)["Tag"] for line in unionfuse("images", "--json").splitlines()] == [
        "2",
        "1",
    ]
    created = unionfuse("images", "--format", "{{.CreatedAt}}", "base:1").strip()
    assert time.strptime(created.rpartition(" ")[0], "%Y-%m-%d %H:%M:%S %z")
    unionfuse("tag", "app:2", "base:1")
    assert unionfuse("images", "-q", "--filter", "dangling=true").split() == []  # it has a child
    assert base[7:19] in unionfuse("images", "-a", "-q").split()


def test_tree(unionfuse: Command, base: str, app: str) -> None:
    unionfuse("tag", "app:2", "other")
    lines = unionfuse("images", "--tree").splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("+-")
    assert lines[0].endswith("Virtual Size: 1.0 kB Tags: base:1 (shared by 2 images)")
    assert lines[1].startswith("  +-") and lines[1].endswith("Tags: app:2, other:latest")
    (node,) = json.loads(unionfuse("images", "--tree", "--format", "json"))
    assert (node["Tags"], node["Users"], node["Children"][0]["Images"]) == (["base:1"], 2, [app])


def test_history_and_inspect(unionfuse: Command, base: str, app: str) -> None:
    _, first, second = unionfuse("history", "--steps", "app:2").splitlines()
    assert first.split()[:2] == ["2", app[7:19]] and "a change" in first
    assert second.split()[:2] == ["1", "<missing>"] and "Imported from" in second
    (shown,) = json.loads(unionfuse("inspect", "app:2"))
    assert (shown["Id"], shown["Parent"], shown["RepoTags"]) == (app, base, ["app:2"])
    assert (shown["Config"]["Env"], shown["Config"]["Cmd"], shown["Author"]) == (
        ["A=b"],
        ["sh"],
        "Me",
    )
    assert (
        unionfuse("inspect", "-f", "{{index .Config.Env 0}} {{len .RootFS.Layers}}", "app:2")
        == "A=b 2\n"
    )


def test_diff_and_which(unionfuse: Command, base: str, app: str) -> None:
    wanted = ["C /etc", "D /etc/group", "C /etc/passwd", "A /new"]
    assert unionfuse("diff", "app:2").splitlines() == wanted
    assert unionfuse("diff", "base:1", "app:2").splitlines() == wanted
    back = ["C /etc", "A /etc/group", "C /etc/passwd", "D /new"]
    assert unionfuse("diff", "app:2", "base:1").splitlines() == back
    assert unionfuse("diff", "base:1", "base:1") == ""
    assert unionfuse("diff", "base:1").splitlines()[0] == "A /bin"
    rows = [json.loads(line) for line in unionfuse("diff", "--json", "app:2").splitlines()]
    assert {row["Path"]: row["Size"] for row in rows}["/etc/passwd"] == len("changed")
    states = [row.split()[0] for row in unionfuse("which", "app:2", "/etc/passwd").splitlines()[1:]]
    assert states == ["seen", "hidden"]
    states = [row.split()[0] for row in unionfuse("which", "app:2", "/etc/group").splitlines()[1:]]
    assert states == ["deleted", "hidden"]
    assert "seen" in unionfuse("which", "app:2", "/bin/sh")


@pytest.mark.parametrize("driver", ["fuse", "overlay"])
def test_mount(
    unionfuse: Command, base: str, app: str, scratch: Path, tmp_path: Path, driver: str
) -> None:
    target = scratch / f"m-{tmp_path.name}"
    target.mkdir()
    where = str(target)
    unionfuse("mount", "--driver", driver, "app:2", where)
    assert (target / "etc/passwd").read_text() == "changed"
    assert not (target / "etc/group").exists()
    with pytest.raises(OSError, match="Read-only"):
        (target / "x").touch()
    assert [row.split()[:3] for row in unionfuse("mounts").splitlines()[1:]] == [
        [where, "app:2", driver]
    ]
    assert "is used by mount" in unionfuse("rmi", "app:2", code=1)
    assert "mounted already" in unionfuse("mount", "base:1", where, code=1)
    unionfuse("umount", where)
    unionfuse("mount", "--driver", driver, "app:2@1", where)
    assert (target / "etc/group").exists()
    unionfuse("umount", where)
    unionfuse("mount", "-w", "--driver", driver, "app:2", where)
    (target / "etc/passwd").write_text("again")
    upper = f"{where}.upper"
    assert len(unionfuse("commit", "--upper", upper, "third").strip()) == 71
    unionfuse("umount", where)
    assert unionfuse("mounts", "-q") == ""
    assert unionfuse("diff", "third").splitlines() == ["C /etc", "C /etc/passwd"]


def test_a_mount_that_someone_else_took_away_is_forgotten(
    unionfuse: Command, base: str, scratch: Path, tmp_path: Path
) -> None:
    target = scratch / f"m-{tmp_path.name}"
    target.mkdir()
    unionfuse("mount", "--driver", "overlay", "base:1", str(target))
    subprocess.run(["umount", target], check=True)
    assert unionfuse("mounts", "-q") == ""
    assert "Deleted: " in unionfuse("rmi", "base:1")


def test_rmi_and_prune(unionfuse: Command, base: str, app: str) -> None:
    unionfuse("tag", "app:2", "other:3")
    assert unionfuse("rmi", "app:2") == "Untagged: app:2\n"
    unionfuse("tag", "other:3", "more:4")
    assert "several repositories" in unionfuse("rmi", app[7:19], code=1)
    said = unionfuse("rmi", "-f", app[7:19]).splitlines()
    assert said[:3] == ["Untagged: more:4", "Untagged: other:3", f"Deleted: {app}"]
    assert said[3].startswith("Deleted layer: ")
    assert "Total reclaimed space: 0B" in unionfuse("prune", "-f")
    assert unionfuse("rmi", "-f", "nope") == ""
    assert f"deleted: {base}" in unionfuse("image", "prune", "-a", "-f")
    assert unionfuse("images", "-q") == ""
    assert os.listdir(unionfuse.root / "diff") == []


def test_export_is_the_merged_tree(unionfuse: Command, app: str, tmp_path: Path) -> None:
    out = tmp_path / "out.tar"
    unionfuse("export", "-o", str(out), "app:2")
    with tarfile.open(out) as read:
        names = read.getnames()
        assert read.extractfile("etc/passwd").read() == b"changed"
    assert names == ["bin", "etc", "etc/passwd", "new", "usr", "usr/bin", "usr/bin/sh"]


@pytest.mark.parametrize("form", ["docker-archive", "oci-archive", "oci-dir"])
def test_what_is_saved_is_loaded(
    unionfuse: Command, base: str, app: str, tmp_path: Path, form: str
) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    for path in (out, again):
        unionfuse("save", "-q", "--format", form, "-o", str(path), "app:2", "base:1", app[7:19])
    files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    for file in files:
        twin = again / file.relative_to(out) if out.is_dir() else again
        assert file.read_bytes() == twin.read_bytes()
    other = Inside(tmp_path / "other", unionfuse.environment)
    said = other("load", "-q", "-i", str(out)).splitlines()
    assert said == ["Loaded image: app:2", "Loaded image: base:1"]
    assert other.image_id("app:2") == app and other.image_id("base:1") == base
    other("tag", "app:2", "mine")
    assert other("load", "-q", "-i", str(out)).splitlines() == said  # of the archive, no others
    other("check")


@pytest.mark.parametrize("packing", ["cat", "gzip -c", "zstd -c"])
def test_load_from_a_pipe(unionfuse: Command, app: str, tmp_path: Path, packing: str) -> None:
    other = Inside(tmp_path / "other", unionfuse.environment)
    for form in ("docker-archive", "oci-archive"):
        save = " ".join(map(repr, unionfuse.line("save", "--format", form, "app:2")))
        load = " ".join(map(repr, other.line("load")))
        done = subprocess.run(
            f"{save} | {packing} | {load}",
            shell=True, capture_output=True, text=True, env=unionfuse.environment,
        )  # fmt: skip
        assert "Loaded image: app:2" in done.stdout, done.stderr
    assert other.image_id("app:2") == app
    other("check")


def test_check(unionfuse: Command, app: str) -> None:
    assert unionfuse("check") == "The store is whole: 2 images, 2 layers.\n"
    (unionfuse.root / "diff" / "stray").mkdir()
    assert "stray: nothing knows it" in unionfuse.run("check").stdout
    assert "1 problems, 1 repaired" in unionfuse("check", "--repair")
    unionfuse("check", "-q")


def test_limits(unionfuse: Command, rootfs: Path) -> None:
    assert "more than 3 entries" in unionfuse(
        "import", "--max-layer-entries", "3", str(rootfs), code=1
    )
    assert "more than 1024 bytes" in unionfuse(
        "import", "--max-layer-size", "1k", str(rootfs), code=1
    )
    assert os.listdir(unionfuse.root / "diff") == os.listdir(unionfuse.root / "staging") == []


def test_completion_of_bash(unionfuse: Command, base: str, tmp_path: Path) -> None:
    script = unionfuse("completion", "bash")
    unionfuse("create", "--name", "idle", "--network", "none", "base:1", "sh")
    unionfuse("volume", "create", "vol")
    called = " ".join(map(shlex.quote, unionfuse.line()))
    (tmp_path / "unionfuse").write_text(f'#!/bin/sh\nexec {called} "$@"\n')
    (tmp_path / "unionfuse").chmod(0o755)
    try:
        for typed, shown in {
            "his": "history",
            "--root /x his": "history",
            "images --no-t": "--no-trunc",
            "volume cr": "create",
            "image ls --dig": "--digests",
            "volume create --la": "--label",
            "rmi ba": "base:1",
            "stop id": "idle",
            "volume rm v": "vol",
            "network connect host id": "idle",
        }.items():
            words = ["unionfuse", *typed.split()]
            ask = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _unionfuse"
            done = subprocess.run(
                ["bash", "-c", f'{script}{ask}; echo "${{COMPREPLY[*]}}"'],
                capture_output=True,
                text=True,
                env={**unionfuse.environment, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
            )
            assert (done.stdout, done.stderr) == (f"{shown}\n", ""), typed
    finally:
        unionfuse("rm", "idle")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_of_other_shells(unionfuse: Command, shell: str) -> None:
    script = unionfuse("completion", shell)
    for word in ("history", "no-trunc", "label-file", "{{.Names}}"):
        assert word in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


def test_version(unionfuse: Command) -> None:
    said = unionfuse("--version")
    assert said == unionfuse("-v") == f"unionfuse {__version__}\n"
    assert unionfuse("version", "--format", "{{.Server.Version}}") == f"{__version__}\n"
    assert json.loads(unionfuse("version", "--json"))["Version"] == __version__


def test_the_configuration_is_read(unionfuse: Command, base: str, tmp_path: Path) -> None:
    config = Path(unionfuse.environment["UNIONFUSE_CONFIG"])
    config.write_text('[registries.short-names]\nlittle = "registry.lan/base"\n')
    unionfuse("tag", "base:1", "registry.lan/base:1")
    assert unionfuse("images", "-q", "--no-trunc", "registry.lan/base").strip() == base
    assert unionfuse("history", "-q", "little:1").strip() == base[7:19]
    config.write_text("[store]\ncolour = 1\n")
    assert "there is no key 'colour' in [store]" in unionfuse("images", code=1)
    config.write_text("nonsense")
    assert str(config) in unionfuse("images", code=1)


def test_modules_of_verbs_are_there() -> None:
    for module, _ in VERBS.values():
        importlib.import_module("unionimage.cli." + module)


def test_containers_come_first(unionfuse: Command, base: str, tmp_path: Path) -> None:
    """diff, commit, export and inspect of a container; an image of the same name comes second."""
    unionfuse("tag", "base:1", "web")
    identity = unionfuse("create", "--name", "web", "--network", "none", "base:1", "sh").strip()
    file = tmp_path / "file"
    file.write_text("new")
    unionfuse("cp", str(file), "web:/etc/new")
    try:
        assert unionfuse("diff", "web").splitlines() == ["C /etc", "A /etc/new"]
        (shown,) = json.loads(unionfuse("inspect", "web"))
        assert (shown["Id"], shown["Image"]) == (identity, base)
        (shown,) = json.loads(unionfuse("inspect", "--type", "image", "web"))
        assert shown["Id"] == base
        made = unionfuse("commit", "-m", "why", "-c", "ENV A=b", "web", "made:1").strip()
        (shown,) = json.loads(unionfuse("inspect", "made:1"))
        assert (shown["Id"], shown["Parent"], shown["Comment"]) == (made, base, "why")
        assert "A=b" in shown["Config"]["Env"] and shown["Config"]["Cmd"] == ["sh"]
        assert unionfuse("diff", "made:1").splitlines() == ["C /etc", "A /etc/new"]
        unionfuse("export", "-o", str(tmp_path / "out.tar"), "web")
        with tarfile.open(tmp_path / "out.tar") as read:
            assert "etc/new" in read.getnames()
        unionfuse("rmi", "web")
        assert "is used by container" in unionfuse("rmi", base, code=1)
    finally:
        unionfuse("rm", "web")


@pytest.fixture
def overlaid(scratch: Path, tmp_path: Path) -> Iterator[Path]:
    """A directory on kernel overlayfs, as the root of a container is."""
    place = scratch / f"overlay-{tmp_path.name}"
    for name in ("lower", "upper", "work", "merged"):
        (place / name).mkdir(parents=True)
    options = f"lowerdir={place}/lower,upperdir={place}/upper,workdir={place}/work"
    syscalls.mount(b"overlay", os.fsencode(place / "merged"), b"overlay", 0, options.encode())
    yield place / "merged"
    syscalls.umount(os.fsencode(place / "merged"))
    shutil.rmtree(place)


def test_a_store_on_an_overlay_holds_whiteouts(
    unionfuse: Command, app: str, overlaid: Path, tmp_path: Path
) -> None:
    """Kernel overlayfs refuses devices 0:0, the usual form of a whiteout."""
    archived = tmp_path / "app.tar"
    unionfuse("save", "-o", str(archived), "app:2")
    there = Command(overlaid / "store", unionfuse.environment)
    there("load", "-i", str(archived))
    assert there("images", "-q", "--no-trunc").strip() == app
    assert there("diff", "app:2") == unionfuse("diff", "app:2")
    assert "whole" in there("check")
    target = overlaid.parent / "target"
    target.mkdir()
    there("mount", "-w", "app:2", str(target))
    try:
        assert sorted(os.listdir(target / "etc")) == ["passwd"]
        (target / "etc/passwd").unlink()
        there("commit", "--upper", f"{target}.upper", "--parent", "app:2", "less:1")
    finally:
        there("umount", str(target))
    assert there("diff", "less:1").splitlines() == ["C /etc", "D /etc/passwd"]
    assert "whole" in there("check")
    there("save", "-o", str(tmp_path / "again.tar"), "app:2")
    assert (tmp_path / "again.tar").read_bytes() == archived.read_bytes()


def test_what_is_no_archive_is_named(unionfuse: Command, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("no tar\n")
    for words in (("load", "-i", str(text)), ("import", str(text)), ("import", str(tmp_path))):
        message = unionfuse(*words, code=1)
        assert message.startswith(f"unionfuse {words[0]}: {words[-1]}") and message.count("\n") == 1
    assert f"pack it: tar -C {tmp_path}" in message
