"""What lies on disk, and how it is read: layer directories, upper and work, and the marks in them.

layer.py       Layer, LayerStack: opened once, entered by descriptor
whiteout.py    whiteouts, opaque marks, redirects: every dialect, read and written
upperdir.py    upper and work: their locks, and what a dead daemon left there
ordering.py    what a file system promises of the order in which changes reach the disk
owners.py      whose a file is: id mappings, squashing, xattrs of rootless tools
_scan.pyx      reads a directory
"""
