"""Pull, push, login and tags against a real docker-registry, with skopeo as the peer."""

import json
import os
import stat
import time
from pathlib import Path

import pytest
from harness.command import Command, make_command, make_image
from harness.registry import OciLayout, Registry, layer_tar, raw_digest, sha256, skopeo
from harness.tokens import TokenServer
from unionimage import config
from unionimage.changeset import compression
from unionimage.digest import Digest
from unionimage.errors import UserError
from unionimage.progress import Silent
from unionimage.reference import Reference
from unionimage.registry import client, transport
from unionimage.registry.push import push
from unionimage.registry.session import Session

# peers of this age know no zstd layers in docker's manifests
FORMS = [("oci", "gzip"), ("oci", "zstd"), ("oci", "none"), ("docker", "gzip"), ("docker", "none")]
BASE = layer_tar({"etc": None, "etc/hosts": b"127.0.0.1 localhost\n", "etc/old": b"x" * 5000})
UPPER = layer_tar({"etc": None, "etc/.wh.old": b"", "etc/new": b"new\n"})
BIG = layer_tar({"random": os.urandom(6_000_000)})


# -- pull ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "compression"), FORMS)
def test_an_image_goes_round_and_stays_the_same(
    registry: Registry, command: Command, tmp_path: Path, kind: str, compression: str
) -> None:
    layout = OciLayout(tmp_path / "oci")
    entry = layout.image("x", [BASE, UPPER], compression, kind)
    name = f"{registry.host}/round/{kind}-{compression}"
    layout.push("x", name + ":1")
    digest = raw_digest(name + ":1")
    assert digest == entry["digest"]
    out = command("pull", name + ":1")
    assert f"Digest: {digest}" in out
    assert f"Status: Downloaded newer image for {name}:1" in out
    with command.store() as store:
        image = store.image(name + ":1")
        assert [layer.diff_id for layer in image.layers] == [sha256(BASE), sha256(UPPER)]
        assert (image.layers[0].directory / "etc/hosts").read_bytes() == b"127.0.0.1 localhost\n"
        assert store.image(f"{name}@{digest}").id == image.id
    command.tag(name + ":1", f"{registry.host}/again/{kind}-{compression}:2")
    out = command("push", f"{registry.host}/again/{kind}-{compression}:2")
    assert f"2: digest: {digest} size:" in out
    assert raw_digest(f"{registry.host}/again/{kind}-{compression}:2") == digest


def test_a_second_pull_fetches_nothing(
    registry: Registry, layout: OciLayout, command: Command
) -> None:
    name = f"{registry.host}/second:1"
    layout.push("one", name)
    command("pull", name)
    out = command("pull", name)
    assert "Pulling fs layer" not in out
    assert f"Status: Image is up to date for {name}" in out
    assert command("pull", "-q", name) == name + "\n"


def test_a_shared_layer_is_not_fetched_again(
    registry: Registry, command: Command, tmp_path: Path
) -> None:
    layout = OciLayout(tmp_path / "oci")
    layout.image("a", [BASE])
    layout.image("b", [BASE, UPPER])
    layout.push("a", f"{registry.host}/shared:a")
    layout.push("b", f"{registry.host}/shared:b")
    command("pull", f"{registry.host}/shared:a")
    out = command("pull", f"{registry.host}/shared:b")
    assert out.count("Already exists") == 1 and out.count("Pull complete") == 1


def test_a_platform_is_chosen_from_an_index(
    registry: Registry, command: Command, tmp_path: Path
) -> None:
    layout = OciLayout(tmp_path / "oci")
    images = [
        layout.image(arch, [BASE, layer_tar({arch: b""})], architecture=arch)
        for arch in ("amd64", "arm64")
    ]
    entry = layout.many("both", images)
    name = f"{registry.host}/multi:1"
    layout.push("both", name)
    out = command("pull", "--platform", "linux/arm64", name)
    assert f"Digest: {entry['digest']}" in out
    with command.store() as store:
        image = store.image(name)
        assert image.config.platform.architecture == "arm64"
        assert image.manifest_digest == images[1]["digest"]
    command("pull", f"{registry.host}/multi@{images[0]['digest']}")
    error = command("pull", "--platform", "linux/s390x", name, code=1)
    assert "no image for platform linux/s390x; there are: linux/amd64, linux/arm64" in error
    layout.push("arm64", f"{registry.host}/multi:arm")
    error = command("pull", "--platform", "amd64", f"{registry.host}/multi:arm", code=1)
    assert "does not match the specified platform: wanted linux/amd64, actual linux/arm64" in error


