"""Containers on a unionfuse mount, the default: the same as on any other, and what is its own."""

import contextlib
import os
import resource
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness import linux
from harness.containers import COMMAND, Box, boxed, leftovers, monitor_of, nothing_left
from harness.waiting import wait_until

from unionfuse import mounting


@pytest.fixture(scope="module")
def containers(scratch: Path) -> Iterator[Box]:
    yield from boxed(scratch / "fuse", "fuse")


def servers_of(box: Box, name: str) -> list[int]:
    """The pids of the file system's daemon and of its keeper, if it has one."""
    merged = box.inspect(name)["GraphDriver"]["Data"]["MergedDir"]
    mount = mounting.mount_at(os.fsencode(merged))
    assert mount is not None
    found = mounting.server_of(mount)
    assert found is not None
    keeper, daemon = found
    return [daemon] if keeper == daemon else [daemon, keeper]


def name_of(process: int) -> str:
    """As `ps` shows it; empty when it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/comm").read_text().strip()
    return ""


@pytest.mark.parametrize("runtime", ["crun", "runc"])
def test_run_on_unionfuse(box: Box, runtime: str) -> None:
    box.start(
        "fused",
        "--runtime",
        runtime,
        "-v",
        "vol:/srv",
        command="echo x > /file; cat /srv/seed; chmod 600 /etc/passwd; sleep 1000",
    )
    wait_until(lambda: box.out("logs", "fused") == "seed\n")
    assert "fuse.unionfuse" in box.out("exec", "fused", "grep", " / ", "/proc/mounts")
    box("exec", "fused", "sh", "-c", "ln -s file link; mkdir -p /a/b/c; mv /a /z; rm /etc/group")
    box("stop", "-t", "0", "fused")
    assert leftovers(box)["mounts"] == []
    changes = set(box.out("diff", "fused").splitlines())
    assert {"A /file", "A /link", "A /z", "D /etc/group", "C /etc/passwd"} <= changes
    assert not {"A /etc/hosts", "A /etc/resolv.conf", "A /dev/shm"} & changes
    box("start", "fused")
    wait_until(lambda: box.out("logs", "fused") == "seed\n" * 2)
    assert box.out("exec", "fused", "sh", "-c", "cat link; ls /z/b; ls /etc").split()[:2] == [
        "x",
        "c",
    ]


def test_what_is_there_to_be_mounted_over_is_no_change(box: Box, tmp_path: Path) -> None:
    """docker shows no change of a container that has changed nothing, and commits none."""
    (tmp_path / "one").write_text("1")
    box(
        *("run", "--name", "still", "--network", "none", "-v", f"{tmp_path / 'one'}:/etc/a/one"),
        *("-v", "vol:/srv", "-v", f"{tmp_path}:/srv/new/deep", "--tmpfs", "/mnt/x/y"),
        *("-w", "/work/here", "busybox", "true"),
    )
    assert box.out("diff", "still") == ""
    before = len(box.out("images", "--format", "{{.ID}}", "-a").split())
    box("commit", "still", "same:1")
    history = box.out("history", "--format", "{{.Size}}", "same:1").split()
    assert history[0] == "0B" and before
    upper = box.directory("still") / "upper"
    assert (upper / "etc/a/one").is_file() and (upper / "mnt/x/y").is_dir()
    assert not (upper / "srv/new").exists()
    box("run", "--name", "moved", "--network", "none", "busybox", "chmod", "700", "/etc")
    assert box.out("diff", "moved") == "C /etc\n"
    box("commit", "moved", "moved:1")
    assert (
        box.out("run", "--rm", "--network", "none", "moved:1", "stat", "-c", "%a", "/etc")
        == "700\n"
    )


def test_commit_export_and_diff(box: Box, tmp_path: Path) -> None:
    box.start("maker", command="echo made > /made; rm /srv/seed; sleep 1000")
    wait_until(lambda: (box.directory("maker") / "upper/made").exists())
    box("commit", "-m", "a change", "-c", 'CMD ["cat", "/made"]', "maker", "made:1")
    assert box.state("maker")["Status"] == "running"
    assert box.out("run", "--rm", "--network", "none", "made:1") == "made\n"
    assert box.out("run", "--rm", "--network", "none", "made:1", "ls", "/srv") == "sub\n"
    box("export", "-o", str(tmp_path / "out.tar"), "maker")
    names = subprocess.check_output(["tar", "-tf", str(tmp_path / "out.tar")], text=True)
    assert "made\n" in names and "srv/seed" not in names


def test_a_killed_file_system_daemon(box: Box) -> None:
    """Another one takes its place: the container goes on."""
    identity = box.start("kept", command="while :; do date > /beat; sleep 0.1; done")
    daemon, *keeper = servers_of(box, "kept")
    os.kill(daemon, signal.SIGKILL)
    if keeper:
        assert "tester" in box.out("exec", "kept", "cat", "/etc/passwd")
        assert servers_of(box, "kept")[0] != daemon
        assert box.names() == ["kept"]
    box("rm", "-f", "kept")
    assert nothing_left(box, (identity,))


def test_a_killed_daemon_and_keeper(box: Box) -> None:
    identity = box.start("blind", command="while :; do sleep 0.1; done")
    for pid in reversed(servers_of(box, "blind")):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    box("exec", "blind", "cat", "/etc/passwd", code=None)
    box("ps", "-a")
    box("rm", "-f", "blind")
    assert nothing_left(box, (identity,))


def test_the_spawner_is_only_a_short_cut(box: Box) -> None:
    """It forks the daemons of later mounts; when it is killed they live on, and mounts go on."""
    box.sh("true")
    found = wait_until(lambda: list(box.run_root.glob("spawner-*")), 30, "the spawner")
    box.start("before", command="sleep 0.5; echo on > /later; sleep 1000")
    assert "spawner" in Path(f"/proc/{monitor_of(box, 'before')}/cmdline").read_text()
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            variables = path.with_name("environ").read_bytes()
            spawner = path.read_text() == "unionfuse-spawn\n"
            if spawner and str(box.run_root).encode() in variables:
                os.kill(int(path.parent.name), signal.SIGKILL)
    wait_until(lambda: (box.directory("before") / "upper/later").exists())
    box.start("after")
    assert "unionfuse" in box.out("exec", "after", "grep", " / ", "/proc/mounts")
    assert found[0].name


def test_the_fork_that_a_spawner_made_ahead_is_replaced(box: Box) -> None:
    """Where it is killed before anybody asked for it; and each that is asked makes way for one."""
    box.sh("true")
    wait_until(lambda: list(box.run_root.glob("spawner-*")), 30, "the spawner")
    (place,) = box.run_root.glob("spawner-*")

    def spawners() -> list[int]:
        return [pid for pid in linux.processes_naming(place) if name_of(pid) == "unionfuse-spawn"]

    def waiting() -> int | None:
        forks = [fork for pid in spawners() for fork in linux.children(pid)]
        return next((fork for fork in forks if name_of(fork) == "unionfuse-spawn"), None)

    for _ in range(3):
        ahead = wait_until(waiting, 10, "a fork that was made ahead")
        os.kill(ahead, signal.SIGKILL)
        assert box.out("images", "-q")  # the command does not wait for the one that is gone


def test_what_a_spawner_forks_is_as_if_the_command_had_forked_it(box: Box) -> None:
    """Niceness, umask, limits and processors are those of who starts a container, each time."""
    box.sh("true")
    wait_until(lambda: list(box.run_root.glob("spawner-*")), 30, "the spawner")
    ways: list[tuple[str, int]] = [("plain", 0), ("nicer", 7), ("plainer", 0), ("nicest", 7)]
    for number, (name, niceness) in enumerate(ways):
        limit = 900 + number
        done = subprocess.run(
            ["nice", "-n", str(niceness), "prlimit", f"--core={limit}", COMMAND, "run", "-d",
             "--network", "none", "--name", name, "busybox", "sleep", "1000"],
            env=box.environment, capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        for pid in (*servers_of(box, name), monitor_of(box, name), box.state(name)["Pid"]):
            mine = os.getpriority(os.PRIO_PROCESS, 0)
            assert os.getpriority(os.PRIO_PROCESS, pid) == mine + niceness
        assert resource.prlimit(box.state(name)["Pid"], resource.RLIMIT_CORE) == (limit, limit)


def test_a_start_by_the_spawner_complains_as_any_other(box: Box) -> None:
    box("create", "--network", "none", "--name", "lost", "busybox", "/no/such")
    for _ in range(2):
        refused = box("start", "lost", code=1)
        assert refused.stderr == 'unionfuse: exec: "/no/such": no such file or directory\n'
        wait_until(lambda: list(box.run_root.glob("spawner-*")), 30, "the spawner")
    assert leftovers(box)["mounts"] == []


def test_a_copy_of_the_mounts_keeps_no_container_from_starting_again(box: Box) -> None:
    """Somebody's own mount namespace has a copy of the root file system, and does not let go."""
    box.start("copied", command="echo more >> /file; sleep 1000")
    pids = servers_of(box, "copied")
    with subprocess.Popen(["unshare", "-m", "--propagation", "private", "cat"],
                          stdin=subprocess.PIPE) as holder:  # fmt: skip
        own = Path(f"/proc/{holder.pid}/mounts")
        merged = box.inspect("copied")["GraphDriver"]["Data"]["MergedDir"]
        host = os.readlink("/proc/self/ns/mnt")
        wait_until(lambda: os.readlink(f"/proc/{holder.pid}/ns/mnt") != host)
        assert merged in own.read_text()
        box("stop", "-t", "0", "copied", timeout=10)
        assert not [pid for pid in pids if Path(f"/proc/{pid}/exe").exists()]
        assert merged in own.read_text()
        box("start", "copied")
        assert holder.stdin is not None
        holder.stdin.close()
    file = box.directory("copied") / "upper/file"
    wait_until(lambda: file.read_text() == "more\n" * 2)


