"""Small images in a store, and whether it is whole."""

import io
import tarfile

from unionimage.image_config import History, ImageConfig
from unionimage.reference import Reference
from unionimage.spec import Platform
from unionimage.store import Image, Store
from unionimage.store.check import check

from harness.tars import archive, member


def layer_tar(text: str = "x") -> bytes:
    return archive(
        member("d", tarfile.DIRTYPE),
        member("d/file", data=text.encode() * 500),
        member("d/hard", tarfile.LNKTYPE, linkname="d/file"),
        member("link", tarfile.SYMTYPE, linkname="d"),
        member(f"only-{text}", data=text.encode()),
    )


def add_image(store: Store, *layers: bytes, name: str = "image:1") -> Image:
    with store.lease("test") as lease:
        config = ImageConfig(Platform.host())
        for data in layers:
            layer = lease.add_layer(io.BytesIO(data))
            config = config.with_step(History(created_by="step"), layer.diff_id)
        return lease.add_image(config, names=[Reference.parse(name)])


def assert_whole(store: Store) -> None:
    assert [problem.what for problem in check(store)] == []
