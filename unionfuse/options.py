"""The command line of a mount program: words in, a frozen `MountOptions` out.

Pure text work: nothing here looks at the file system, so a path that is missing is the
daemon's to refuse, and a name or value that is wrong is refused here.

The names are those of fuse-overlayfs(1), mount(8) and the kernel's overlayfs
(Documentation/filesystems/overlayfs.rst). In the `-o` list, and in the paths of `lowerdir=`,
`upperdir=` and `workdir=`, a backslash takes the special meaning from the character after it,
as in the kernel: `\\,` is a comma, `\\:` a colon, `\\\\` a backslash.
"""

from __future__ import annotations

import getopt
import os
import re
from collections.abc import Callable, Iterable, Iterator
from enum import IntFlag
from typing import Any, NamedTuple

USAGE = """\
usage: unionfuse -o lowerdir=TOP:...:BASE[,upperdir=UPPER,workdir=WORK][,OPTION...] MOUNTPOINT

  -o OPTION[,OPTION...]  mount options; lowerdir= is needed, its highest layer comes first
  -f                     stay in the foreground
  -d, --debug            print every request; implies -f
  -V, --version          print the version
  -h, --help             print this

Without upperdir the mount is read-only. `\\:` and `\\,` stand for a colon and a comma in a path.
Unmount with `unionfuse umount MOUNTPOINT` or `fusermount3 -u MOUNTPOINT`."""

# fuse-overlayfs's own: names and attributes change only through the mount.
PRACTICALLY_FOREVER = 1_000_000_000.0


class UsageError(Exception):
    """A command line that cannot be understood. Its text is one line for the user."""


class Mapping(NamedTuple):
    """Owners `stored` … `stored + length - 1` on disk appear as `shown` … in the mount."""

    stored: int
    shown: int
    length: int


class MountFlag(IntFlag):
    """Flags of mount(2) that an option can set (include/uapi/linux/mount.h)."""

    NONE = 0
    RDONLY = 1
    NOSUID = 2
    NODEV = 4
    NOEXEC = 8
    SYNCHRONOUS = 16
    DIRSYNC = 128
    NOSYMFOLLOW = 256
    NOATIME = 1024
    NODIRATIME = 2048
    SILENT = 1 << 15
    RELATIME = 1 << 21
    STRICTATIME = 1 << 24
    LAZYTIME = 1 << 25


class MountOptions(NamedTuple):
    """What one mount is asked to be. Paths are as given, unescaped, perhaps relative."""

    lowerdir: tuple[bytes, ...]  # the highest layer first
    upperdir: bytes | None = None
    workdir: bytes | None = None

    timeout: float = PRACTICALLY_FOREVER  # seconds that the kernel may keep names and attributes
    uidmapping: tuple[Mapping, ...] = ()
    gidmapping: tuple[Mapping, ...] = ()
    squash_to_uid: int | None = None
    squash_to_gid: int | None = None
    xattr_permissions: int = 0  # 0: owner and mode of the inode, 1 and 2: of an xattr
    static_nlink: bool = False
    noacl: bool = False
    noxattrs: bool = False
    volatile: bool = False
    fsync: bool = True
    redirect_dir: str = "on"  # on, off, follow, nofollow
    metacopy: bool = False
    userxattr: bool = False
    xino: str = "auto"  # auto, on, off

    express: bool = True
    uring: str = "auto"  # auto, on, off
    spin: str = "auto"  # auto, on, off
    passthrough: str = "auto"  # auto, upper, off
    lookup_index: bytes | None = None
    stats: bool = False
    keeper: bool | None = None  # None: where a daemon can be replaced
    sleep: float = 0  # seconds without a request, then the daemon ends until one comes; 0: never

    mount_flags: MountFlag = MountFlag.NONE
    allow_other: bool = False
    max_read: int | None = None  # bytes
    fsname: bytes = b"unionfuse"
    context: tuple[bytes, ...] = ()  # SELinux: context=…, fscontext=…, as mount(2) takes them

    foreground: bool = False
    debug: bool = False
    log: bytes | None = None

    @property
    def read_only(self) -> bool:
        """Whether nothing can be changed: there is no upper, or `ro` was asked for."""
        return self.upperdir is None or MountFlag.RDONLY in self.mount_flags