@pytest.fixture
def both(registry: Registry, command: Command, tmp_path: Path) -> str:
    """A name in the registry with an index of two platforms, pulled with both."""
    layout = OciLayout(tmp_path / "oci")
    images = [
        layout.image(arch, [BASE, layer_tar({arch: b""})], architecture=arch)
        for arch in ("amd64", "arm64")
    ]
    name = f"{registry.host}/{tmp_path.name}:1"
    layout.many("both", images)
    layout.push("both", name)
    command("pull", "--platform", "all", name)
    return name


def test_a_container_is_made_of_the_platform_that_was_asked_for(
    command: Command, both: str
) -> None:
    for wanted in ("amd64", "arm64"):
        words = ("--pull", "never", "--platform", f"linux/{wanted}", "--network", "none")
        made = command("create", *words, both, "sh").strip()
        (container,) = json.loads(command("inspect", made))
        (image,) = json.loads(command("inspect", "--type", "image", container["Image"]))
        assert image["Architecture"] == wanted
        command("rm", made)


def test_the_images_of_all_platforms_go_round(
    registry: Registry, command: Command, both: str, tmp_path: Path
) -> None:
    there = f"{registry.host}/{tmp_path.name}/again:1"
    command("tag", both, there)
    command("push", there)
    assert raw_digest(there) == raw_digest(both)
    command("tag", command.image_id(both), there)
    command("push", there)
    assert raw_digest(there) != raw_digest(both), "an id is one image alone"
    before = raw_digest(both)
    command("push", "--format", "docker", both)
    index = json.loads(skopeo("inspect", "--raw", "--tls-verify=false", f"docker://{both}"))
    assert index["mediaType"].endswith("manifest.list.v2+json")
    assert [one["platform"]["architecture"] for one in index["manifests"]] == ["amd64", "arm64"]
    command("push", both)
    assert raw_digest(both) == before
    command("push", "--platform", "linux/arm64", both)
    assert "layers" in json.loads(
        skopeo("inspect", "--raw", "--tls-verify=false", f"docker://{both}")
    )
    error = command("push", "--platform", "linux/s390x", both, code=1)
    assert "no image for platform linux/s390x is here; there are: linux/amd64, linux/arm64" in error


def test_all_platforms_are_kept_saved_loaded_and_removed(
    command: Command, both: str, tmp_path: Path
) -> None:
    command("prune", "-f")
    assert len(command("images", "-q").split()) == 2
    for form, path in (("oci-archive", "a.tar"), ("oci-dir", "d")):
        command("save", "--format", form, "-o", str(tmp_path / path), both)
        there = make_command(tmp_path, f"there-{form}")
        there("load", "-i", str(tmp_path / path))
        assert len(there("images", "-q").split()) == 1
        there("load", "--platform", "all", "-i", str(tmp_path / path))
        assert len(there("images", "-q").split()) == 2
        there("save", "--format", form, "-o", str(tmp_path / f"again-{path}"), both)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "again-a.tar").read_bytes()
    skopeo("copy", "--all", f"oci-archive:{tmp_path}/a.tar", f"dir:{tmp_path}/out")
    assert len(list((tmp_path / "out").glob("*.manifest.json"))) == 2
    assert "whole" in command("check")
    command("rmi", both)
    assert command("images", "-aq") == ""


