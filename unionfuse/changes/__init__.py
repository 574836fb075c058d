"""Changes: each is staged in work or done in upper, and published by one system call.

upper.py      create, remove, link in the writable layer
copyup.py     how a file gets there first: a copy is staged, one rename publishes it
staging.py    the copy: data, xattrs, attributes, and the wait until it is on disk
_plain.pyx    the same for a small file that has nothing but data
ahead.py      copies that are staged before they are asked for (chmod -R)
renaming.py   rename, exchange, and the whiteouts that they leave
"""