class Invocation(NamedTuple):
    """One call of the mount program: what its words mean, and the words themselves."""

    options: MountOptions
    mountpoint: bytes
    warnings: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


def parse(words: list[str]) -> Invocation:
    """Understand a call: `[SOURCE] MOUNTPOINT -o …`, in any order, as mount(8) makes it too.

    Raises UsageError.
    """
    try:
        switches, places = getopt.gnu_getopt(words, "o:fd", ["debug"])
    except getopt.GetoptError as error:
        raise UsageError(f"{error}; see unionfuse --help") from None
    entries: list[bytes] = []
    foreground = debug = False
    for switch, value in switches:
        if switch == "-o":
            entries += split_unescaped(os.fsencode(value), b",")
        foreground |= switch == "-f"
        debug |= switch in ("-d", "--debug")
    if not 1 <= len(places) <= 2:
        found = "no mount point" if not places else f"{len(places)} places instead of one"
        raise UsageError(f"{found}; usage: unionfuse -o lowerdir=… MOUNTPOINT")
    options, warnings = parse_options(entries)
    if len(places) == 2 and options.fsname == b"unionfuse":
        options = options._replace(fsname=os.fsencode(places[0]) or b"unionfuse")
    debug |= options.debug
    options = options._replace(debug=debug, foreground=foreground or debug)
    return Invocation(options, os.fsencode(places[-1]), warnings, tuple(words))


def parse_options(entries: Iterable[bytes]) -> tuple[MountOptions, tuple[str, ...]]:
    """Turn the entries of `-o` lists into options and warnings; a later entry wins.

    Raises UsageError for an unknown name, a bad value, or a combination that makes no sense.
    """
    settings: dict[str, Any] = {"lowerdir": ()}
    without_effect: list[str] = []
    warnings: list[str] = []
    flags = MountFlag.NONE
    for name, value in _named(entries):
        if name in _FLAGS and value is None:
            on, off = _FLAGS[name]
            flags = flags & ~off | on
        elif name in _HANDLERS:
            _HANDLERS[name](settings, name, value)
            if name == "lowerdir" and b"::" in (value or b""):
                warnings.append("lowerdir: layers after '::' are shown like all others")
        elif name in _WITHOUT_EFFECT or name.startswith(("x-", "X-", "comment")):
            without_effect.append(name)
        else:
            raise UsageError(f"unknown mount option {name!r}; docs/options.md lists them all")
    if without_effect:
        names = ", ".join(dict.fromkeys(without_effect))
        warnings.append(f"accepted without effect: {names}")
    options = MountOptions(mount_flags=flags, **settings)
    _check(options)
    return options, tuple(warnings)


def unescape(text: bytes) -> bytes:
    """Take away one level of backslashes; a last, lonely one stays."""
    return re.sub(rb"\\(.)", rb"\1", text, flags=re.DOTALL)


def split_unescaped(text: bytes, separator: bytes) -> list[bytes]:
    """Split where no backslash stands before; leave backslashes, drop empty pieces.

    A SELinux context may be in double quotes, which keep its commas together.
    """
    piece = rb'(?:context="[^"]*"|\\.|[^\\' + re.escape(separator) + rb"]|\\$)+"
    return re.findall(piece, text, flags=re.DOTALL)


def _named(entries: Iterable[bytes]) -> Iterator[tuple[str, bytes | None]]:
    """Name and value of each entry. A bare triple of numbers goes on with a mapping."""
    mapping = ""
    for entry in entries:
        key, equals, value = entry.partition(b"=")
        name = os.fsdecode(key)
        if mapping and re.fullmatch(rb"\d+:\d+:\d+", entry):
            yield f"{mapping}+", entry
            continue
        mapping = name if name in ("uidmapping", "gidmapping") else ""
        yield name, value if equals else None


def _check(options: MountOptions) -> None:
    if not options.lowerdir:
        raise UsageError("no lowerdir= in the options; usage: unionfuse -o lowerdir=… MOUNTPOINT")
    if options.upperdir is not None and options.workdir is None:
        raise UsageError(
            "upperdir= without workdir=; name an empty directory on upper's file system"
        )
    if options.keeper and not options.express:
        raise UsageError("keeper=on needs the express lane; leave express=off out")
    if options.upperdir is None and options.workdir is not None:
        raise UsageError("workdir= without upperdir=; give both, or none for a read-only mount")
    if not options.express:
        for name, value in (("uring", "on"), ("spin", "on"), ("passthrough", "upper")):
            if getattr(options, name) == value:
                raise UsageError(f"{name}={value} needs the express lane; leave express=off out")


