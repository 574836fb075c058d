"""`run`, `create`, `start`, `stop`, `ps`, `logs`, `rm` …: what a docker user does every day."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from harness.containers import COMMAND, Box
from harness.waiting import wait_until


def test_output_and_exit_code_are_those_of_the_process(box: Box) -> None:
    done = box(
        "run",
        "--rm",
        "--network",
        "none",
        "busybox",
        "sh",
        "-c",
        "echo a; echo b >&2; exit 3",
        code=3,
    )
    assert (done.stdout, done.stderr) == ("a\n", "b\n")
    assert box.names("-a") == []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("busybox", "no-such-command"), 127, "not found"),
        (("busybox", "/no/such/command"), 127, "no such file"),
        (("busybox", "/etc/passwd"), 126, "ermission denied"),
        (("busybox", "/etc"), 126, 'exec: "/etc": is a directory'),
        (("--runtime", "runc", "busybox", "/etc"), 126, 'exec: "/etc": is a directory'),
        (("-w", "/srv", "busybox", "./sub"), 126, 'exec: "./sub": is a directory'),
        (("--pull", "never", "no-such-image"), 125, "no such image"),
        (("--no-such-flag", "busybox"), 125, "--no-such-flag"),
        (("--gpus", "all", "busybox"), 125, "--gpus"),
        (("-v", "/no/such/dir:/x", "busybox", "true"), 125, "bind source path does not exist"),
        (("--user", "nobody-knows", "busybox", "true"), 125, "unable to find user"),
        (("--network", "nowhere", "busybox", "true"), 125, "nowhere"),
        (("--memory", "1k", "busybox", "true"), 125, "minimum is 6m"),
        (("--restart", "sometimes", "busybox", "true"), 125, "--restart"),
        (("--name", "not/a/name", "busybox", "true"), 125, "invalid container name"),
        (("--hostname", "a" * 65, "busybox", "true"), 125, "may have 64 bytes"),
        (("--cgroup-parent", "/a/../../b", "busybox", "true"), 125, "lead out of the cgroups"),
        (
            ("--platform", "linux/s390x", "--pull", "never", "busybox", "true"),
            125,
            "for linux/s390x",
        ),
        (("--platform", "nonsense/x/y/z", "busybox", "true"), 125, "nonsense"),
        (("--runtime", "no-runtime", "busybox", "true"), 125, "not installed"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    box: Box, words: tuple[str, ...], code: int, said: str
) -> None:
    network = () if "--network" in words else ("--network", "none")
    done = box("run", "--rm", *network, *words, code=code)
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert box.names("-a") == []


@pytest.mark.parametrize("runtime", ["crun", "runc"])
def test_both_runtimes_give_the_same_answers(box: Box, runtime: str) -> None:
    script = "id -u; grep CapEff /proc/self/status; grep ^Seccomp: /proc/self/status; exit 7"
    out = box.sh(script, "--runtime", runtime, code=7)
    assert out.split() == ["0", "CapEff:", "00000000a80425fb", "Seccomp:", "2"]
    box("run", "--rm", "--runtime", runtime, "--network", "none", "busybox", "nope", code=127)
    box("run", "--rm", "--runtime", runtime, "--network", "none", "busybox", "/etc", code=126)


def test_input_is_passed_on_and_ended(box: Box) -> None:
    text = "line\n" * 100_000
    out = box.out("run", "--rm", "-i", "--network", "none", "busybox", "wc", "-c", input=text)
    assert out.strip() == str(len(text))


def test_without_interactive_there_is_no_input(box: Box) -> None:
    out = box.out("run", "--rm", "--network", "none", "busybox", "wc", "-c", input="ignored")
    assert out.strip() == "0"


def test_much_output_arrives_whole_and_in_order(box: Box) -> None:
    out = box.sh("seq 1 200000")
    assert out == "".join(f"{number}\n" for number in range(1, 200_001))


def test_binary_output_is_not_changed(box: Box) -> None:
    done = subprocess.run(
        [COMMAND, "run", "--rm", "--network", "none", "busybox", "printf", r"\000\377\001"],
        env=box.environment,
        capture_output=True,
    )
    assert done.stdout == b"\x00\xff\x01"


def test_environment(box: Box, tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("# a comment\nFROM_FILE=1\nFROM_HOST\n\nTWICE=file\n")
    box.environment["FROM_HOST"] = "host"
    out = box.sh(
        "env",
        "-e",
        "TWICE=flag",
        "-e",
        "FROM_HOST",
        "-e",
        "UNSET_HERE",
        "--env-file",
        str(file),
        "--hostname",
        "hobbit",
    )
    lines = out.splitlines()
    for wanted in ("FROM_FILE=1", "FROM_HOST=host", "TWICE=flag", "HOSTNAME=hobbit", "HOME=/root"):
        assert wanted in lines
    assert not any(line.startswith("UNSET_HERE") for line in lines)


def test_working_directory_user_and_groups(box: Box) -> None:
    out = box.sh(
        "pwd; id -u; id -g; id -G; echo $HOME",
        "-w",
        "/a/new/one",
        "-u",
        "tester",
        "--group-add",
        "3000",
    )
    assert out.split("\n")[:3] == ["/a/new/one", "1000", "1000"]
    assert set(out.split("\n")[3].split()) == {"1000", "2000", "3000"}
    assert out.split("\n")[4] == "/home/tester"
    assert box.sh("id -u; id -g", "-u", "4711:12").split() == ["4711", "12"]
    groups = "grep Groups /proc/self/status"
    assert box.sh(groups).split() == ["Groups:", "0"]
    assert box.sh(groups, "-u", "4711:12").split() == ["Groups:", "12"]
    box.start("grouped", "-u", "tester")
    assert box.out("exec", "grouped", "sh", "-c", groups).split() == ["Groups:", "1000", "2000"]


def test_what_follows_the_image_is_its_own(box: Box) -> None:
    begin = ("run", "--rm", "--network", "none")
    echo = ("--entrypoint", "echo", "busybox")
    assert box.out(*begin, *echo, "--", "--rm", "x") == "-- --rm x\n"
    assert box.out(*begin, "--", "busybox", "echo", "--", "x") == "-- x\n"
    box.start("lives")
    assert "--" in box("exec", "lives", "--", "true", code=127).stderr


def test_entrypoint(box: Box) -> None:
    out = box.out("run", "--rm", "--network", "none", "--entrypoint", "echo", "busybox", "-n", "x")
    assert out == "x"
    box("run", "--rm", "--network", "none", "--entrypoint", "", "busybox", code=125)


def test_the_image_decides_what_is_not_said(box: Box) -> None:
    box.image(
        "app",
        entrypoint=("sh", "-c"),
        cmd=("id -u; pwd; echo $KIND",),
        user="tester",
        working_dir="/srv",
        env=("KIND=image", "PATH=/bin"),
        labels={"from": "image"},
    )
    assert box.out("run", "--rm", "--network", "none", "app").split() == ["1000", "/srv", "image"]
    assert box.out("run", "--rm", "--network", "none", "app", "echo other") == "other\n"


def test_read_only_root_and_tmpfs(box: Box) -> None:
    out = box.sh(
        "touch /x 2>&1; touch /scratch/y && echo fine; grep ' /scratch ' /proc/mounts",
        "--read-only",
        "--tmpfs",
        "/scratch:size=1m,mode=1777",
    )
    assert "Read-only file system" in out
    assert "fine" in out
    assert "size=1024k" in out and "noexec" in out and "nosuid" in out


def test_detached_container_from_birth_to_death(box: Box) -> None:
    identity = box.start("job", "-l", "kind=test", command="echo out; echo err >&2; sleep 1000")
    assert len(identity) == 64
    wait_until(lambda: box("logs", "job").stderr == "err\n")
    row = json.loads(box.out("ps", "--format", "json"))
    assert (row["Names"], row["ID"], row["Image"]) == ("job", identity[:12], "busybox")
    assert row["Status"].startswith(("Up ", "Less"))
    assert box.out("logs", "job") == "out\n"
    box("rm", "job", code=1)
    box("stop", "-t", "0", "job")
    assert box.names() == []
    assert box.names("-a", "--filter", "exited=137") == ["job"]
    assert box.out("rm", identity[:6]).strip() == identity[:6]
    assert box.names("-a") == []


def test_upper_survives_stop_and_start_and_goes_with_rm(box: Box) -> None:
    box.start("keeper", command="date +%N >> /kept; sleep 1000")
    upper = box.directory("keeper") / "upper"
    box("stop", "-t", "0", "keeper")
    assert len((upper / "kept").read_text().split()) == 1
    box("start", "keeper")
    wait_until(lambda: len((upper / "kept").read_text().split()) == 2)
    box("rm", "-f", "keeper")
    assert not upper.exists()


def test_stop_sends_the_stop_signal_first(box: Box) -> None:
    box.start(
        "polite",
        "--stop-signal",
        "USR1",
        command="trap 'echo bye; exit 9' USR1; echo up; while :; do sleep 0.05; done",
    )
    wait_until(lambda: "up" in box.out("logs", "polite"))
    began = time.monotonic()
    box("stop", "polite")
    assert time.monotonic() - began < 5
    assert box.out("logs", "polite") == "up\nbye\n"
    assert box.out("wait", "polite").strip() == "9"


def test_kill_and_wait(box: Box) -> None:
    box.start("victim", command="trap 'exit 5' HUP; echo up; while :; do sleep 0.05; done")
    wait_until(lambda: "up" in box.out("logs", "victim"))
    waiter = subprocess.Popen(
        [COMMAND, "wait", "victim"], env=box.environment, stdout=subprocess.PIPE, text=True
    )
    time.sleep(0.3)
    box("kill", "-s", "HUP", "victim")
    assert waiter.communicate(timeout=10)[0] == "5\n"
    assert "is not running" in box("kill", "victim", code=1).stderr


def test_ctrl_c_reaches_the_process(box: Box) -> None:
    script = "trap 'echo caught; exit 4' INT; echo up; while :; do sleep 0.05; done"
    process = subprocess.Popen(
        [COMMAND, "run", "--rm", "--network", "none", "busybox", "sh", "-c", script],
        env=box.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10)[0] == "caught\n"
    assert process.returncode == 4


def test_the_container_goes_on_when_its_command_is_killed(box: Box) -> None:
    process = subprocess.Popen(
        [
            COMMAND,
            "run",
            "--name",
            "orphan",
            "--network",
            "none",
            "busybox",
            "sh",
            "-c",
            "echo up; sleep 0.5; echo later; sleep 1000",
        ],
        env=box.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.kill()
    process.communicate()
    wait_until(lambda: "later" in box.out("logs", "orphan"))
    assert box.names() == ["orphan"]


def test_pause_freezes(box: Box) -> None:
    box.start("clock", command="while :; do echo tick; sleep 0.02; done")
    wait_until(lambda: "tick" in box.out("logs", "clock"))
    box("pause", "clock")
    frozen = len(box.out("logs", "clock"))
    time.sleep(0.3)
    assert len(box.out("logs", "clock")) == frozen
    assert "(Paused)" in box.out("ps")
    assert "unpause it first" in box("exec", "clock", "true", code=1).stderr
    box("unpause", "clock")
    wait_until(lambda: len(box.out("logs", "clock")) > frozen)
    box("pause", "clock")
    box("rm", "-f", "clock")


def test_names_and_ids(box: Box) -> None:
    first = box.start("twin-one")
    box.start("twin-two")
    assert "is in use" in box("run", "--name", "twin-one", "busybox", code=125).stderr
    box("rename", "twin-one", "renamed")
    assert set(box.names()) == {"renamed", "twin-two"}
    assert box.inspect(first[:10])["Name"] == "/renamed"
    assert box.inspect("renamed")["Id"] == first
    assert "is in use" in box("rename", "renamed", "twin-two", code=1).stderr
    assert "no such container" in box("stop", "twin-one", code=1).stderr


def test_ps_filters(box: Box) -> None:
    box.start("red", "-l", "colour=red")
    box("create", "--name", "blue", "-l", "colour=blue", "busybox", "true")
    assert box.names("-a", "--filter", "label=colour=red") == ["red"]
    assert box.names("-a", "--filter", "status=created") == ["blue"]
    assert set(box.names("-a", "--filter", "label=colour")) == {"red", "blue"}
    assert box.names("-a", "--filter", "name=^/bl") == ["blue"]
    assert set(box.names("-a", "--filter", "ancestor=busybox")) == {"red", "blue"}
    assert box.names("-l") == ["blue"]
    assert box.names("-a", "--filter", "since=red") == ["blue"]
    assert "colour" in box("ps", "--filter", "colour=red", code=1).stderr


def test_ps_fields(box: Box) -> None:
    box("create", "--name", "one", "--tmpfs", "/t", "-v", "volume-of-many-letters:/v", "busybox")
    (row,) = map(json.loads, box.out("ps", "-a", "--json").splitlines())
    assert (row["Mounts"], row["LocalVolumes"]) == ("volume-of-many…", "1")
    assert time.strptime(row["CreatedAt"].rpartition(" ")[0], "%Y-%m-%d %H:%M:%S %z")
    full = box.out("ps", "-a", "--no-trunc", "--format", "{{.Mounts}}").strip()
    assert full == "volume-of-many-letters"


def test_cidfile_and_create_and_start_attached(box: Box, tmp_path: Path) -> None:
    file = tmp_path / "cid"
    identity = box.out(
        "create",
        "--cidfile",
        str(file),
        "--network",
        "none",
        "busybox",
        "sh",
        "-c",
        "echo hi; exit 6",
    ).strip()
    assert file.read_text() == identity
    assert box.out("start", "-a", identity, code=6) == "hi\n"
    box("create", "--cidfile", str(file), "busybox", code=125)
    assert len(box.out("ps", "-aq").split()) == 1


def test_logs_tail_since_timestamps_and_follow(box: Box) -> None:
    box.start("talker", command="for n in 1 2 3 4 5; do echo $n; sleep 0.1; done")
    box("wait", "talker")
    assert box.out("logs", "--tail", "2", "talker") == "4\n5\n"
    stamps = [line.split()[0] for line in box.out("logs", "-t", "talker").splitlines()]
    assert stamps == sorted(stamps)
    assert box.out("logs", "--since", stamps[3], "talker") == "4\n5\n"
    assert box.out("logs", "--until", stamps[1], "talker") == "1\n2\n"
    box("start", "talker")
    assert box.out("logs", "-f", "talker") == "1\n2\n3\n4\n5\n" * 2


def test_logs_rotate(box: Box) -> None:
    box.start(
        "chatty", "--log-opt", "max-size=20k", "--log-opt", "max-file=2", command="seq 1 3000"
    )
    box("wait", "chatty")
    files = sorted(path.name for path in box.directory("chatty").glob("log.json*"))
    assert files == ["log.json", "log.json.1"]
    assert all((box.directory("chatty") / name).stat().st_size <= 20 << 10 for name in files)
    kept = box.out("logs", "chatty").split()
    assert kept == [str(number) for number in range(3001 - len(kept), 3001)]
    box.start("mute", "--log-driver", "none", command="echo x")
    assert "none" in box("logs", "mute", code=1).stderr


def test_log_lines_are_dockers_json(box: Box) -> None:
    box.start("json", command="echo 'with \"quotes\"'; printf partial")
    box("wait", "json")
    lines = (box.directory("json") / "log.json").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["log"] for entry in entries] == ['with "quotes"\n', "partial"]
    assert {entry["stream"] for entry in entries} == {"stdout"}
    assert all(set(entry) == {"log", "stream", "time"} for entry in entries)


def test_restart_policies(box: Box) -> None:
    box.start("flaky", "--restart", "on-failure:2", command="echo try; exit 3")
    wait_until(lambda: box.state("flaky")["Status"] == "exited", what="giving up")
    assert box.out("logs", "flaky") == "try\n" * 3
    assert box.inspect("flaky")["RestartCount"] == 2
    box.start("fine", "--restart", "on-failure", command="exit 0")
    wait_until(lambda: box.state("fine")["Status"] == "exited")
    assert box.inspect("fine")["RestartCount"] == 0
    box.start("phoenix", "--restart", "always", command="echo up; sleep 0.1")
    wait_until(lambda: box.out("logs", "phoenix").count("up") > 2)
    box("stop", "-t", "0", "phoenix")
    count = box.out("logs", "phoenix").count("up")
    time.sleep(0.5)
    assert box.out("logs", "phoenix").count("up") == count
    assert box.names() == []


def test_exec(box: Box) -> None:
    box.start("host", "-e", "FROM=run", "-u", "tester")
    assert box.out("exec", "host", "sh", "-c", "echo $FROM; id -u; pwd") == "run\n1000\n/\n"
    assert (
        box.out(
            "exec",
            "-u",
            "0",
            "-w",
            "/srv",
            "-e",
            "MORE=x",
            "host",
            "sh",
            "-c",
            "id -u; pwd; echo $MORE",
        )
        == "0\n/srv\nx\n"
    )
    assert box("exec", "host", "sh", "-c", "exit 9", code=9).stderr == ""
    missing = box("exec", "host", "no-such", code=127)
    assert len(missing.stderr.splitlines()) == 1
    for words, said in (
        (("host", "/etc/passwd"), "permission denied"),
        (("host", "/etc"), "is a directory"),
        (("-w", "/nowhere", "host", "true"), "no such directory"),
        (("-d", "host", "/etc/passwd"), "permission denied"),
    ):
        refused = box("exec", *words, code=126).stderr
        assert said in refused
        assert len(refused.splitlines()) == 1
    assert box.out("exec", "-i", "host", "cat", input="typed") == "typed"
    box("exec", "-d", "-u", "0", "host", "touch", "/made")
    wait_until(lambda: (box.directory("host") / "upper/made").exists())
    assert "CapEff:\t00000000a80425fb" in box.out(
        "exec", "-u", "0", "host", "cat", "/proc/self/status"
    )
    box("stop", "-t", "0", "host")
    assert "start it first" in box("exec", "host", "true", code=1).stderr


def test_a_detached_exec_leaves_no_zombie(box: Box) -> None:
    """Its parent must be somebody who reaps: not every host's first process does."""
    identity = box.start("host")
    for _ in range(3):
        box("exec", "-d", "host", "true")
    members = Path(f"/sys/fs/cgroup/pids/unionfuse/{identity}/pids.current")
    if not members.exists():
        members = Path(f"/sys/fs/cgroup/unionfuse/{identity}/pids.current")
    wait_until(lambda: members.read_text().strip() == "1", what="the end of the others")