def test_all_tags_are_pulled_pushed_and_listed(
    registry: Registry, layout: OciLayout, command: Command
) -> None:
    tags = [f"1.{n}" for n in range(5)] + ["latest"]
    for tag in tags:
        layout.push("one", f"{registry.host}/many:{tag}")
    out = command("pull", "-a", f"{registry.host}/many")
    assert out.count("Status: ") == 6 and out.endswith(f"\n{registry.host}/many\n")
    assert sorted(command("tags", f"{registry.host}/many").split()) == sorted(tags)
    assert len(command("tags", "--filter", "1.*", "-n", "3", f"{registry.host}/many").split()) == 3
    listed = json.loads(command("tags", "--json", "--digests", f"{registry.host}/many"))
    assert {row["digest"] for row in listed["tags"]} == {raw_digest(f"{registry.host}/many:1.0")}
    for tag in tags:
        command.tag(f"{registry.host}/many:{tag}", f"{registry.host}/many2:{tag}")
    out = command("push", "-a", f"{registry.host}/many2")
    assert out.count(": digest: ") == 6
    assert sorted(command("tags", f"{registry.host}/many2").split()) == sorted(tags)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pull", "{host}/no/such:1"], "manifest for {host}/no/such:1: not found"),
        (["pull", "{host}/Upper"], "must be lower case"),
        (["pull", "-a", "{host}/x:1"], "tag can't be used with --all-tags/-a"),
        (["pull", "127.0.0.1:1/x"], "127.0.0.1:1: cannot connect: Connection refused"),
        (["pull", "registry.invalid/x"], "registry.invalid: the name cannot be looked up"),
        (["pull", "{host}/x@sha256:12"], "is not a sha256 digest"),
        (["push", "{host}/x:1"], "An image does not exist locally with the tag: {host}/x:1"),
        (["tags", "{host}/no/such"], "repository name not known to registry"),
        (["tags", "{host}/x:1"], "give the name without a tag"),
        (["login", "-u", "jo", "-p", "x", "{host}"], "--password is refused"),
        (["login", "--password-stdin", "{host}"], "--password-stdin needs --username"),
        (["login", "{host}"], "cannot ask for a name: no terminal"),
    ],
)
def test_mistakes_get_one_line(
    registry: Registry, command: Command, words: list[str], message: str
) -> None:
    error = command(*(word.format(host=registry.host) for word in words), code=1)
    assert error.startswith(f"unionfuse {words[0]}: ") and error.count("\n") == 1
    assert message.format(host=registry.host) in error


# -- push ----------------------------------------------------------------------------------------


def test_blobs_are_skipped_mounted_and_sent(
    registry: Registry, command: Command, tmp_path: Path
) -> None:
    layout = OciLayout(tmp_path / "oci")
    layout.image("x", [BIG])
    layout.push("x", f"{registry.host}/from:1")
    command("pull", f"{registry.host}/from:1")
    command.tag(f"{registry.host}/from:1", f"{registry.host}/to:1")
    assert "Mounted from from" in command("push", f"{registry.host}/to:1")
    assert "Layer already exists" in command("push", f"{registry.host}/to:1")
    with Registry(tmp_path / "other") as other:
        command.tag(f"{registry.host}/from:1", f"{other.host}/new:1")
        assert "Pushed" in command("push", f"{other.host}/new:1")
        assert raw_digest(f"{other.host}/new:1") == raw_digest(f"{registry.host}/from:1")


@pytest.mark.parametrize("form", ["oci", "docker"])
@pytest.mark.parametrize("compression", ["gzip", "none"])
def test_what_was_made_here_is_pulled_by_a_peer(
    registry: Registry, command: Command, tmp_path: Path, form: str, compression: str
) -> None:
    make_image(command, "made:1", [BASE, UPPER])
    name = f"{registry.host}/made/{form}-{compression}:1"
    command.tag("made:1", name)
    command("push", "--format", form, "--compression", compression, name)
    target = tmp_path / "there"
    skopeo("copy", "--src-tls-verify=false", f"docker://{name}", f"dir:{target}")
    manifest = json.loads((target / "manifest.json").read_text())
    assert manifest["mediaType"].startswith(
        "application/vnd.oci" if form == "oci" else "application/vnd.docker"
    )
    inspected = json.loads(skopeo("inspect", "--config", f"dir:{target}"))
    assert inspected["rootfs"]["diff_ids"] == [sha256(BASE), sha256(UPPER)]
    other = make_command(tmp_path, "other")
    other("pull", name)
    assert other.image_id(name) == command.image_id("made:1")
    with command.store() as store:  # that form was for once
        assert store.image("made:1").manifest_digest is None