def test_a_verb_that_the_spawner_does_is_the_same(box: Box, tmp_path: Path) -> None:
    """Output, errors, exit codes, environment and working directory are the command's."""
    (tmp_path / "Dockerfile").write_text("FROM busybox\nENV A=b\nCMD true\n")

    def told() -> list[tuple[int, str, str]]:
        box("create", "--network", "none", "--name", "one", "busybox", "true")
        tries = (
            ("rm", "one"), ("rm", "one"), ("rm", "-f", "one"), ("rm",), ("rm", "--nonsense", "x"),
            ("start", "one"), ("start", "--help"), ("mount", "busybox"),
            ("mount", "nope", "/mnt"), ("mount", "busybox", "etc"), ("ps", "-a", "-q"),
            ("images", "-q"), ("images", "--nonsense"), ("history", "busybox"), ("history", "nope"),
            ("tag", "busybox", "b:1"), ("rmi", "b:1"), ("rmi", "b:1"), ("commit", "nope", "c"),
            ("build", "-q", "-t", "b:2", str(tmp_path)), ("rmi", "-f", "b:2"),
            ("build", "-q", str(tmp_path / "nope")), ("load", "-i", "nope"), ("save", "nope"),
            ("push", "127.0.0.1:1/busybox"), ("pull", "127.0.0.1:1/busybox"),
        )  # fmt: skip
        done = [box(*words, code=None) for words in tries]
        return [(one.returncode, one.stdout, one.stderr) for one in done]

    def spawners() -> list[Path]:
        return list(box.run_root.glob("spawner-*"))

    for path in spawners():
        path.unlink()  # it ends then
    alone = told()
    assert not spawners()
    assert [code for code, _, _ in alone][:10] == [0, 1, 0, 125, 125, 1, 0, 125, 1, 1]
    assert [code for code, _, _ in alone][10:] == [
        *(0, 0, 125, 0, 1, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 1)
    ]
    box.sh("true")
    wait_until(spawners, 30, "the spawner")
    assert told() == alone


