"""The parts of containers that decide without starting anything."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unionimage.container import (
    capabilities,
    create,
    limits,
    logs,
    seccomp,
    terminal,
    usage,
    users,
    wire,
)
from unionimage.container import volumes as volume_flags
from unionimage.container.networks import Networks
from unionimage.container.processes import signal_number
from unionimage.container.state import Containers, new_id
from unionimage.errors import Conflict, NotFound, UserError

# ---- sizes, numbers, names


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("1b", 1), ("2k", 2048), ("1.5m", 3 << 19), ("1GB", 1 << 30), ("1gib", 1 << 30)],
)
def test_sizes(text: str, size: int) -> None:
    assert limits.parse_size(text, "-m") == size


@given(st.text())
def test_any_text_is_a_size_or_a_mistake(text: str) -> None:
    try:
        assert limits.parse_size(text, "-m") >= 0
    except UserError as error:
        assert "-m" in error.message


@given(st.text())
def test_any_text_is_a_cpu_set_or_a_mistake(text: str) -> None:
    try:
        assert limits.parse_cpu_set(text, "--cpuset-cpus")
    except UserError as error:
        assert "--cpuset-cpus" in error.message


def test_limits_as_the_runtime_takes_them() -> None:
    host = limits.Host(2, {"memory": Path("/nowhere"), "pids": Path("/x"), "cpu": Path("/x")})
    wanted = {"Memory": 64 << 20, "PidsLimit": -1, "NanoCpus": 500_000_000}
    found = limits.resources(wanted, host)
    assert found["memory"]["limit"] == 64 << 20
    assert "pids" not in found
    assert limits.resources({"PidsLimit": 7}, host)["pids"] == {"limit": 7}
    assert found["cpu"] == {"period": 100_000, "quota": 50_000}
    nothing = limits.Host(0, {})
    for key, value in (wanted | {"PidsLimit": 7}).items():
        with pytest.raises(UserError, match="cannot be enforced"):
            limits.resources({key: value}, nothing)
    assert limits.resources({}, nothing) == {}


def test_usage_is_read_from_cgroup_v2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files as the kernel's admin-guide/cgroup-v2.rst describes them."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.partition("::")[2] for line in lines if line.startswith("0::")), "/")
    tree = tmp_path / own.lstrip("/")
    tree.mkdir(parents=True, exist_ok=True)
    for name, text in {
        "cpu.stat": "usage_usec 1500000\nuser_usec 1000000\nsystem_usec 500000\n",
        "memory.current": "52428800\n",
        "memory.max": "max\n",
        "memory.stat": "anon 4096\nfile 8192\ninactive_file 20971520\nactive_file 0\n",
        "memory.events": "low 0\nhigh 0\nmax 31\noom 2\noom_kill 1\n",
        "io.stat": "8:0 rbytes=4096 wbytes=8192 rios=1 wios=2\n254:0 rbytes=4 wbytes=0\n",
        "pids.current": "12\n",
        "cgroup.procs": f"{os.getpid()}\n1\n",
    }.items():
        (tree / name).write_text(text)
    names = ("cpu", "io", "memory", "pids")
    monkeypatch.setattr(limits, "host", lambda: limits.Host(2, dict.fromkeys(names, tmp_path)))
    fake: Any = SimpleNamespace(state=lambda: {"Pid": os.getpid()})
    found = usage.sample(fake)
    assert found is not None
    assert (found.cpu, found.memory, found.pids) == (1_500_000_000, 31457280, 12)
    assert found.memory_limit == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert (found.read, found.written) == (4100, 8192)
    assert limits.processes(os.getpid()) == [1, os.getpid()]
    (tree / "memory.max").write_text("67108864\n")
    limited = usage.sample(fake)
    assert limited is not None and limited.memory_limit == 67108864
    assert limits.ran_out_of_memory(tree)
    (tree / "memory.events").write_text("low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\n")
    assert not limits.ran_out_of_memory(tree)


def test_which_limits_cgroup_v2_has(tmp_path: Path) -> None:
    (tmp_path / "child").mkdir()
    (tmp_path / "cpuset.cpus.effective").write_text("0-3\n")
    names = ("cpu", "cpuset", "io", "memory", "pids")
    v2 = limits.Host(2, dict.fromkeys(names, tmp_path))
    assert limits.resources({"CpusetCpus": "1-2", "CpuShares": 512}, v2)["cpu"] == {
        "cpus": "1-2",
        "shares": 512,
    }
    with pytest.raises(UserError, match="7 is not available, only 0-3"):
        limits.resources({"CpusetCpus": "7"}, v2)
    # without memory.swap.max in a child the kernel accounts no swap
    assert "swap" not in limits.resources({"Memory": 64 << 20}, v2)["memory"]
    with pytest.raises(UserError, match="does not account swap"):
        limits.resources({"Memory": 64 << 20, "MemorySwap": 128 << 20}, v2)
    (tmp_path / "child/memory.swap.max").write_text("max\n")
    assert limits.resources({"Memory": 64 << 20}, v2)["memory"]["swap"] == 128 << 20
    for config, said in (
        ({"MemorySwappiness": 10}, "no swappiness"),
        ({"OomKillDisable": True}, "--oom-kill-disable"),
        ({"Memory": 64 << 20, "MemoryReservation": 65 << 20}, "cannot be above"),
    ):
        with pytest.raises(UserError, match=said):
            limits.resources(config, v2)
    bare = limits.Host(2, {})
    for config in ({"Memory": 64 << 20}, {"PidsLimit": 3}, {"NanoCpus": 10**9}, {"CpuShares": 9}):
        with pytest.raises(UserError, match="cgroup controller"):
            limits.resources(config, bare)


def test_signals() -> None:
    assert signal_number("KILL") == signal_number("SIGKILL") == signal_number("9") == 9
    assert signal_number("sigrtmin+3") == signal.SIGRTMIN + 3
    assert signal_number(None) == signal.SIGTERM
    for text in ("0", "65", "NONE", "RTMIN+x", "-1"):
        with pytest.raises(UserError):
            signal_number(text)


def test_durations() -> None:
    assert create.duration("1m30.5s", "-x") == 90_500_000_000
    for text in ("", "5", "s", "1x", "1s "):
        with pytest.raises(UserError):
            create.duration(text, "-x")


# ---- capabilities and seccomp


def test_capabilities_add_and_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "available", lambda: frozenset(capabilities.NAMES))
    assert set(capabilities.chosen()) == set(capabilities.DEFAULT)
    assert capabilities.chosen(["net_admin"], ["all"]) == ["CAP_NET_ADMIN"]
    assert set(capabilities.chosen(["ALL"], ["MKNOD"])) == set(capabilities.NAMES) - {"CAP_MKNOD"}
    assert capabilities.chosen(privileged=True) == list(capabilities.NAMES)
    monkeypatch.setattr(capabilities, "available", lambda: frozenset({"CAP_CHOWN"}))
    assert capabilities.chosen() == ["CAP_CHOWN"]
    with pytest.raises(UserError, match="does not have it"):
        capabilities.chosen(["SYS_ADMIN"])


def allowed(profile: seccomp.Rule) -> set[str]:
    return {
        name
        for rule in profile["syscalls"]
        if rule["action"] == "SCMP_ACT_ALLOW" and "args" not in rule
        for name in rule["names"]
    }


def test_the_seccomp_profile_follows_capabilities() -> None:
    plain = allowed(seccomp.default_profile(capabilities.DEFAULT, "x86_64"))
    assert {"read", "chroot", "arch_prctl"} <= plain
    assert not {"mount", "unshare", "bpf", "reboot", "init_module", "keyctl", "clone3"} & plain
    admin = allowed(seccomp.default_profile(["CAP_SYS_ADMIN"], "x86_64"))
    assert {"mount", "unshare", "clone3", "clone"} <= admin
    assert "arch_prctl" not in allowed(seccomp.default_profile((), "aarch64"))


def test_a_docker_profile_keeps_what_applies() -> None:
    profile = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [
            {"names": ["a"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["b"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_X"]}},
            {"names": ["c"], "action": "SCMP_ACT_ALLOW", "excludes": {"caps": ["CAP_X"]}},
            {"names": ["d"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["arm64"]}},
            {"names": ["e"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "99.0"}},
        ],
    }
    assert allowed(seccomp.from_docker(profile, [], "x86_64")) == {"a", "c"}
    assert allowed(seccomp.from_docker(profile, ["CAP_X"], "aarch64")) == {"a", "b", "d"}
    with pytest.raises(UserError):
        seccomp.from_docker({}, [])


# ---- users


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / "root"
    (directory / "etc").mkdir(parents=True)
    (directory / "etc/passwd").write_text(
        "# comment\nroot:x:0:0::/root:/bin/sh\nweb:x:33:44::/srv:/bin/sh\nbroken:x\n1:x:77:7::/n:\n"
    )
    (directory / "etc/group").write_text("root:x:0:\nwww:x:44:\nextra:x:55:web,other\n")
    return directory


def test_users_are_looked_up_in_the_image(root: Path) -> None:
    assert users.find(root, "") == users.User(0, 0, (), "/root")
    assert users.find(root, "web") == users.User(33, 44, (55,), "/srv")
    assert users.find(root, "33") == users.User(33, 44, (55,), "/srv")
    assert users.find(root, "web:extra") == users.User(33, 55, (), "/srv")
    assert users.find(root, "4711:12") == users.User(4711, 12, (), "/")
    assert users.find(root, "1").uid == 77  # a name goes before a number
    assert users.find(root, "web", ["www", "99"]).groups == (55, 99)
    for text in ("nobody", "web:nothing", "broken"):
        with pytest.raises(UserError):
            users.find(root, text)


def test_a_link_in_an_image_leads_nowhere_else(root: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("evil:x:0:0::/:/bin/sh\n")
    (root / "etc/passwd").unlink()
    (root / "etc/passwd").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError):
        users.find(root, "evil")
    (root / "etc/passwd").unlink()
    os.mkfifo(root / "etc/passwd")
    assert users.find(root, "5").uid == 5


# ---- mounts and ports


def test_volume_flags() -> None:
    point = volume_flags.parse_volume("data:/srv:ro")
    assert (point["Type"], point["Name"], point["RW"]) == ("volume", "data", False)
    assert volume_flags.parse_volume("/etc:/x")["Type"] == "bind"
    assert volume_flags.parse_volume("/anon")["Name"] is None
    point = volume_flags.parse_mount("type=bind,source=/etc,target=/x,readonly")
    assert (point["Source"], point["Destination"], point["RW"]) == ("/etc", "/x", False)
    mount = volume_flags.mount_of(volume_flags.parse_tmpfs("/t:size=1m,exec"))
    assert "size=1048576" in mount.options
    assert "noexec" not in mount.options and "nosuid" in mount.options


@given(st.text())
def test_any_text_is_a_volume_or_a_mistake(text: str) -> None:
    for parse in (volume_flags.parse_volume, volume_flags.parse_tmpfs, volume_flags.parse_mount):
        try:
            assert parse(text)["Destination"].startswith("/")
        except UserError:
            pass


def test_ports() -> None:
    bindings = create._port_bindings(["8080:80", "127.0.0.1:53:53/udp", "7000-7001:70-71", "9"])
    assert bindings == {
        "80/tcp": [{"HostIp": "", "HostPort": "8080"}],
        "53/udp": [{"HostIp": "127.0.0.1", "HostPort": "53"}],
        "70/tcp": [{"HostIp": "", "HostPort": "7000"}],
        "71/tcp": [{"HostIp": "", "HostPort": "7001"}],
        "9/tcp": [{"HostIp": "", "HostPort": ""}],
    }
    for text in ("x", "80:", "1:2:3:4", "70000:1", "1-3:1-2", "80/icmp", "999.1.1.1:1:1"):
        with pytest.raises(UserError):
            create._port_bindings([text])


# ---- terminals and frames


def test_detach_keys() -> None:
    assert terminal.parse_detach_keys("ctrl-p,ctrl-q") == b"\x10\x11"
    assert terminal.parse_detach_keys("ctrl-],x") == b"\x1dx"
    with pytest.raises(UserError):
        terminal.parse_detach_keys("ctrl-p,")


@given(st.lists(st.binary(max_size=8)), st.binary(min_size=1, max_size=3))
def test_keys_pass_unless_they_are_the_sequence(typed: list[bytes], keys: bytes) -> None:
    whole = b"".join(typed)
    finder, passed, detached = terminal.DetachKeys(keys), b"", False
    for data in typed:
        part, detached = finder.feed(data)
        passed += part
        if detached:
            break
    if detached:
        assert keys in whole
        assert whole.startswith(passed + keys)
    else:
        assert whole.startswith(passed) and len(whole) - len(passed) < len(keys)


@given(
    st.lists(st.tuples(st.integers(0, 6), st.binary(max_size=50))),
    st.lists(st.integers(1, 20), min_size=1),
)
def test_frames_survive_any_cut(sent: list[tuple[int, bytes]], cuts: list[int]) -> None:
    data = b"".join(wire.frame(kind, payload) for kind, payload in sent)
    frames, received = wire.Frames(), []
    turn = 0
    while data:
        size = cuts[turn % len(cuts)]
        received += list(frames.feed(data[:size]))
        data, turn = data[size:], turn + 1
    assert received == sent


# ---- logs


@given(
    st.lists(st.tuples(st.sampled_from(["stdout", "stderr"]), st.binary(max_size=60)), max_size=20)
)
def test_what_is_logged_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, written: list[tuple[str, bytes]]
) -> None:
    path = tmp_path_factory.mktemp("log") / "log.json"
    writer = logs.Writer(path, 0, 1)
    for stream, data in written:
        writer.write(stream, data)
    writer.close()
    lines = list(logs.read(path))
    for stream in ("stdout", "stderr"):
        whole = b"".join(data for name, data in written if name == stream)
        text = "".join(line.text for line in lines if line.stream == stream)
        parts = [part.decode(errors="replace") for part in whole.split(b"\n")]
        assert text == "\n".join(parts)


def test_long_lines_are_cut_and_rotation_keeps_the_youngest(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    writer = logs.Writer(path, 4096, 3)
    writer.write("stdout", b"x" * (logs.LONGEST + 5))
    for number in range(500):
        writer.write("stdout", f"{number}\n".encode())
    writer.close()
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        "log.json",
        "log.json.1",
        "log.json.2",
    ]
    kept = [line.text for line in logs.read(path)]
    assert kept[-1] == "499\n"
    assert kept == [f"{number}\n" for number in range(500 - len(kept), 500)]
    assert [line.text for line in logs.read(path, tail=2)] == ["498\n", "499\n"]


def test_a_reader_follows_over_a_rotation(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    writer = logs.Writer(path, 400, 9)
    state = {"next": 0}

    def going_on() -> bool:
        for _ in range(3):
            writer.write("stdout", f"{state['next']}\n".encode())
            state["next"] += 1
        return state["next"] < 30

    seen = [int(line.text) for line in logs.read(path, follow=going_on)]
    writer.close()
    assert seen == list(range(30))


def test_a_damaged_line_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    good = json.dumps({"log": "x\n", "stream": "stdout", "time": "t"})
    path.write_text(f"{good}\n{{half\n[]\n{good}\n")
    assert [line.text for line in logs.read(path)] == ["x\n", "x\n"]


# ---- records


def record(name: str = "") -> dict[str, object]:
    return {"Id": new_id(), "Name": name, "Created": "now", "Config": {}, "HostConfig": {}}


def test_names_are_unique_and_ids_have_prefixes(tmp_path: Path) -> None:
    known = Containers(tmp_path / "store", tmp_path / "run")
    first = known.create(record("first"))
    assert known.find("first").id == known.find(first.id[:9]).id == first.id
    with pytest.raises(Conflict):
        known.create(record("first"))
    for name in ("a", "-a", "a b", "a/b", "ä1"):
        with pytest.raises(UserError):
            known.create(record(name))
    second = known.create(record())
    assert "_" in second.name
    known.rename(first, "other")
    with pytest.raises(NotFound):
        known.find("first")
    known.create(record("first"))
    known.delete(known.find("other"))
    with pytest.raises(NotFound):
        known.find(first.id)
    assert {one.name for one in known.all()} == {second.name, "first"}


def test_a_name_left_by_a_killed_command_is_free(tmp_path: Path) -> None:
    known = Containers(tmp_path / "store", tmp_path / "run")
    known.create(record("real"))
    (known.directory / "names/ghost").symlink_to("../" + "0" * 64)
    with pytest.raises(NotFound):
        known.find("ghost")
    assert known.create(record("ghost")).name == "ghost"
    (known.directory / ".new-x").mkdir()
    (known.directory / ".dead-x").mkdir()
    known.sweep()
    assert not list(known.directory.glob(".*-x"))


@pytest.mark.parametrize("name", ["x", "a b", "-a", "host", "default"])
def test_a_network_name_that_does_not_fit_is_told_what_does(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"only .* fit"):
        Networks(tmp_path).create(name)
    assert not any(tmp_path.rglob("*.json"))
