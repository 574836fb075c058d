"""Targets for atheris, a fuzzer led by coverage: readers of what strangers send.

    python -m harness.fuzzing TARGET CORPUS [libFuzzer's options]     (see scripts/fuzz)

A target may refuse its input by a UserError, and nothing else; what it takes must be right, which
each target checks in its own way.
"""

import io
import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["unionimage"], enable_loader_override=False):
    from unionimage.archive.load import _docker_manifests, _names, _references
    from unionimage.changeset import recipe as recipes
    from unionimage.changeset import tar
    from unionimage.changeset.limits import Limits
    from unionimage.changeset.paths import PieceStream
    from unionimage.changeset.unpack import unpack
    from unionimage.errors import UserError
    from unionimage.image_config import ImageConfig
    from unionimage.reference import Reference
    from unionimage.spec import Index, Platform, parse_manifest

from harness.tars import archive, member

_MEMORY = "/dev/shm"
_LIMITS = Limits(size=1 << 20, entries=1000)


def fuzz_tar(data: bytes) -> None:
    """What is unpacked stays inside, and the recipe gives the same bytes again."""
    work = Path(tempfile.mkdtemp(dir=_MEMORY))
    try:
        written = io.BytesIO()
        directories = []
        for name in ("diff", "displaced"):
            (work / name).mkdir()
            directories.append(os.open(work / name, os.O_RDONLY | os.O_DIRECTORY))
        try:
            stream = io.BytesIO(data)
            unpacked = unpack(
                stream,
                directories[0],
                displaced=directories[1],
                recipe=recipes.RecipeWriter(written),
                limits=_LIMITS,
            )
            assert sorted(os.listdir(work)) == ["diff", "displaced"]
            if not unpacked.doubtful and not unpacked.replaced:
                again = PieceStream(recipes.archive(io.BytesIO(written.getvalue()), directories[0]))
                assert again.read() == data[: stream.tell()]
        finally:
            for descriptor in directories:
                os.close(descriptor)
    finally:
        shutil.rmtree(work)


def fuzz_manifest(data: bytes) -> None:
    """What is read and written is read again as the same."""
    parsed = parse_manifest(data)
    assert parse_manifest(parsed.to_json()) == parsed
    if isinstance(parsed, Index):
        assert set(parsed.images()) <= set(parsed.manifests)
        parsed.select(Platform.host())


def fuzz_config(data: bytes) -> None:
    """A config that is changed by nothing but being written keeps its meaning and its bytes."""
    parsed = ImageConfig.from_json(data)
    written = parsed.to_json()
    again = ImageConfig.from_json(written)
    assert again.to_json() == written
    assert again.diff_ids == parsed.diff_ids and again.history == parsed.history
    parsed.layer_steps()
    parsed.run.environment()


def fuzz_reference(data: bytes) -> None:
    """The full and the familiar form of a name mean the same."""
    parsed = Reference.parse(data.decode(errors="surrogateescape"))
    assert Reference.parse(str(parsed)) == parsed == Reference.parse(parsed.familiar)


def fuzz_archive(data: bytes) -> None:
    """The tables of an image archive."""
    for table in _docker_manifests(data):
        _references(table.get("RepoTags") or [])
    for descriptor in Index.from_json(data).manifests:
        _names(descriptor)


def _tars() -> list[bytes]:
    whole = archive(
        member("d", tarfile.DIRTYPE),
        member("d/f", data=b"x" * 600, pax_headers={"SCHILY.xattr.user.a": "b"}),
        member("d/l", tarfile.LNKTYPE, linkname="d/f"),
        member("s", tarfile.SYMTYPE, linkname="/etc"),
        member("d/.wh.gone"),
        member("e/.wh..wh..opq"),
        member("n" * 120, mtime=1.5),
    )
    gnu = archive(member("n" * 200, data=b"1"), form=tarfile.GNU_FORMAT)
    return [whole, gnu, tar.END]


_HEX = "sha256:" + "1" * 64
_LAYER = f'{{"mediaType":"x/y","digest":"{_HEX}","size":3}}'
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
_CONFIG = (
    '{"architecture":"arm64","variant":"v8","os":"linux","config":{"Env":["A=b"],"Cmd":["sh"],'
    '"Labels":{"a":"b"},"Healthcheck":{"Test":["NONE"],"Interval":5},"ExposedPorts":{"1/tcp":{}}},'
    f'"rootfs":{{"type":"layers","diff_ids":["{_HEX}"]}},'
    '"history":[{"created_by":"x"},{"empty_layer":true}],"x":1}'
)

TARGETS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "tar": (fuzz_tar, _tars()),
    "manifest": (
        fuzz_manifest,
        [
            f'{{"schemaVersion":2,"mediaType":"{_MANIFEST}","config":{{"mediaType":"{_CONFIG_TYPE}",'
            f'"digest":"{_HEX}","size":3}},"layers":[{_LAYER}],"annotations":{{"a":"b"}}}}'.encode(),
            f'{{"schemaVersion":2,"manifests":[{_LAYER[:-1]},"platform":{{"os":"linux",'
            '"architecture":"amd64"}}]}'.encode(),
        ],
    ),
    "config": (fuzz_config, [_CONFIG.encode()]),
    "reference": (fuzz_reference, [b"a/b:c", f"localhost:5/x@{_HEX}".encode(), b"[::1]:5/a"]),
    "archive": (
        fuzz_archive,
        [
            b'[{"Config":"x.json","RepoTags":["a:b"],"Layers":["l/layer.tar"]}]',
            f'{{"schemaVersion":2,"manifests":[{_LAYER}]}}'.encode(),
        ],
    ),
}


def main() -> None:
    name = sys.argv[1]
    if name in TARGETS:
        target, seeds = TARGETS[name]
    else:
        from harness import fuzzing_mount

        target, seeds = fuzzing_mount.TARGETS[name]
    corpus = Path(sys.argv[2])
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)

    def one(data: bytes) -> None:
        try:
            target(data)
        except UserError:
            pass

    atheris.Setup(sys.argv[:1] + sys.argv[2:], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