def test_top_shows_processes_of_the_container_only(box: Box) -> None:
    box.start("busy", command="sleep 4242 & sleep 4243")
    wait_until(lambda: box.out("top", "busy").count("sleep 424") == 2)
    lines = box.out("top", "busy", "-eo", "pid,args").splitlines()
    assert lines[0].split() == ["PID", "COMMAND"]
    assert sorted(line.split()[1] for line in lines[1:]) == ["sleep", "sleep"]


def test_events(box: Box) -> None:
    began = time.time()
    box.start("short", command="exit 3")
    box("wait", "short")
    box("rm", "short")
    lines = box.out(
        "events",
        "--since",
        str(began),
        "--until",
        "0s",
        "--filter",
        "container=short",
        "--format",
        "{{.Action}}",
    ).split()
    assert lines == ["create", "start", "die", "destroy"]
    died = json.loads(
        box.out(
            "events",
            "--since",
            str(began),
            "--until",
            "0s",
            "--filter",
            "event=die",
            "--format",
            "json",
        )
    )
    assert died["Actor"]["Attributes"]["exitCode"] == "3"


def test_container_prune(box: Box) -> None:
    box.start("lives")
    box("create", "--name", "waits", "busybox", "true")
    assert "--force" in box("container", "prune", code=1).stderr
    assert "Total reclaimed space" in box.out("container", "prune", "-f")
    assert box.names("-a") == ["lives"]


