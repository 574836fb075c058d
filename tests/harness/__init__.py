"""What the tests of the file system stand on.

layers.py      a layer from a compact description: ``{"etc/passwd": "root", "var": Dir()}``
linux.py       the few system calls that Python's ``os`` does not have
mounts.py      one tree out of layers, by unionfuse, kernel overlayfs, a peer, or a plain directory
snapshot.py    a whole tree as data, and two such trees compared in words
watchdog.py    the process that ends hung mounts and cleans up after a test run that died
actions.py     random changes of a tree as data, done to several trees alike
direct.py      the union without a mount, by path; with its hooks for faults
scenarios.py   single operations for the tests that disturb them
users.py       a function run as another user, or in namespaces of its own
debian.py      a real Debian tree, kept in ``.cache``

The arrows: mounts → (layers, snapshot, watchdog) → linux. Nothing but direct.py
imports unionfuse: the product is started as a user starts it, by its command.
"""
