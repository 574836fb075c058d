"""Digests, references, configs and manifests: read, written again, and never crashed by."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unionimage.digest import Digest, VerifyingReader, chain_ids
from unionimage.errors import BadContent, UserError
from unionimage.image_config import History, ImageConfig
from unionimage.reference import Reference
from unionimage.spec import (
    DOCKER_LIST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Index,
    Manifest,
    Platform,
    compression_of,
    parse_manifest,
)

D = Digest.of(b"x")

WORDS = """
schemaVersion mediaType config layers manifests digest size annotations platform os rootfs
type architecture diff_ids history created_by empty_layer created Env Cmd Labels Healthcheck Test"""
KEYS = st.sampled_from(WORDS.split())
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5) | st.just(str(D)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


def test_the_chain_id_of_the_specification() -> None:
    """OCI image-spec, config.md: ChainID(A|B) = Digest(ChainID(A) + " " + DiffID(B))."""
    a, b = Digest.of(b"a"), Digest.of(b"b")
    assert chain_ids([]) == []
    assert chain_ids([a]) == [a]
    assert chain_ids([a, b])[1] == Digest.of(f"{a} {b}".encode())


@pytest.mark.parametrize(
    "text", ["", "sha256:", "md5:" + "0" * 32, "sha256:" + "A" * 64, str(D) + "\n"]
)
def test_bad_digests(text: str) -> None:
    with pytest.raises(BadContent):
        Digest(text)


def test_a_reader_that_verifies() -> None:
    data = b"content"
    VerifyingReader(io.BytesIO(data), Digest.of(data), len(data)).drain()
    for digest, size in ((D, None), (None, 6), (None, 8)):
        with pytest.raises(BadContent):
            VerifyingReader(io.BytesIO(data), digest, size).drain()


@pytest.mark.parametrize(
    ("text", "full", "familiar"),
    [
        ("debian", "docker.io/library/debian", "debian"),
        ("debian:12", "docker.io/library/debian:12", "debian:12"),
        ("docker.io/debian:12", "docker.io/library/debian:12", "debian:12"),
        ("index.docker.io/a/b", "docker.io/a/b", "a/b"),
        ("user/app:1", "docker.io/user/app:1", "user/app:1"),
        ("localhost/app", "localhost/app", "localhost/app"),
        ("localhost:5000/a/b:t", "localhost:5000/a/b:t", "localhost:5000/a/b:t"),
        ("[::1]:5000/a", "[::1]:5000/a", "[::1]:5000/a"),
        (f"a@{D}", f"docker.io/library/a@{D}", f"a@{D}"),
        (f"q.io/a:t@{D}", f"q.io/a:t@{D}", f"q.io/a:t@{D}"),
        ("library/a/b", "docker.io/library/a/b", "library/a/b"),
        ("docker.io/x.y/a", "docker.io/x.y/a", "docker.io/x.y/a"),
        ("a__b-c/d.e_f", "docker.io/a__b-c/d.e_f", "a__b-c/d.e_f"),
    ],
)
def test_references(text: str, full: str, familiar: str) -> None:
    reference = Reference.parse(text)
    assert (str(reference), reference.familiar) == (full, familiar)
    assert Reference.parse(full) == reference == Reference.parse(familiar)


BAD_TEXTS = "|:|A|a:|a:b:c|a//b|/a|a/|a@|a@sha256:1|-a|a b|a:-x|a..b|a\n|x_/:y|é"
BAD_REFERENCES = [*BAD_TEXTS.split("|"), "a" * 256, "0" * 64, "a:" + "x" * 129]


@pytest.mark.parametrize("text", BAD_REFERENCES)
def test_bad_references(text: str) -> None:
    with pytest.raises(UserError):
        Reference.parse(text)


@given(st.text(max_size=30))
def test_a_reference_is_read_back_or_refused(text: str) -> None:
    try:
        reference = Reference.parse(text)
    except UserError:
        return
    assert Reference.parse(str(reference)) == Reference.parse(reference.familiar) == reference


@given(JSON)
def test_any_json_is_read_or_refused(value: object) -> None:
    data = json.dumps(value).encode()
    for read in (Manifest.from_json, Index.from_json, ImageConfig.from_json, parse_manifest):
        try:
            read(data)
        except BadContent as error:
            assert "\n" not in error.message


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for read in (Manifest.from_json, Index.from_json, ImageConfig.from_json, parse_manifest):
        try:
            read(data)
        except BadContent:
            pass


def test_a_config_keeps_what_this_program_does_not_know() -> None:
    table = {
        "architecture": "arm64",
        "variant": "v8",
        "os": "linux",
        "created": "2020-01-01T00:00:00Z",
        "moby.buildkit.cache.v0": "x",
        "config": {
            "Env": ["A=b", "A=c"],
            "Entrypoint": [],
            "ExposedPorts": {"80/tcp": {}},
            "Healthcheck": {"Test": ["CMD", "x"], "Interval": 5, "StartInterval": 6},
            "Labels": {"b": "2", "a": "1"},
            "StopTimeout": 3,
            "ArgsEscaped": True,
        },
        "rootfs": {"type": "layers", "diff_ids": [D]},
        "history": [{"created_by": "x"}, {"empty_layer": True, "comment": "c", "author": "a"}],
    }
    config = ImageConfig.from_json(json.dumps(table).encode())
    assert json.loads(config.to_json()) == table
    assert ImageConfig.from_json(config.to_json()) == config
    assert config.run.environment() == {"A": "c"}
    assert [layer for _, layer in config.layer_steps()] == [D, None]
    more = config.with_step(History(created_by="y"), D)
    assert (more.diff_ids, len(more.history), more.history[-1].empty_layer) == ((D, D), 3, False)


def test_a_config_without_history_gets_one_with_its_first_step() -> None:
    config = ImageConfig(Platform.host(), (D,))
    assert config.layer_steps() == [(History(), D)]
    assert len(ImageConfig.from_json(config.with_step(History(), None).to_json()).history) == 2


@pytest.mark.parametrize(
    "table",
    [
        {"rootfs": {"type": "other", "diff_ids": []}},
        {"rootfs": {"type": "layers", "diff_ids": [D]}, "history": [{}, {}]},
        {"rootfs": {"type": "layers", "diff_ids": ["sha256:1"]}},
        {"config": {"Env": "A=b"}},
        {"config": {"Labels": {"a": 1}}},
        {"history": [1]},
    ],
)
def test_bad_configs(table: dict[str, object]) -> None:
    with pytest.raises(BadContent):
        ImageConfig.from_json(json.dumps(table).encode())


def test_a_key_that_comes_twice_is_refused() -> None:
    """Two readers could understand it differently."""
    with pytest.raises(BadContent, match="twice"):
        ImageConfig.from_json(b'{"os": "linux", "os": "windows"}')


def test_manifests_and_indexes() -> None:
    config = Descriptor(OCI_CONFIG, D, 1)
    manifest = Manifest(OCI_MANIFEST, config, (Descriptor("application/x", D, 5),), {"a": "b"})
    assert parse_manifest(manifest.to_json()) == manifest
    platforms = [
        Platform("linux", "amd64"),
        Platform("linux", "arm", "v7"),
        Platform("linux", "arm", "v6"),
    ]
    entries = tuple(
        Descriptor(OCI_MANIFEST, Digest.of(b"%d" % n), 9, one) for n, one in enumerate(platforms)
    )
    for media_type in (OCI_INDEX, DOCKER_LIST):
        index = Index(media_type, entries)
        assert parse_manifest(index.to_json()) == index
        assert index.select(Platform.parse("linux/arm/v6")) is entries[2] or (
            index.select(Platform.parse("linux/arm/v6")) == entries[2]
        )
        assert index.select(Platform.parse("amd64")) == entries[0]
        with pytest.raises(BadContent, match="there are: linux/amd64, linux/arm/v6, linux/arm/v7"):
            index.select(Platform.parse("linux/s390x"))


@pytest.mark.parametrize(
    ("text", "platform"),
    [
        ("linux/amd64", Platform("linux", "amd64")),
        ("linux/x86_64", Platform("linux", "amd64")),
        ("arm64", Platform("linux", "arm64")),
        ("linux/arm64/v8", Platform("linux", "arm64", "v8")),
        ("linux/armhf", Platform("linux", "arm", "v7")),
    ],
)
def test_platforms(text: str, platform: Platform) -> None:
    assert Platform.parse(text) == platform


def test_compressions_of_media_types() -> None:
    assert compression_of("application/vnd.oci.image.layer.v1.tar+zstd") == "zstd"
    assert compression_of("application/vnd.docker.image.rootfs.diff.tar.gzip") == "gzip"
    assert compression_of("application/vnd.oci.image.layer.v1.tar") == "none"
    for bad in (
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        "application/vnd.oci.image.layer.v1.tar+encrypted",
        "text/plain",
        "",
    ):
        with pytest.raises(BadContent):
            compression_of(bad)