def test_a_layer_that_is_there_twice_goes_once(
    registry: Registry, command: Command, tmp_path: Path
) -> None:
    layout = OciLayout(tmp_path / "oci")
    layout.image("twice", [BASE, UPPER, BASE])
    name = f"{registry.host}/twice:1"
    layout.push("twice", name)
    assert command("pull", name).count(": Pull complete\n") == 2
    with Registry(tmp_path / "other") as other:
        command.tag(name, f"{other.host}/twice:1")
        out = command("push", f"{other.host}/twice:1")
        assert out.count(": Pushed\n") == 2
        assert raw_digest(f"{other.host}/twice:1") == raw_digest(name)


def test_a_manifest_that_is_there_is_not_sent_again(
    registry: Registry, layout: OciLayout, command: Command
) -> None:
    """Unless the tag has moved, or blobs were lost: those are sent again."""
    name = f"{registry.host}/same:1"
    make_image(command, name, [BASE, UPPER])
    first = command("push", name)
    written = registry.tag_written("same", "1")
    assert command("push", name).count("Layer already exists") == 2
    assert registry.tag_written("same", "1") == written

    layout.push("one", name)
    assert f"digest: {raw_digest(name)} size" not in first
    command("push", name)
    assert f"digest: {raw_digest(name)} size" in first

    manifest = json.loads(skopeo("inspect", "--raw", "--tls-verify=false", f"docker://{name}"))
    registry.forget("same", manifest["layers"][0]["digest"])
    registry.forget("same", manifest["config"]["digest"])
    out = command("push", name)
    assert out.count(": Pushed") == 1 and out.count("Layer already exists") == 1
    other = Command(command.root.parent / "other", command.environment)
    other("pull", name)
    assert other.image_id(name) == command.image_id(name)


def test_a_layer_is_compressed_once(registry: Registry, command: Command) -> None:
    make_image(command, "once:1", [BIG])
    command.tag("once:1", f"{registry.host}/once:1", f"{registry.host}/once:2")
    first = command("push", f"{registry.host}/once:1")
    second = command("push", f"{registry.host}/once:2")
    assert "Pushed" in first and "Layer already exists" in second
    assert first.rpartition("digest: ")[2] == second.rpartition("digest: ")[2]


