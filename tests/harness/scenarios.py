"""Single operations on a small stack, each of which takes several system calls below the union."""

from collections.abc import Callable

from harness.direct import Direct
from harness.layers import Dir, File, HardLink, Symlink
from harness.linux import RENAME_EXCHANGE

LAYERS = (
    {"d/top": "top", "full/x": "x", "w": None, "up/only": "o"},
    {
        "d/f": File(data=b"lower" * 3000, mode=0o4750, uid=3, gid=4, xattrs={"user.x": b"1"}),
        "d/sub/g": "g",
        "one": "linked",
        "d/two": HardLink("one"),
        "full/y": "y",
        "empty": Dir(mode=0o1777, xattrs={"user.dir": b"2"}),
        "s": Symlink("d"),
        "w/old": "old",
    },
)

OPERATIONS: dict[str, Callable[[Direct], None]] = {
    "copy up by chmod": lambda u: u.change("d/f", mode=0o600),
    "copy up by chown": lambda u: u.change("d/sub/g", uid=7, gid=8),
    "copy up by times": lambda u: u.change("d/f", atime_ns=1, mtime_ns=2),
    "copy up by xattr": lambda u: u.set_xattr("d/f", "user.new", b"n"),
    "copy up by write": lambda u: u.write("d/f", b"LOWER"),
    "copy up of a directory": lambda u: u.change("empty", mode=0o700),
    "copy up of a symlink": lambda u: u.change("s", uid=5, gid=5),
    "truncate": lambda u: u.change("d/f", size=7),
    "copy up of a hard link": lambda u: u.change("d/two", mode=0o600),
    "link of a lower file": lambda u: u.link("d/f", "d/sub/linked"),
    "link of a hard link": lambda u: u.link("one", "three"),
    "create": lambda u: u.create("d/sub/new"),
    "create over a whiteout": lambda u: u.create("w"),
    "mkdir": lambda u: u.mkdir("d/sub/new", 0o1770),
    "mkdir over a whiteout": lambda u: u.mkdir("w"),
    "symlink over a whiteout": lambda u: u.symlink("t", "w"),
    "mkfifo": lambda u: u.mkfifo("d/fifo"),
    "unlink a lower file": lambda u: u.unlink("d/f"),
    "unlink an upper file": lambda u: u.unlink("d/top"),
    "unlink a hard link": lambda u: u.unlink("one"),
    "rmdir a lower directory": lambda u: u.rmdir("empty"),
    "rename a lower file": lambda u: u.rename("d/f", "moved"),
    "rename over a file": lambda u: u.rename("d/f", "full/y"),
    "rename over a whiteout": lambda u: u.rename("d/sub/g", "w"),
    "rename a hard link": lambda u: u.rename("one", "d/one"),
    "rename a lower directory": lambda u: u.rename("d/sub", "sub"),
    "rename a merged directory": lambda u: u.rename("d", "full/d"),
    "rename a directory over an empty one": lambda u: u.rename("d", "empty"),
    "exchange files": lambda u: u.rename("d/f", "full/x", RENAME_EXCHANGE),
    "exchange a directory and a file": lambda u: u.rename("d", "one", RENAME_EXCHANGE),
}

# first these, unharmed; then the operation
PREPARATIONS: dict[str, Callable[[Direct], None]] = {
    "create over what was deleted": lambda u: u.unlink("d/f"),
    "link over what was deleted": lambda u: u.unlink("d/f"),
    "rename over what was deleted": lambda u: u.unlink("d/f"),
    "mkdir over what was deleted": lambda u: (u.unlink("d/sub/g"), u.rmdir("d/sub")),
    "rmdir of a directory full of whiteouts": lambda u: (u.unlink("full/x"), u.unlink("full/y")),
    "rename over a directory full of whiteouts": lambda u: (
        u.unlink("full/x"),
        u.unlink("full/y"),
    ),
    "unlink the last name of a link": lambda u: u.unlink("one"),
    "write through one name": lambda u: u.change("one", mode=0o640),
    "rename what was renamed": lambda u: u.rename("d", "e"),
}
OPERATIONS |= {
    "create over what was deleted": lambda u: u.create("d/f"),
    "link over what was deleted": lambda u: u.link("d/top", "d/f"),
    "rename over what was deleted": lambda u: u.rename("d/sub/g", "d/f"),
    "mkdir over what was deleted": lambda u: u.mkdir("d/sub"),
    "rmdir of a directory full of whiteouts": lambda u: u.rmdir("full"),
    "rename over a directory full of whiteouts": lambda u: u.rename("d", "full"),
    "unlink the last name of a link": lambda u: u.unlink("d/two"),
    "write through one name": lambda u: u.unlink("d/two"),
    "rename what was renamed": lambda u: u.rename("e", "d"),
}