# --- one handler an option: it writes what it understood into the settings ------------------

_Handler = Callable[[dict[str, Any], str, bytes | None], None]


def _needed(name: str, value: bytes | None) -> bytes:
    if not value:
        raise UsageError(f"mount option {name}= needs a value")
    return value


def _shown(value: bytes) -> str:
    return os.fsdecode(value)


def _layers(settings: dict[str, Any], name: str, value: bytes | None) -> None:
    pieces = split_unescaped(_needed(name, value), b":")
    settings["lowerdir"] = tuple(map(unescape, pieces))


def _one_more_layer(settings: dict[str, Any], name: str, value: bytes | None) -> None:
    settings["lowerdir"] += (unescape(_needed(name, value)),)


def _path(settings: dict[str, Any], name: str, value: bytes | None) -> None:
    settings[name] = unescape(_needed(name, value))


def _present(settings: dict[str, Any], name: str, value: bytes | None) -> None:
    if value is not None:
        raise UsageError(f"mount option {name} takes no value")
    settings[name] = True


_SWITCH = {b"1": True, b"on": True, b"true": True, b"yes": True}
_SWITCH |= {b"0": False, b"off": False, b"false": False, b"no": False}


def _switch(settings: dict[str, Any], name: str, value: bytes | None) -> None:
    """`name`, `name=on` and `name=1` switch on; `name=off` and `name=0` switch off."""
    if value is not None and value not in _SWITCH:
        raise UsageError(f"mount option {name}={_shown(value)}: say on or off")
    settings[name] = value is None or _SWITCH[value]


def _choice(*allowed: bytes) -> _Handler:
    def choose(settings: dict[str, Any], name: str, value: bytes | None) -> None:
        if value not in allowed:
            names = _shown(b", ".join(allowed))
            raise UsageError(f"mount option {name}={_shown(value or b'')}: choose one of {names}")
        settings[name] = _shown(value)

    return choose


def _number(name: str, value: bytes | None, most: int) -> int:
    digits = _needed(name, value)
    if not re.fullmatch(rb"\d{1,20}", digits) or int(digits) > most:
        raise UsageError(f"mount option {name}={_shown(digits)}: not a number from 0 to {most}")
    return int(digits)


def _id(settings: dict[str, Any], name: str, value: bytes | None) -> None:
    settings[name] = _number(name, value, 2**32 - 2)


def _squash_to_root(settings: dict[str, Any], name: str, value: bytes | None) -> None:
    _present({}, name, value)
    settings.setdefault("squash_to_uid", 0)
    settings.setdefault("squash_to_gid", 0)


def _xattr_permissions(settings: dict[str, Any], name: str, value: bytes | None) -> None:
    settings[name] = 1 if value is None else _number(name, value, 2)


def _max_read(settings: dict[str, Any], name: str, value: bytes | None) -> None:
    settings[name] = _number(name, value, 2**32 - 1)


def _seconds(settings: dict[str, Any], name: str, value: bytes | None) -> None:
    text = _needed(name, value)
    if not re.fullmatch(rb"\d{1,18}(\.\d*)?|\.\d+", text):
        raise UsageError(f"mount option {name}={_shown(text)}: not a number of seconds")
    settings[name] = float(text)


def _mapping(settings: dict[str, Any], name: str, value: bytes | None) -> None:
    """`STORED:SHOWN:LENGTH`, any number of times, in one value."""
    name, goes_on, _ = name.partition("+")
    text = _needed(name, value)
    numbers = [int(number) for number in text.split(b":") if number.isdigit()]
    if len(numbers) != text.count(b":") + 1 or len(numbers) % 3 or max(numbers) >= 2**32:
        raise UsageError(f"mount option {name}={_shown(text)}: write ID:MAPPED-ID:LENGTH[:…]")
    triples = zip(*[iter(numbers)] * 3, strict=True)
    before = settings[name] if goes_on else ()
    settings[name] = before + tuple(Mapping(*triple) for triple in triples)