def test_what_the_registry_has_is_not_compressed_again(
    registry: Registry, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when image, layer and blob were gone in between, and unless the registry lost it."""
    name = f"{registry.host}/again:1"
    compressed: list[str] = []
    compressor = compression.compressor

    def count(form: str) -> compression.Compressor:
        compressed.append(form)
        return compressor(form)

    monkeypatch.setattr(compression, "compressor", count)

    def pushed() -> tuple[int, Digest]:
        compressed.clear()
        with command.store() as store, Session(config.Config()) as session:
            reference = Reference.parse(name)
            digest = push(store, session, store.image(name), reference, Silent()).digest
        return len(compressed), digest

    make_image(command, name, [BIG, BASE])
    archive = str(tmp_path / "image.tar")
    command("save", "-o", archive, name)
    count_first, first = pushed()
    assert count_first == 2
    for lost, expected in ((False, 0), (True, 1)):
        command("rmi", name)
        command("prune", "-af")
        assert not list((command.root / "diff").iterdir())
        assert not list((command.root / "blobs/sha256").iterdir())
        command("load", "-i", archive)
        if lost:
            raw = skopeo("inspect", "--raw", "--tls-verify=false", f"docker://{name}")
            registry.forget("again", json.loads(raw)["layers"][0]["digest"])
        assert pushed() == (expected, first)
    other = Command(tmp_path / "other", command.environment)
    other("pull", name)
    assert other.image_id(name) == command.image_id(name)


def test_a_large_blob_is_sent_in_chunks(
    registry: Registry, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "UPLOAD_CHUNK", 1_000_000)
    make_image(command, f"{registry.host}/chunks:1", [BIG])
    with command.store() as store, Session(config.Config()) as session:
        image = store.image(f"{registry.host}/chunks:1")
        push(store, session, image, image.names[0], Silent())
    other = Command(command.root.parent / "other", command.environment)
    other("pull", f"{registry.host}/chunks:1")
    assert other.image_id(f"{registry.host}/chunks:1") == image.id


# -- login ---------------------------------------------------------------------------------------


def test_login_opens_and_logout_closes(
    guarded: Registry, layout: OciLayout, command: Command, tmp_path: Path
) -> None:
    layout.push("one", f"{guarded.host}/secret:1", "--dest-creds=jo:s3cret")
    denied = command("pull", f"{guarded.host}/secret:1", code=1)
    assert "pull access denied" in denied and "unionfuse login" in denied
    wrong = command("login", "-u", "jo", "--password-stdin", guarded.host, stdin="bad\n", code=1)
    assert "incorrect username or password" in wrong
    assert not (tmp_path / "docker/config.json").exists()
    done = command.run("login", "-u", "jo", "--password-stdin", guarded.host, stdin="s3cret\n")
    assert done.stdout == "Login Succeeded\n" and "unencrypted" in done.stderr
    path = tmp_path / "docker/config.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    command("pull", f"{guarded.host}/secret:1")
    command.tag(f"{guarded.host}/secret:1", f"{guarded.host}/secret:2")
    command("push", f"{guarded.host}/secret:2")
    # the file is docker's: skopeo reads it, and what skopeo wrote is read here
    skopeo(
        "inspect", "--tls-verify=false", f"--authfile={path}", f"docker://{guarded.host}/secret:2"
    )
    assert "Removing login credentials" in command("logout", guarded.host)
    assert "Not logged in" in command("logout", guarded.host)
    command("pull", f"{guarded.host}/secret:1", code=1)
    skopeo("login", "--tls-verify=false", f"--authfile={path}", "-u=jo", "-p=s3cret", guarded.host)
    command("pull", f"{guarded.host}/secret:1")


def test_a_credential_helper_keeps_the_password(
    guarded: Registry, command: Command, tmp_path: Path
) -> None:
    helper = tmp_path / "bin/docker-credential-box"
    helper.parent.mkdir()
    helper.write_text(
        f"#!/bin/sh\nbox={tmp_path}/box\n"
        "case $1 in store) cat > $box;; erase) rm -f $box;;\n"
        "get) if [ -f $box ]; then cat $box; else echo 'credentials not found in native keychain';"
        " exit 1; fi;; esac\n"
    )
    helper.chmod(0o755)
    folder = tmp_path / "docker"
    folder.mkdir()
    (folder / "config.json").write_text('{"credsStore": "box", "psFormat": "kept"}')
    command.environment["PATH"] = f"{helper.parent}:{os.environ['PATH']}"
    done = command.run("login", "-u", "jo", "--password-stdin", guarded.host, stdin="s3cret")
    assert done.returncode == 0 and "unencrypted" not in done.stderr
    config = json.loads((folder / "config.json").read_text())
    assert config == {"credsStore": "box", "psFormat": "kept", "auths": {guarded.host: {}}}
    assert json.loads((tmp_path / "box").read_text())["Secret"] == "s3cret"
    assert "manifest for" in command("pull", f"{guarded.host}/nothing:1", code=1)  # authorized
    command("logout", guarded.host)
    assert not (tmp_path / "box").exists()
    (folder / "config.json").write_text(json.dumps({"credHelpers": {guarded.host: "lost"}}))
    error = command("pull", f"{guarded.host}/nothing:1", code=1)
    assert "docker-credential-lost" in error and "not installed" in error


def test_a_password_is_in_no_process_list_and_no_message(
    guarded: Registry, command: Command
) -> None:
    command("login", "-u", "jo", "--password-stdin", guarded.host, stdin="s3cret")
    command.environment["UNIONFUSE_DEBUG"] = "1"
    done = command.run("pull", f"{guarded.host}/nothing:1")
    assert done.returncode == 1
    assert "s3cret" not in done.stdout + done.stderr
    assert "am86czNjcmV0" not in done.stdout + done.stderr


def test_bearer_tokens_of_a_real_registry(
    layout: OciLayout, command: Command, tmp_path: Path
) -> None:
    with (
        TokenServer(tmp_path / "tokens", "s3cret") as tokens,
        Registry(tmp_path / "registry", auth=tokens.registry_config()) as registry,
    ):
        mine, other = f"{registry.host}/jo/app:1", f"{registry.host}/jo/other:1"
        layout.push("one", mine, "--dest-creds=jo:s3cret")
        denied = command("pull", mine, code=1)
        assert "pull access denied" in denied
        # a repository for everybody: no credentials, an anonymous token
        error = command("pull", f"{registry.host}/public/none:1", code=1)
        assert "not found" in error or "denied" in error
        wrong = command("login", "-u", "jo", "--password-stdin", registry.host, stdin="x", code=1)
        assert "incorrect username or password" in wrong
        command("login", "-u", "jo", "--password-stdin", registry.host, stdin="s3cret")
        tokens.asked.clear()
        command("pull", mine)
        assert len(tokens.asked) == 1  # one token for the manifest, the config and all layers
        assert tokens.asked[0]["scope"] == ["repository:jo/app:pull"]
        command.tag(mine, other)
        assert "Mounted from jo/app" in command("push", other)
        assert ["repository:jo/other:pull,push", "repository:jo/app:pull"] in [
            query.get("scope") for query in tokens.asked
        ]
        assert command("tags", f"{registry.host}/jo/other") == "1\n"
        command.tag(mine, f"{registry.host}/public/app:1")
        denied = command("push", f"{registry.host}/public/app:1", code=1)
        assert "push access to" in denied and "is denied" in denied


def test_a_token_that_ends_during_a_push_is_renewed(command: Command, tmp_path: Path) -> None:
    with (
        TokenServer(tmp_path / "tokens", "s3cret", life=1) as tokens,
        Registry(tmp_path / "registry", auth=tokens.registry_config()) as registry,
    ):
        command("login", "-u", "jo", "--password-stdin", registry.host, stdin="s3cret")
        layers = [layer_tar({f"f{n}": os.urandom(200_000)}) for n in range(6)]
        make_image(command, f"{registry.host}/jo/app:1", layers)
        tokens.asked.clear()
        command("push", f"{registry.host}/jo/app:1")
        time.sleep(1)
        other = Command(tmp_path / "other", command.environment)
        other("pull", f"{registry.host}/jo/app:1")
        assert other.image_id(f"{registry.host}/jo/app:1") == command.image_id(
            f"{registry.host}/jo/app:1"
        )


# -- TLS and mirrors -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_tls_is_verified_but_on_loopback_or_where_told_otherwise(
    registry: Registry,
    layout: OciLayout,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Registry(tmp_path / "tls", tls=True) as secure:
        layout.push("one", f"{secure.host}/x:1")
        command("pull", f"{secure.host}/x:1")  # docker's rule: loopback is not verified
        monkeypatch.setattr(transport, "is_loopback", lambda host: False)
        monkeypatch.setattr(transport, "CERTIFICATES", str(tmp_path / "certs.d"))
        reference = Reference.parse(f"{secure.host}/x:1")
        with Session(config.Config()) as session, pytest.raises(UserError) as caught:
            session.repository(reference).manifest("1")
        assert "its certificate is not trusted (self-signed certificate)" in caught.value.message
        with Session(config.Config(), insecure=True) as session:
            session.repository(reference).manifest("1")
        with Session(config.Config(insecure=(secure.host,))) as session:
            session.repository(reference).manifest("1")
        known = tmp_path / "certs.d" / secure.host
        known.mkdir(parents=True)
        (known / "ca.crt").write_bytes((tmp_path / "tls/cert.pem").read_bytes())
        with Session(config.Config()) as session:
            session.repository(reference).manifest("1")
        plain = Reference.parse(f"{registry.host}/x:1")
        with Session(config.Config()) as session, pytest.raises(UserError) as caught:
            session.repository(plain).manifest("1")
        assert "does not speak TLS; use --insecure" in caught.value.message


def test_a_mirror_is_asked_first_and_may_fail(
    registry: Registry, layout: OciLayout, command: Command, tmp_path: Path
) -> None:
    layout.push("one", f"{registry.host}/cache/library/thing:1")
    layout.push("one", f"{registry.host}/cache/other:1")
    (tmp_path / "config.toml").write_text(
        "[registries.mirrors]\n"
        f'"docker.io" = ["127.0.0.1:1", "{registry.host}/cache"]\n'
        "[registries.short-names]\n"
        f'mine = "{registry.host}/cache/other"\n'
    )
    out = command("pull", "thing:1")
    assert "1: Pulling from library/thing" in out and out.endswith("docker.io/library/thing:1\n")
    assert command("pull", "-q", "mine:1") == f"{registry.host}/cache/other:1\n"