@pytest.mark.parametrize(("way", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_verb_that_the_spawner_does_ends_with_the_command(
    box: Box, way: signal.Signals, code: int
) -> None:
    """Ctrl-C, or whatever else ends the command, ends what is done for it."""
    box.sh("true")
    wait_until(lambda: list(box.run_root.glob("spawner-*")), 30, "the spawner")
    archive = subprocess.check_output([COMMAND, "save", "busybox"], env=box.environment)
    with subprocess.Popen(
        [COMMAND, "load"], env=box.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE) as load:  # fmt: skip
        assert load.stdin is not None and load.stdout is not None and load.stderr is not None
        load.stdin.write(archive[:1024])
        load.stdin.flush()
        with contextlib.closing(sqlite3.connect(box.root / "store.db")) as database:
            query = "SELECT 1 FROM leases"
            wait_until(lambda: database.execute(query).fetchall(), 30, "the lease")
        assert b"load" in Path(f"/proc/{load.pid}/cmdline").read_bytes()
        load.send_signal(way)
        assert load.wait(30) == code
        wait_until(
            lambda: not list((box.root / "locks").glob("*.lease")), 30, "the end of the lease"
        )
        load.stdin.close()
        assert (load.stdout.read(), load.stderr.read()) == (b"", b"")


def test_what_runs_by_the_spawner_gets_input_and_signals(box: Box) -> None:
    """A command that the spawner does is killed, interrupted and fed as if it did it itself."""
    box.sh("true")
    wait_until(lambda: list(box.run_root.glob("spawner-*")), 30, "the spawner")
    fed = box("run", "--rm", "-i", "--network", "none", "busybox", "cat", input="one\ntwo\n")
    assert fed.stdout == "one\ntwo\n"
    assert box("run", "--rm", "--network", "none", "busybox", "sh", "-c", "exit 7", code=7)
    script = "trap 'echo caught; exit 9' TERM; echo ready; while :; do sleep 0.05; done"

    def begun(*words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen([COMMAND, *words, "sh", "-c", script], env=box.environment,
                                   stdout=subprocess.PIPE, text=True)  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    with begun("run", "--rm", "--network", "none", "busybox") as process:
        process.terminate()
        assert process.wait(30) == 9
        assert process.stdout is not None
        assert process.stdout.read() == "caught\n"
    with begun("run", "--network", "none", "--name", "left", "busybox") as process:
        process.kill()
        process.wait(30)
        assert process.stdout is not None
        assert process.stdout.read() == ""  # whoever wrote there is gone, too
    assert box.state("left")["Status"] == "running"
    with begun("exec", "left") as process:
        process.send_signal(signal.SIGHUP)
        assert process.wait(30) == -signal.SIGHUP


def test_a_shared_file_is_cached_once(box: Box) -> None:
    """Two containers of one image read the same layer file: the kernel keeps one copy of it."""
    for name in ("left", "right"):
        box.start(name)
        assert len(box.out("exec", name, "md5sum", "/bin/busybox").split()) == 2
    inode = {
        box.out("exec", name, "stat", "-c", "%i", "/bin/busybox") for name in ("left", "right")
    }
    assert len(inode) == 1


@pytest.mark.parametrize(
    "count", [4, pytest.param(50, marks=(pytest.mark.long, pytest.mark.timeout(600)))]
)
def test_many_containers_of_one_image_at_once(box: Box, count: int) -> None:
    """Together they read a file of a lower layer from the disk once; each holds little memory."""
    size = 8 << 20
    box.start("maker", command=f"head -c {size} /dev/urandom > /big; sync; echo done; sleep 1000")
    wait_until(lambda: box.out("logs", "maker") == "done\n", 30)
    box("commit", "maker", "big")
    box("rm", "-f", "maker")
    (layer,) = (path for path in box.root.glob("diff/*/big"))
    _forget_pages(layer)
    names = [f"many-{number}" for number in range(count)]
    # /proc/PID/io counts what came from the disk, that of ended children too
    script = "cat /big > /dev/null; cat /proc/1/io > /io.new; mv /io.new /io; sleep 1000"
    words = ("run", "-d", "--network", "none")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda one: box(*words, "--name", one, "big", "sh", "-c", script), names))
    assert sorted(box.names()) == sorted(names)
    reports = [box.directory(name) / "upper/io" for name in names]
    wait_until(lambda: all(report.exists() for report in reports), 60)
    daemons = [pid for name in names for pid in servers_of(box, name)]
    monitors = [monitor_of(box, name) for name in names]
    read = sum(_read_bytes(report) for report in reports)
    read += sum(_read_bytes(Path(f"/proc/{pid}/io")) for pid in daemons)
    assert size <= read < 2 * size, f"{count} containers read {read} bytes of {size} from the disk"
    held = sum(_anonymous(pid) for pid in (*daemons, *monitors)) / count
    assert held < 40 << 20, f"{held / 1e6:.1f} MB of anonymous memory for each container"
    pids = [box.state(name)["Pid"] for name in names]
    assert len(set(pids)) == count
    box("rm", "-f", *names, timeout=200)
    assert nothing_left(box)
    assert not [pid for pid in (*pids, *daemons, *monitors) if Path(f"/proc/{pid}/exe").exists()]


def _forget_pages(path: Path) -> None:
    """Take a file out of the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_bytes(report: Path) -> int:
    lines = report.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def _anonymous(pid: int) -> int:
    """Bytes of anonymous memory, what is shared divided by those who share it."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss_Anon:"))


