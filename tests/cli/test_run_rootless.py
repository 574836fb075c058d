"""Containers of somebody who is not root, with and without a range of subordinate ids."""

import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.containers import busybox_tar
from harness.waiting import wait_until

PROGRAM = "import sys\nfrom unionimage.cli import main\nsys.exit(main())\n"
REPOSITORY = Path(__file__).resolve().parents[2]


def interpreter() -> str:
    """A Python that everybody may start: this one may be below root's home."""
    mine = Path(os.path.realpath(sys.executable))
    open_to_all = all(path.stat().st_mode & stat.S_IXOTH for path in (mine, *mine.parents))
    return sys.executable if open_to_all else "/usr/bin/python3"


class Person:
    """A user without rights; `person("run", …)` is the command line."""

    def __init__(self, home: Path) -> None:
        self.uid = pwd.getpwnam("nobody").pw_uid
        self.home = home
        (home / "program.py").write_text(PROGRAM)
        (home / "image.tar").write_bytes(busybox_tar())
        for path in (home, *home.iterdir()):
            os.chown(path, self.uid, self.uid)
        paths = [str(REPOSITORY), str(REPOSITORY / "tools"), *filter(None, sys.path)]
        self.environment = {
            "HOME": str(home),
            "XDG_RUNTIME_DIR": str(home),
            "PATH": os.environ["PATH"],
            "PYTHONPATH": ":".join(paths),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def __call__(self, *words: str, code: int = 0) -> str:
        done = subprocess.run(
            [interpreter(), str(self.home / "program.py"), *words],
            env=self.environment,
            user=self.uid,
            group=self.uid,
            extra_groups=[],
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout if code == 0 else done.stderr

    def processes(self) -> list[int]:
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if str(self.home).encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        return found


@pytest.fixture(scope="module", params=["range", "alone"])
def person(request: pytest.FixtureRequest) -> Iterator[Person]:
    """Somebody with 65536 subordinate ids, and somebody with none."""
    files = [Path("/etc/subuid"), Path("/etc/subgid")]
    before = {path: path.read_bytes() if path.exists() else None for path in files}
    devices = {path: os.stat(path).st_mode for path in ("/dev/fuse", "/dev/net/tun")}
    home = Path(tempfile.mkdtemp(prefix="unionfuse-rootless-"))
    home.chmod(0o755)
    try:
        for path in devices:
            os.chmod(path, 0o666)
        lines = b"nobody:200000:65536\n" if request.param == "range" else b""
        for path in files:
            path.write_bytes((before[path] or b"") + lines)
        made = Person(home)
        made("import", "-c", 'CMD ["sh"]', str(home / "image.tar"), "busybox")
        yield made
        if names := made("ps", "-aq").split():
            made("rm", "-f", *names)
        for pid in made.processes():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not made.processes())
    finally:
        for path, mode in devices.items():
            os.chmod(path, stat.S_IMODE(mode))
        for path, content in before.items():
            if content is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(content)
        shutil.rmtree(home)


@pytest.mark.parametrize("runtime", ["crun", "runc"])
def test_run(person: Person, runtime: str) -> None:
    run = ("run", "--rm", "--network", "none", "--runtime", runtime, "busybox")
    script = "id -u; touch /made; stat -c %u /made /srv/seed; grep ' / ' /proc/mounts; exit 0"
    lines = person(*run, "sh", "-c", script).splitlines()
    assert lines[:3] == ["0", "0", "0"]
    assert "fuse.unionfuse" in lines[3]
    assert "not found" in person(*run, "no-such-command", code=127)


def test_other_owners(person: Person) -> None:
    run = ("run", "--rm", "--network", "none", "busybox", "sh", "-c")
    ranges = "200000" in person(*run, "cat /proc/self/uid_map")
    script = "touch /made; chown 1000:1000 /made && stat -c %u /made; true"
    assert person(*run, script) == ("1000\n" if ranges else "")


def test_a_published_port(person: Person) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    person(
        "run",
        "-d",
        "--name",
        "web",
        "-p",
        f"{port}:80",
        "-v",
        "pages:/srv",
        "busybox",
        "sh",
        "-c",
        "echo page > /srv/index.html; exec httpd -f -p 80 -h /srv",
    )

    def answer() -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2) as reply:
                return str(reply.read().decode())
        except OSError:
            return ""

    assert wait_until(answer) == "page\n"
    assert "web" in person("ps")
    assert "httpd" in person("exec", "web", "ps")
    assert "httpd" in person("top", "web")
    person("rm", "-f", "web")
    assert answer() == ""
    assert "page" in person(
        "run", "--rm", "--network", "none", "-v", "pages:/p", "busybox", "cat", "/p/index.html"
    )


def test_what_takes_root_is_refused(person: Person) -> None:
    assert "cannot be enforced" in person("run", "-m", "64m", "busybox", code=125)
    person("network", "create", "own")
    assert "needs root" in person("run", "--rm", "--network", "own", "busybox", code=125)
    person("network", "rm", "own")
    assert person("ps", "-aq") == ""


def test_build(person: Person) -> None:
    """COPY and RUN, with owners of their own where there is a range of ids; the result runs."""
    has_range = "nobody" in Path("/etc/subuid").read_text()
    context = person.home / "context"
    context.mkdir(exist_ok=True)
    owner = "--chown=5:6 " if has_range else ""
    (context / "Dockerfile").write_text(
        f"FROM busybox\nCOPY {owner}Dockerfile /copied\nRUN id -u > /ran && mkdir /d\n"
        "RUN rm -r /d && mkdir /d && touch /d/new\n"
    )
    os.chown(context, person.uid, person.uid)
    first = person("build", "-q", "-t", "built", str(context))
    assert person("build", "-q", str(context)) == first, "it is cached"
    words = "stat -c '%u:%g' /copied /ran; cat /ran; ls /d"
    said = person("run", "--rm", "--network", "none", "built", "sh", "-c", words).split()
    assert said == ["5:6" if has_range else "0:0", "0:0", "0", "new"]
