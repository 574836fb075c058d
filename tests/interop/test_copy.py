"""Copy over a real ssh connection: an sshd of the test's own on loopback, with throwaway keys."""

import os
import pwd
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.command import MAIN, Command, make_command, make_image
from harness.registry import OciLayout, Registry, layer_tar
from unionimage.errors import UserError
from unionimage.registry.ssh import Target

BASE = layer_tar(
    {"etc": None, "etc/hosts": b"127.0.0.1 localhost\n", "random": os.urandom(300_000)}
)
UPPER = layer_tar({"etc/new": b"new\n"})


FIRST_BYTES = """
import os, sys
left = int(sys.argv[1])
while left and (data := os.read(0, min(left, 65536))):
    left -= os.write(1, data)
"""


@dataclass
class Sshd:
    """A running sshd: `ssh` is the client's command line, `address` what to copy to."""

    ssh: str
    address: str


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.makedirs("/run/sshd", exist_ok=True)
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {folder}/host\nPidFile none\nUsePAM no\n"
        f"AuthorizedKeysFile {folder}/user.pub\nStrictModes no\nPermitRootLogin yes\n"
        "PasswordAuthentication no\n"
    )
    (folder / "known").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    log = folder / "log"
    with subprocess.Popen(
        ["/usr/sbin/sshd", "-D", "-E", str(log), "-f", str(folder / "sshd_config")]
    ) as process:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        options = f"-F none -i {folder}/user -o UserKnownHostsFile={folder}/known -o BatchMode=yes"
        user = pwd.getpwuid(os.getuid()).pw_name
        try:
            yield Sshd(f"ssh {options}", f"ssh://{user}@127.0.0.1:{port}")
        finally:
            process.terminate()


@pytest.fixture
def here(tmp_path: Path, sshd: Sshd) -> Command:
    return make_command(tmp_path, "here", UNIONFUSE_SSH=sshd.ssh)


@pytest.fixture
def there(tmp_path: Path) -> Command:
    return make_command(tmp_path, "there")


def remote(there: Command, before: str = "") -> str:
    """What is unionfuse on the other side, which does not share our environment."""
    config = there.environment["UNIONFUSE_CONFIG"]
    words = [sys.executable, "-c", MAIN, "--root", str(there.root)]
    return f"{before} UNIONFUSE_CONFIG={config} {shlex.join(words)}"


def test_only_the_layers_that_are_missing_move(sshd: Sshd, here: Command, there: Command) -> None:
    make_image(here, "base:1", [BASE])
    make_image(here, "app:1", [BASE, UPPER])
    to = ["--remote-command", remote(there)]
    out = here("copy", *to, "base:1", sshd.address)
    assert out.endswith(f"Copied base:1 to 127.0.0.1: 1 layers, {len(BASE)} bytes\n")
    out = here("copy", *to, "app:1", sshd.address)
    assert "Layer already exists" in out
    assert out.endswith(f"Copied app:1 to 127.0.0.1: 1 layers, {len(UPPER)} bytes\n")
    assert there.image_id("app:1") == here.image_id("app:1")
    out = here("copy", "-q", *to, "app:1", sshd.address)
    assert out == there.image_id("app:1") + "\n"


def test_what_came_from_a_registry_keeps_its_manifest(
    sshd: Sshd, here: Command, there: Command, tmp_path: Path
) -> None:
    layout = OciLayout(tmp_path / "oci")
    entry = layout.image("x", [BASE, UPPER, BASE])
    with Registry(tmp_path / "registry") as registry:
        layout.push("x", f"{registry.host}/x:1")
        here("pull", f"{registry.host}/x:1")
    here("copy", "--remote-command", remote(there), f"{registry.host}/x:1", sshd.address)
    with there.store() as store:
        image = store.image(f"{registry.host}/x:1")
        assert image.manifest_digest == entry["digest"]
        assert (image.layers[1].directory / "etc/new").read_bytes() == b"new\n"


def test_a_copy_that_broke_is_gone_on_with(
    sshd: Sshd, here: Command, there: Command, tmp_path: Path
) -> None:
    layout = OciLayout(tmp_path / "oci")
    layout.image("x", [layer_tar({"random": os.urandom(5_000_000)})])
    with Registry(tmp_path / "registry") as registry:
        layout.push("x", f"{registry.host}/x:1")
        here("pull", f"{registry.host}/x:1")
    name = f"{registry.host}/x:1"
    cut = tmp_path / "cut"
    first = shlex.join([sys.executable, "-c", FIRST_BYTES, "3000000"])
    cut.write_text(f'#!/bin/sh\n{first} | {sshd.ssh} "$@"\n')
    cut.chmod(0o755)
    to = ["--remote-command", remote(there)]
    error = here("copy", *to, "--ssh", str(cut), name, sshd.address, code=1)
    assert "bytes early" in error and error.count("\n") == 1
    out = here("copy", *to, name, sshd.address)
    moved = int(out.split()[-2])
    assert 1_000_000 < moved < 3_000_000
    assert there.image_id(name) == here.image_id(name)


def test_what_a_login_shell_prints_is_passed_over(
    sshd: Sshd, here: Command, there: Command
) -> None:
    make_image(here, "app:1", [BASE])
    words = remote(there, before="echo Welcome to this machine; echo '{}';")
    here("copy", "--remote-command", words, "app:1", sshd.address)
    assert there.image_id("app:1") == here.image_id("app:1")


def test_mistakes_get_one_line(sshd: Sshd, here: Command, there: Command) -> None:
    make_image(here, "app:1", [BASE])
    error = here("copy", "--remote-command", "/no/such", "app:1", sshd.address, code=1)
    assert "unionfuse is not found there; install it or use --remote-command" in error
    error = here("copy", "--remote-command", "true", "app:1", sshd.address, code=1)
    assert "the connection ended early" in error
    error = here("copy", "app:1", "ssh://127.0.0.1:1", code=1)
    assert "ssh could not connect" in error
    assert "no such image" in here("copy", "nope", sshd.address, code=1)
    assert "give an image" in here("copy", "app:1", code=1)
    error = here("copy", "--ssh", "/no/ssh", "app:1", sshd.address, code=1)
    assert "/no/ssh: No such file or directory" in error


@pytest.mark.parametrize(
    "address",
    [
        *("host", "http://host", "ssh://", "ssh://jo:pw@host", "ssh://-oProxyCommand=x"),
        *("ssh://h:x", "ssh://h/path", "ssh://-l@host"),
    ],
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(UserError):
        Target.parse(address)


@pytest.mark.parametrize(
    "offer",
    [
        b"",
        b"no json\n",
        b"{}\n",
        b'{"names":[],"manifest":-1,"config":1,"layers":[]}\n',
        b'{"names":["UPPER"],"manifest":0,"config":2,"layers":[]}\n{}',
        b'{"names":[],"manifest":0,"config":9999999999,"layers":[]}\n',
        b'{"names":[],"manifest":0,"config":200,"layers":[]}\n{"short":1}',
    ],
)
def test_a_hostile_sender_is_refused(there: Command, offer: bytes) -> None:
    done = subprocess.run(
        there.line("copy", "--receive"), input=offer, capture_output=True, env=there.environment
    )
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert done.stdout.startswith(b'unionfuse-copy-1 {"error": ') and done.stdout.count(b"\n") == 1
    with there.store() as store:
        assert store.images(all=True) == []