@pytest.mark.parametrize("runtime", ["crun", "runc"])
def test_a_user_namespace_of_its_own(box: Box, runtime: str) -> None:
    box.start(
        "mapped",
        "--userns",
        "auto",
        "--runtime",
        runtime,
        "-v",
        "filled:/srv",
        "-v",
        "fresh:/fresh",
        command="touch /made /srv/made /fresh/made; chown tester /made; sleep 1000",
    )
    pid = box.state("mapped")["Pid"]
    inside, outside, size = Path(f"/proc/{pid}/uid_map").read_text().split()
    assert (inside, int(size) >= 65536) == ("0", True) and int(outside) > 0
    assert Path(f"/proc/{pid}").stat().st_uid == int(outside)
    assert os.readlink(f"/proc/{pid}/ns/user") != os.readlink("/proc/self/ns/user")
    wait_until(lambda: (box.root / "volumes/fresh/_data/made").exists())
    out = box.out("exec", "mapped", "stat", "-c", "%u", "/", "/made", "/srv/seed", "/fresh/made")
    assert out.split() == ["0", "1000", "0", "0"]
    # on the disk the layer holds the owners as the image has them
    upper = box.directory("mapped") / "upper"
    wait_until(lambda: (upper / "made").stat().st_uid == 1000)
    assert (
        "fuse" in box("run", "--userns", "auto", "--driver", "overlay", "busybox", code=125).stderr
    )
