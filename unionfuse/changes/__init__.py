"""Changes: each is staged in work or done in upper, and published by one system call.

upper.py      create, remove, link in the writable layer
copyup.py     how a file gets there first: work directory, data, xattrs, attributes, one rename
renaming.py   rename, exchange, and the whiteouts that they leave
"""
