"""unionfuse: read-only layer directories and one writable upper directory as one tree."""

# The map of this package. Arrows point from caller to callee, and only downwards:
#
#   __main__   the command line of a mount program
#   daemon     mount, event loop, signals, unmount
#   operations, express     the two doors: pyfuse3 on trio, and the compiled fast lane
#   union      what the doors call: the lock, open files, attributes
#   openfiles               handles, and the descriptors behind them
#   upper, renaming, copyup changes: what is written, and how a file gets into upper first
#   tree, node, view        the merged tree: nodes, lookup, listing
#   index, layer, whiteout  what lies on disk: lookup index, layer directories, marks
#   syscalls   the only raw system calls
#
# keeper (a process of its own) and survival are what a mount outlives its daemon by.
# options (the -o line) is used by all of them. Nothing here imports unionimage.

__version__ = "0.1.0"
