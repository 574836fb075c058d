"""Real servers from Debian's packages in containers on unionfuse."""

import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.containers import Box
from harness.debian import debian_root
from harness.waiting import wait_until

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

INSTALL = (
    "printf '#!/bin/sh\\nexit 101\\n' > /usr/sbin/policy-rc.d; chmod +x /usr/sbin/policy-rc.d;"
    " cp -a /host/apt/. /etc/apt/;"
    " export DEBIAN_FRONTEND=noninteractive;"
    " apt-get -q update && apt-get -q install -y --no-install-recommends nginx-light postgresql"
)


@pytest.fixture(scope="module")
def containers(scratch: Path) -> Iterator[Box]:
    """A store with the image `servers`: Debian, nginx and PostgreSQL, installed in a container."""
    directory = scratch / "servers"
    directory.mkdir()
    box = Box(directory, "fuse")
    with subprocess.Popen(
        ["tar", "-C", str(debian_root()), "--numeric-owner", "-c", "."], stdout=subprocess.PIPE
    ) as tar:
        assert tar.stdout is not None
        (directory / "debian.tar").write_bytes(tar.stdout.read())
    box("import", str(directory / "debian.tar"), "debian", timeout=300)
    (directory / "debian.tar").unlink()
    box(
        "run",
        "--name",
        "builder",
        "--network",
        "host",
        "-v",
        "/etc/apt:/host/apt:ro",
        "debian",
        "sh",
        "-c",
        INSTALL,
        timeout=600,
    )
    box("commit", "builder", "servers", timeout=300)
    box("rm", "builder")
    try:
        yield box
    finally:
        box.remove_all()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_nginx_with_a_volume_answers_from_the_host(box: Box) -> None:
    port = free_port()
    box(
        "run",
        "-d",
        "--name",
        "web",
        "-p",
        f"{port}:80",
        "-v",
        "site:/var/www/html",
        "servers",
        "nginx",
        "-g",
        "daemon off;",
    )

    def page() -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2) as answer:
                return str(answer.read().decode())
        except OSError:
            return ""

    assert "nginx" in wait_until(page, 20)
    box("exec", "web", "sh", "-c", "echo changed > /var/www/html/index.html")
    assert page() == "changed\n"
    box("exec", "web", "nginx", "-s", "reload")
    box("stop", "web")
    assert page() == ""
    assert box.inspect("web")["State"]["ExitCode"] == 0


def test_postgresql_keeps_its_data_on_a_volume(box: Box) -> None:
    def start() -> None:
        box(
            "run",
            "-d",
            "--name",
            "db",
            "-u",
            "postgres",
            "-v",
            "pg:/var/lib/postgresql",
            "--shm-size",
            "256m",
            "servers",
            "sh",
            "-c",
            "cd /var/lib/postgresql/*/main && exec /usr/lib/postgresql/*/bin/postgres -D $PWD"
            " -c config_file=$(ls /etc/postgresql/*/main/postgresql.conf)",
        )
        wait_until(lambda: sql("select 1", code=None).strip() == "1", 60, "the server")

    def sql(text: str, code: int | None = 0) -> str:
        words = ("exec", "-u", "postgres", "db", "psql", "-h", "/var/run/postgresql", "-Atc", text)
        return box.out(*words, code=code)

    start()
    sql("create table kept (number int); insert into kept select generate_series(1, 1000)")
    box("rm", "-f", "db")
    start()
    assert sql("select count(*), sum(number) from kept").strip() == "1000|500500"
    box("stop", "db")
    assert box.inspect("db")["State"]["ExitCode"] == 0
