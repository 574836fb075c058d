"""Pulls and pushes that are cut, killed, lied to, or that meet each other."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness.command import Command, make_command, make_image
from harness.hostile import Hostile, cut_after, stall_after, status
from harness.registry import OciLayout, Registry, compress, layer_tar, raw_digest, sha256
from unionimage.digest import Digest

BASE = layer_tar({"etc": None, "etc/hosts": b"127.0.0.1 localhost\n", "etc/old": b"x" * 5000})
UPPER = layer_tar({"etc": None, "etc/.wh.old": b"", "etc/new": b"new\n"})
BIG = layer_tar({"random": os.urandom(6_000_000)})


@pytest.mark.parametrize("compression", ["gzip", "none"])
def test_a_killed_pull_is_gone_on_with(command: Command, compression: str) -> None:
    with Hostile() as hostile:
        packed = compress(BIG, compression)
        hostile.add_image("1", BIG, packed=[packed])
        asked_for = f"GET .*{sha256(packed)}"
        hostile.trap(asked_for, stall_after(packed, 4_000_000))
        command.environment["UNIONFUSE_REGISTRY_TIMEOUT"] = "30"
        partial = command.root / "partial" / sha256(packed)[7:]
        with subprocess.Popen(
            command.line("pull", f"{hostile.host}/x:1"),
            env=command.environment,
            stdout=subprocess.DEVNULL,
        ) as process:
            deadline = time.monotonic() + 20
            while not (partial.exists() and partial.stat().st_size > 2_000_000):
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.05)
            process.kill()
        out = command("pull", f"{hostile.host}/x:1")
        assert "Resuming" in out and "Pull complete" in out
        range_ = hostile.asked_for(asked_for)[-1].headers["Range"]
        assert int(range_.removeprefix("bytes=").removesuffix("-")) > 2_000_000
        assert not partial.exists()


def test_what_a_broken_pull_left_may_be_wrong(command: Command) -> None:
    with Hostile() as hostile:
        packed = compress(BIG, "gzip")
        hostile.add_image("1", BIG, packed=[packed])
        with command.store() as store:
            partial = store.partial_path(Digest(sha256(packed)))
        partial.parent.mkdir(exist_ok=True)
        partial.write_bytes(packed[:500_000] + b"?" + packed[500_001:1_000_000])
        assert "Pull complete" in command("pull", f"{hostile.host}/x:1")
        first, second = hostile.asked_for(f"GET .*{sha256(packed)}")
        assert first.headers["Range"] == "bytes=1000000-" and "Range" not in second.headers


def test_an_interrupted_pull_ends_at_once(command: Command) -> None:
    with Hostile() as hostile:
        hostile.add_image("1", BIG, BASE)
        hostile.trap(f"GET .*{sha256(BIG)}", stall_after(BIG, 100_000))
        command.environment["UNIONFUSE_REGISTRY_TIMEOUT"] = "30"
        with subprocess.Popen(
            command.line("pull", f"{hostile.host}/x:1"),
            env=command.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            while b"Pull complete" not in process.stdout.readline():
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            begun = time.monotonic()
            _, errors = process.communicate(timeout=20)
        assert time.monotonic() - begun < 5
        assert process.returncode == 130 and b"Traceback" not in errors


def test_a_cut_and_trouble_do_not_stop_a_pull(command: Command) -> None:
    with Hostile() as hostile:
        digest = hostile.add_image("1", BIG)
        hostile.trap("GET .*/manifests/", status(503))
        hostile.trap(f"GET .*{sha256(BIG)}", cut_after(BIG, 1_000_000))
        hostile.trap(f"GET .*{sha256(BIG)}", status(429, Retry_After="0"))
        assert f"Digest: {digest}" in command("pull", f"{hostile.host}/x:1")


def test_a_layer_that_lies_leaves_nothing(command: Command) -> None:
    with Hostile() as hostile:
        hostile.add_image("1", BIG, BASE)
        hostile.blobs[sha256(BIG)] = BIG[:-4096] + bytes(4096)[:-1] + b"!"
        error = command("pull", f"{hostile.host}/x:1", code=1)
        assert "digest" in error and error.count("\n") == 1
        with command.store() as store:
            assert store.images(all=True) == []
            assert not store.has_layer(Digest(sha256(BIG)))
            store.collect()
        assert not [*(command.root / "diff").iterdir()]
        hostile.blobs[sha256(BIG)] = BIG
        command("pull", f"{hostile.host}/x:1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": []}, "the manifest has 0 layers, its config 1"),
        ({"schemaVersion": 1}, "schema version 2"),
        ({"config": None}, "config"),
        ({"layers": "x"}, "layers"),
        ({"mediaType": "application/x-unknown"}, "application/x-unknown"),
    ],
)
def test_a_manifest_that_disagrees_is_refused(
    command: Command, change: dict[str, object], message: str
) -> None:
    with Hostile() as hostile:
        digest = hostile.add_image("1", BASE)
        table = json.loads(hostile.manifests[digest][1])
        hostile.add_manifest("1", {**table, **change}, "application/octet-stream")
        error = command("pull", f"{hostile.host}/x:1", code=1)
        assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "media_type",
    [
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        "application/vnd.oci.image.layer.v1.tar+lz4",
        "text/html",
    ],
)
def test_a_foreign_or_unknown_layer_gets_a_clear_error(command: Command, media_type: str) -> None:
    with Hostile() as hostile:
        digest = hostile.add_image("1", BASE)
        table = json.loads(hostile.manifests[digest][1])
        table["layers"][0]["mediaType"] = media_type
        hostile.add_manifest("1", table)
        error = command("pull", f"{hostile.host}/x:1", code=1)
        assert media_type in error and error.count("\n") == 1


def test_an_interrupted_push_ends_at_once(command: Command) -> None:
    with Hostile() as hostile:
        make_image(command, f"{hostile.host}/team/app:1", [BIG])
        hostile.trap("PUT", lambda handler: handler.hostile.stop.wait(30) and None)
        command.environment["UNIONFUSE_REGISTRY_TIMEOUT"] = "30"
        with subprocess.Popen(
            command.line("push", f"{hostile.host}/team/app:1"),
            env=command.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            deadline = time.monotonic() + 20
            while not hostile.asked_for("PUT"):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            begun = time.monotonic()
            _, errors = process.communicate(timeout=40)
        assert time.monotonic() - begun < 5
        assert process.returncode == 130 and b"Traceback" not in errors


def test_an_image_that_did_not_change_costs_one_request(command: Command) -> None:
    with Hostile() as hostile:
        digest = hostile.add_image("1", BASE)
        hostile.trap("HEAD .*/manifests/1", status(200, Docker_Content_Digest=digest), times=-1)
        command("pull", f"{hostile.host}/x:1")
        hostile.asked.clear()
        assert "Image is up to date" in command("pull", f"{hostile.host}/x:1")
        asked = [f"{one.method} {one.path}" for one in hostile.asked]
        # Only on loopback: which scheme the registry speaks.
        assert asked == ["GET /v2/", "HEAD /v2/x/manifests/1"]
        assert "Image is up to date" in command("pull", f"{hostile.host}/x@{digest}")
        assert len(hostile.asked) == 2


# -- together, and in small ----------------------------------------------------------------------


def test_several_pulls_at_once_and_a_prune_do_no_harm(
    registry: Registry, command: Command, tmp_path: Path
) -> None:
    layout = OciLayout(tmp_path / "oci")
    layout.image("x", [BIG, BASE, UPPER])
    name = f"{registry.host}/together:1"
    layout.push("x", name)
    words = [("pull", name)] * 3 + [("prune", "-af")] + [("pull", name)] * 2
    running = [
        subprocess.Popen(
            command.line(*one),
            env=command.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for one in words
    ]
    for process in running:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0, out
    command("pull", name)
    assert "Pull complete" not in command("pull", name)
    other = make_command(tmp_path, "other")
    other("pull", name)
    assert other.image_id(name) == command.image_id(name)


def test_memory_stays_small_whatever_the_layer(
    registry: Registry, command: Command, tmp_path: Path
) -> None:
    layout = OciLayout(tmp_path / "oci")
    layout.image("x", [layer_tar({"zeros": bytes(250_000_000)})])
    name = f"{registry.host}/zeros:1"
    layout.push("x", name)
    noise = [layer_tar({f"{n}": os.urandom(1 << 20) * 40}) for n in range(5)]
    layout.image("several", noise)
    several = f"{registry.host}/several:1"
    layout.push("several", several)
    assert peak_memory(command, "pull", "-q", several) < 65_000_000  # four at once
    assert peak_memory(command, "pull", "-q", name) < 100_000_000
    assert peak_memory(command, "push", "-q", "--compression", "zstd", name) < 100_000_000


MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def peak_memory(command: Command, *words: str) -> int:
    """The bytes that a command held at most; a small process starts it, since a child begins with
    the size of its parent."""
    line = [sys.executable, "-c", MEASURE, *command.line(*words)]
    done = subprocess.run(
        line, env=command.environment, capture_output=True, check=True, timeout=90
    )
    return int(done.stdout)


def test_a_proxy_is_used_but_not_for_whom_it_is_not(command: Command) -> None:
    with Hostile() as proxy:
        proxy.add_image("1", BASE)
        command.environment["http_proxy"] = f"http://{proxy.host}"
        command("pull", "--insecure", "registry.invalid/x:1")
        assert proxy.asked_for("GET http://registry.invalid/v2/x/manifests/1")
        proxy.asked.clear()
        command.environment["no_proxy"] = "registry.invalid"
        error = command("pull", "--insecure", "registry.invalid/y:1", code=1)
        assert "registry.invalid: the name cannot be looked up" in error
        assert not proxy.asked


def test_a_digest_beside_a_tag_wins_and_gives_no_tag(
    registry: Registry, layout: OciLayout, command: Command
) -> None:
    name = f"{registry.host}/both"
    layout.push("one", f"{name}:1")
    digest = raw_digest(f"{name}:1")
    command("pull", f"{name}:other@{digest}")
    with command.store() as store:
        assert store.image(f"{name}@{digest}").names == ()