def test_init_reaps_and_passes_signals_on(box: Box) -> None:
    box.start("tended", "--init", command="sleep 1000 & exec sleep 1001")
    assert box.out("exec", "tended", "cat", "/proc/1/comm").strip() in ("docker-init", "tini")
    began = time.monotonic()
    box("stop", "tended")
    assert time.monotonic() - began < 5


def test_healthcheck(box: Box) -> None:
    box.start(
        "patient",
        "--health-cmd",
        "test -e /well",
        "--health-interval",
        "200ms",
        "--health-retries",
        "2",
        "--health-timeout",
        "5s",
    )

    def health() -> str:
        return str(box.state("patient").get("Health", {}).get("Status"))

    wait_until(lambda: health() == "unhealthy", what="unhealthy")
    assert "(unhealthy)" in box.out("ps")
    box("exec", "patient", "touch", "/well")
    wait_until(lambda: health() == "healthy", what="healthy")
    assert box.names("--filter", "health=healthy") == ["patient"]
    assert box.state("patient")["Health"]["Log"][-1]["ExitCode"] == 0
    box("run", "--health-cmd", "x", "--no-healthcheck", "busybox", code=125)


def test_a_health_check_that_takes_too_long_is_killed(box: Box) -> None:
    words = ("--health-cmd", "sleep 999", "--health-timeout", "200ms", "--health-interval", "100ms")
    box.start("slow", *words, "--health-retries", "1")
    wait_until(lambda: len((box.state("slow").get("Health") or {}).get("Log") or []) >= 3)
    assert box.state("slow")["Health"]["Status"] == "unhealthy"
    assert box.out("top", "slow").count("sleep 999") <= 1