def _context(settings: dict[str, Any], name: str, value: bytes | None) -> None:
    label = _needed(name, value).strip(b'"')
    others = [entry for entry in settings.get("context", ()) if not entry.startswith(name.encode())]
    settings["context"] = (*others, b'%s="%s"' % (name.encode(), label))


_HANDLERS: dict[str, _Handler] = {
    "lowerdir": _layers,
    "lowerdir+": _one_more_layer,
    "upperdir": _path,
    "workdir": _path,
    "timeout": _seconds,
    "uidmapping": _mapping,
    "uidmapping+": _mapping,
    "gidmapping": _mapping,
    "gidmapping+": _mapping,
    "squash_to_root": _squash_to_root,
    "squash_to_uid": _id,
    "squash_to_gid": _id,
    "xattr_permissions": _xattr_permissions,
    "static_nlink": _present,
    "noacl": _present,
    "noxattrs": _switch,
    "volatile": _present,
    "fsync": _switch,
    "redirect_dir": _choice(b"on", b"off", b"follow", b"nofollow"),
    "metacopy": _switch,
    "userxattr": _present,
    "xino": _choice(b"auto", b"on", b"off"),
    "context": _context,
    "fscontext": _context,
    "defcontext": _context,
    "rootcontext": _context,
    "express": _switch,
    "uring": _choice(b"auto", b"on", b"off"),
    "spin": _choice(b"auto", b"on", b"off"),
    "passthrough": _choice(b"auto", b"upper", b"off"),
    "lookup_index": _path,
    "stats": _present,
    "keeper": _switch,
    "sleep": _seconds,
    "log": _path,
    "debug": _present,
    "allow_other": _present,
    "max_read": _max_read,
    "fsname": _path,
}

# name -> (flags of mount(2) it sets, flags it clears), as mount(8) understands them
_NONE = MountFlag.NONE
_FLAGS: dict[str, tuple[MountFlag, MountFlag]] = {
    "defaults": (_NONE, _NONE),
    "default_permissions": (_NONE, _NONE),  # always so
    "ro": (MountFlag.RDONLY, _NONE),
    "rw": (_NONE, MountFlag.RDONLY),
    "dev": (_NONE, MountFlag.NODEV),
    "nodev": (MountFlag.NODEV, _NONE),
    "suid": (_NONE, MountFlag.NOSUID),
    "nosuid": (MountFlag.NOSUID, _NONE),
    "exec": (_NONE, MountFlag.NOEXEC),
    "noexec": (MountFlag.NOEXEC, _NONE),
    "sync": (MountFlag.SYNCHRONOUS, _NONE),
    "async": (_NONE, MountFlag.SYNCHRONOUS),
    "dirsync": (MountFlag.DIRSYNC, _NONE),
    "symfollow": (_NONE, MountFlag.NOSYMFOLLOW),
    "nosymfollow": (MountFlag.NOSYMFOLLOW, _NONE),
    "atime": (_NONE, MountFlag.NOATIME),
    "noatime": (MountFlag.NOATIME, _NONE),
    "diratime": (_NONE, MountFlag.NODIRATIME),
    "nodiratime": (MountFlag.NODIRATIME, _NONE),
    "relatime": (MountFlag.RELATIME, _NONE),
    "norelatime": (_NONE, MountFlag.RELATIME),
    "strictatime": (MountFlag.STRICTATIME, _NONE),
    "nostrictatime": (_NONE, MountFlag.STRICTATIME),
    "lazytime": (MountFlag.LAZYTIME, _NONE),
    "nolazytime": (_NONE, MountFlag.LAZYTIME),
    "silent": (MountFlag.SILENT, _NONE),
    "loud": (_NONE, MountFlag.SILENT),
}

# Names that change nothing here: fuse-overlayfs's, overlayfs's, libfuse's, mount(8)'s.
_WITHOUT_EFFECT = (
    {"max_idle_threads", "threaded", "clone_fd", "plugins", "fast_ino", "writeback"}
    | {"index", "nfs_export", "uuid", "verity", "override_creds", "nooverride_creds"}
    | {"subtype", "nonempty", "big_writes"}
    | {"auto", "noauto", "user", "nouser", "users", "owner", "noowner", "group", "nogroup"}
    | {"nofail", "_netdev", "iversion", "noiversion", "mand", "nomand"}
)
