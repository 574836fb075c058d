"""unionfuse: read-only layer directories and one writable upper directory as one tree."""

# The map of this package. Arrows point from caller to callee, and only downwards
# (tests/unit/test_structure.py keeps it so):
#
#   __main__   the mount program, `python -m unionfuse`
#   daemon/    the life of a mount: command line, opening, mounting, signals, unmounting
#   survival/  what a mount outlives its daemon by; keeper.c is a process of its own
#   express/, pyfuse/   the two doors: the compiled fast lane, and pyfuse3 on trio
#   union.py   what the doors call: the lock, and every request once
#   changes/   what is written, and how a file gets into upper first
#   tree/      the merged tree: nodes, lookup, listing
#   index/     the lookup index
#   layers/    what lies on disk: layer directories, upper and work, marks
#   wire/      what goes over the FUSE channel
#   syscalls, mounting, capabilities    the only raw system calls; mount(2); who may do what
#
# options (the -o line) is used by all of them. Nothing here imports unionimage.

__version__ = "0.1.0"
