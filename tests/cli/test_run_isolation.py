"""What a container may and what it is limited to, read from inside or from the kernel."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from harness.containers import Box
from harness.waiting import wait_until

RUNTIMES = pytest.mark.parametrize("runtime", ["crun", "runc"])
LEGACY = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes").exists()


def status(box: Box, *options: str) -> dict[str, str]:
    """/proc/self/status of a process in a container."""
    lines = box.sh("cat /proc/self/status", *options).splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def cgroup(box: Box, name: str, controller: str, v1: str, v2: str) -> str:
    """The number or line in a cgroup file of a running container, as this host sees it."""
    pid = box.state(name)["Pid"]
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if LEGACY and controller in names.split(","):
            return Path("/sys/fs/cgroup", controller, path[1:], v1).read_text().strip()
        if not LEGACY and names == "":
            return Path("/sys/fs/cgroup", path[1:], v2).read_text().strip()
    raise AssertionError(f"no cgroup for {controller}")


@RUNTIMES
def test_namespaces_are_its_own(box: Box, runtime: str) -> None:
    kinds = ("pid", "net", "mnt", "uts", "ipc", "cgroup")
    script = "for kind in " + " ".join(kinds) + "; do readlink /proc/self/ns/$kind; done"
    inside = box.sh(script, "--runtime", runtime).split()
    outside = [os.readlink(f"/proc/self/ns/{kind}") for kind in kinds]
    assert not set(inside) & set(outside)


def test_namespaces_of_the_host(box: Box) -> None:
    script = "readlink /proc/self/ns/pid /proc/self/ns/net /proc/self/ns/uts /proc/self/ns/ipc"
    out = box.out(
        "run",
        "--rm",
        "--pid",
        "host",
        "--network",
        "host",
        "--uts",
        "host",
        "--ipc",
        "host",
        "busybox",
        "sh",
        "-c",
        f"for n in {script[9:]}; do readlink $n; done",
    )
    assert out.split() == [os.readlink(f"/proc/self/ns/{n}") for n in ("pid", "net", "uts", "ipc")]


def test_namespaces_of_another_container(box: Box) -> None:
    box.start("first", "--ipc", "shareable", command="echo hi > /dev/shm/note; sleep 1000")
    theirs = [box.out("exec", "first", "readlink", f"/proc/self/ns/{n}") for n in ("net", "ipc")]
    out = box.out(
        "run",
        "--rm",
        "--network",
        "container:first",
        "--ipc",
        "container:first",
        "--pid",
        "container:first",
        "busybox",
        "sh",
        "-c",
        "readlink /proc/self/ns/net; readlink /proc/self/ns/ipc; cat /dev/shm/note; ps",
    )
    assert out.startswith("".join(theirs) + "hi\n")
    assert "sleep 1000" in out
    box("stop", "-t", "0", "first")
    done = box("run", "--network", "container:first", "busybox", code=125)
    assert "not running" in done.stderr


@RUNTIMES
def test_capabilities(box: Box, runtime: str) -> None:
    use = ("--runtime", runtime)
    assert status(box, *use)["CapEff"] == "00000000a80425fb"
    assert status(box, *use, "--cap-drop", "ALL")["CapBnd"] == "0" * 16
    assert status(box, *use, "--cap-drop", "ALL", "--cap-add", "chown")["CapEff"] == f"{1:016x}"
    assert int(status(box, *use, "--cap-add", "NET_ADMIN")["CapEff"], 16) >> 12 & 1
    assert status(box, *use, "-u", "tester")["CapEff"] == "0" * 16
    assert status(box, *use, "-u", "tester")["CapBnd"] == "00000000a80425fb"


def test_capabilities_that_cannot_be_had(box: Box) -> None:
    assert "unknown capability" in box("run", "--cap-add", "FLYING", "busybox", code=125).stderr
    mask = Path("/proc/self/status").read_text().partition("CapBnd:\t")[2].split()[0]
    done = box(
        "run",
        "--rm",
        "--network",
        "none",
        "--cap-add",
        "SYS_RESOURCE",
        "busybox",
        "true",
        code=None,
    )
    assert done.returncode == (0 if int(mask, 16) >> 24 & 1 else 125)


@RUNTIMES
def test_privileged(box: Box, runtime: str) -> None:
    facts = status(box, "--privileged", "--runtime", runtime)
    mask = Path("/proc/self/status").read_text().partition("CapBnd:\t")[2].split()[0]
    assert facts["CapEff"] == mask
    assert facts["Seccomp"] == "0"
    out = box.sh(
        "ls /dev/fuse; mount -t tmpfs x /tmp && echo mounted; cat /proc/interrupts | wc -l",
        "--privileged",
        "--runtime",
        runtime,
    ).split()
    assert out[:2] == ["/dev/fuse", "mounted"]
    assert int(out[2]) > 1


@RUNTIMES
def test_seccomp(box: Box, runtime: str, tmp_path: Path) -> None:
    use = ("--runtime", runtime)
    assert status(box, *use)["Seccomp"] == "2"
    assert status(box, *use, "--security-opt", "seccomp=unconfined")["Seccomp"] == "0"
    assert "ermitted" in box.sh("unshare -U true 2>&1; true", *use)
    # with the capability the call is allowed
    assert box.sh("unshare -m echo ok", *use, "--cap-add", "SYS_ADMIN") == "ok\n"
    profile = tmp_path / "profile.json"
    rules = [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13}]
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}))
    out = box.sh("mkdir /x 2>&1; true", *use, "--security-opt", f"seccomp={profile}")
    assert "Permission denied" in out
    profile.write_text("{")
    done = box("run", "--security-opt", f"seccomp={profile}", "busybox", code=125)
    assert "not JSON" in done.stderr


def test_no_new_privileges(box: Box) -> None:
    assert status(box)["NoNewPrivs"] == "0"
    assert status(box, "--security-opt", "no-new-privileges")["NoNewPrivs"] == "1"
    assert "not supported" in box("run", "--security-opt", "x=y", "busybox", code=125).stderr


@RUNTIMES
def test_masked_and_read_only_paths(box: Box, runtime: str) -> None:
    script = (
        "wc -c < /proc/keys; ls /proc/acpi /sys/firmware | grep -v :;"
        " touch /sys/x; echo x > /proc/sys/kernel/hostname"
    )
    out = box.sh(
        f"({script}) 2>&1; echo 1 > /proc/sysrq-trigger || echo refused", "--runtime", runtime
    )
    assert out.split("\n")[0] == "0"
    assert "refused" in out
    assert out.count("Read-only file system") >= 2
    if runtime == "crun":
        assert int(box.sh("wc -c < /proc/keys", "--security-opt", "systempaths=unconfined")) >= 0


@RUNTIMES
def test_memory_limit_is_enforced(box: Box, runtime: str) -> None:
    box.start(
        "eater",
        "-m",
        "32m",
        "--runtime",
        runtime,
        command="sleep 0.2; dd if=/dev/zero of=/dev/shm/x bs=1M count=60; sleep 1000",
    )
    assert cgroup(box, "eater", "memory", "memory.limit_in_bytes", "memory.max") == str(32 << 20)
    box(
        "run",
        "--rm",
        "--network",
        "none",
        "-m",
        "16m",
        "--runtime",
        runtime,
        "busybox",
        "sh",
        "-c",
        "x=a; while :; do x=$x$x; done",
        code=137,
    )


def test_oom_is_told(box: Box) -> None:
    box.start("doomed", "-m", "16m", command="x=a; while :; do x=$x$x; done")
    box("wait", "doomed")
    state = box.state("doomed")
    assert (state["OOMKilled"], state["ExitCode"]) == (True, 137)


@RUNTIMES
def test_cpu_and_process_limits(box: Box, runtime: str) -> None:
    box.start(
        "small",
        "--cpus",
        "0.5",
        "--cpu-shares",
        "512",
        "--cpuset-cpus",
        "0",
        "--pids-limit",
        "7",
        "--runtime",
        runtime,
    )
    quota = cgroup(box, "small", "cpu", "cpu.cfs_quota_us", "cpu.max")
    assert quota in ("50000", "50000 100000")
    if LEGACY:
        assert cgroup(box, "small", "cpu", "cpu.shares", "") == "512"
    assert cgroup(box, "small", "cpuset", "cpuset.cpus", "cpuset.cpus") == "0"
    assert cgroup(box, "small", "pids", "pids.max", "pids.max") == "7"
    many = "for n in 1 2 3 4 5 6 7 8 9; do sleep 1 & done"
    done = box("exec", "small", "sh", "-c", many, code=None)
    assert "can't fork" in done.stderr


@RUNTIMES
def test_no_limit_of_processes(box: Box, runtime: str) -> None:
    for number in ("-1", "0"):
        box.start(f"many{number}", "--pids-limit", number, "--runtime", runtime)
        assert cgroup(box, f"many{number}", "pids", "pids.max", "pids.max") == "max"
    box("update", "--pids-limit", "9", "many0")
    assert cgroup(box, "many0", "pids", "pids.max", "pids.max") == "9"
    box("update", "--pids-limit", "-1", "many0")
    assert cgroup(box, "many0", "pids", "pids.max", "pids.max") in ("max", "4194304")


def test_limits_that_cannot_be_enforced_are_refused(box: Box) -> None:
    bfq = any("[bfq]" in path.read_text() for path in Path("/sys/block").glob("*/queue/scheduler"))
    done = box(
        "run", "--rm", "--network", "none", "--blkio-weight", "100", "busybox", "true", code=None
    )
    assert done.returncode == (0 if bfq else 125)
    assert bfq or "no disk of this host uses the bfq scheduler" in done.stderr
    for words, said in (
        (("--cpus", "4096"), "--cpus"),
        (("--cpuset-cpus", "4095"), "not available"),
        (("--memory-swap", "1g"), "--memory"),
        (("--memory", "64m", "--memory-swap", "32m"), "below --memory"),
        (("--cpu-shares", "1"), "--cpu-shares"),
        (("--memory", "lots"), "not a size"),
    ):
        assert said in box("run", *words, "busybox", "true", code=125).stderr


@RUNTIMES
def test_update_changes_limits_at_once(box: Box, runtime: str) -> None:
    box.start("elastic", "-m", "64m", "--runtime", runtime)
    box("update", "-m", "32m", "--cpus", "0.25", "elastic")
    assert cgroup(box, "elastic", "memory", "memory.limit_in_bytes", "memory.max") == str(32 << 20)
    assert cgroup(box, "elastic", "cpu", "cpu.cfs_quota_us", "cpu.max").startswith("25000")
    assert box.state("elastic")["Status"] == "running"
    box("update", "elastic", code=1)
    box("update", "--restart", "on-failure:1", "elastic")
    box("exec", "elastic", "kill", "-9", "1", code=None)


def test_ulimits(box: Box) -> None:
    assert box.sh(
        "ulimit -n; ulimit -c", "--ulimit", "nofile=64:128", "--ulimit", "core=0"
    ).split() == ["64", "0"]
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    done = box(
        "run",
        "--rm",
        "--network",
        "none",
        "--ulimit",
        f"nofile={most + 1}",
        "busybox",
        "true",
        code=None,
    )
    mask = Path("/proc/self/status").read_text().partition("CapBnd:\t")[2].split()[0]
    assert done.returncode == (0 if int(mask, 16) >> 24 & 1 else 125)
    assert (
        "unknown limit"
        in box(
            "run", "--rm", "--network", "none", "--ulimit", "nonsense=1", "busybox", code=125
        ).stderr
    )


def test_sysctls(box: Box) -> None:
    out = box.sh(
        "cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/msgmax",
        "--sysctl",
        "net.ipv4.ip_forward=1",
        "--sysctl",
        "kernel.msgmax=4096",
    )
    assert out.split() == ["1", "4096"]
    done = box(
        "run", "--rm", "--network", "none", "--sysctl", "vm.swappiness=1", "busybox", code=125
    )
    assert "would change the host" in done.stderr


@RUNTIMES
def test_devices(box: Box, runtime: str) -> None:
    out = box.sh(
        "ls -l /dev/mine; cat /dev/mine | head -c 1 | wc -c; ls /dev/fuse 2>&1; "
        "mknod /tmp/k c 1 11; cat /tmp/k 2>&1 | head -1; true",
        "--device",
        "/dev/zero:/dev/mine:r",
        "--runtime",
        runtime,
    )
    assert "1,   5" in out
    assert "\n1\n" in out
    assert "No such file" in out
    assert "not permitted" in out  # the device cgroup lets nobody open /dev/kmsg
    assert "--device" in box("run", "--device", "/dev/nothing", "busybox", code=125).stderr


def test_shared_memory_size(box: Box) -> None:
    assert " 65536k" in box.sh("grep /dev/shm /proc/mounts").replace("size=", " ")
    assert "size=1024k" in box.sh("grep /dev/shm /proc/mounts", "--shm-size", "1m")


def test_hostname_and_hosts(box: Box) -> None:
    out = box.sh(
        "hostname; cat /etc/hostname; cat /etc/hosts; cat /etc/resolv.conf",
        "--hostname",
        "castle",
        "--add-host",
        "db:10.1.2.3",
        "--dns",
        "192.0.2.1",
        "--dns-search",
        "example.org",
        "--dns-option",
        "ndots:2",
    )
    assert out.split("\n")[:2] == ["castle", "castle"]
    assert "10.1.2.3\tdb" in out and "127.0.0.1\tlocalhost" in out
    assert "nameserver 192.0.2.1\nsearch example.org\noptions ndots:2\n" in out


def test_domain_name_and_annotations(box: Box) -> None:
    options = ("--domainname", "example.org", "--hostname", "castle", "--annotation", "a.b=c")
    box.start("named", *options)
    out = box.out("exec", "named", "sh", "-c", "cat /proc/sys/kernel/domainname; hostname")
    assert out.split() == ["example.org", "castle"]
    (bundle,) = box.run_root.glob(f"*/{box.directory('named').name[:16]}/bundle/config.json")
    assert json.loads(bundle.read_text())["annotations"] == {"a.b": "c"}


def test_oom_score(box: Box) -> None:
    assert box.sh("cat /proc/self/oom_score_adj", "--oom-score-adj", "500").strip() == "500"


def test_nothing_is_left_after_a_run(box: Box) -> None:
    identity = box.start("ghost", "-m", "64m")
    pid = box.state("ghost")["Pid"]
    box("rm", "-f", "ghost")
    assert not Path(f"/proc/{pid}").exists()
    found = subprocess.check_output(["find", "/sys/fs/cgroup", "-name", identity], text=True)
    assert found == ""
    wait_until(lambda: not list(box.run_root.glob(f"*/{identity[:16]}")))