def test_stop_all_before_a_shutdown_and_autostart_after(box: Box) -> None:
    quick = "trap 'exit 0' TERM; while :; do sleep 0.05; done"
    box.start("service", "--restart", "unless-stopped", command=quick)
    box.start("task", command=quick)
    box.start("retired", "--restart", "unless-stopped")
    box("stop", "-t", "0", "retired")
    box("update", "--restart", "no", "task")
    for name in ("service", "task"):
        box("exec", name, "true")
    box("container", "stop-all", timeout=90)
    assert box.names() == []
    assert box.out("container", "autostart") == "service\n"
    assert box.names() == ["service"]


def test_stop_and_start_in_a_row(box: Box) -> None:
    box.start("again", command="exit 3")
    for _ in range(5):
        assert box.out("wait", "again") == "3\n"
        box("start", "again")


def test_help_of_run_is_short_at_the_top(box: Box) -> None:
    """As docker's: one line says how, all options follow, one a line."""
    lines = box.out("run", "--help").splitlines()
    assert lines[0] == "usage: unionfuse run [OPTION…] IMAGE [COMMAND] [ARGUMENT…]"
    assert any(line.split()[:2] == ["-d,", "--detach"] for line in lines)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_the_caller_has_closed(box: Box, closed: str) -> None:
    """They are as /dev/null: nothing else gets their numbers, and nothing fails for them."""
    words = "run --rm --network none busybox sh -c 'cat; echo out; echo err >&2; exit 5'"
    done = subprocess.run(
        f"{COMMAND} {words} {closed}", shell=True, env=box.environment, capture_output=True
    )
    assert done.returncode == 5
    assert done.stdout == (b"" if " >&-" in f" {closed}" else b"out\n")
    assert done.stderr == (b"" if "2>&-" in closed else b"err\n")
