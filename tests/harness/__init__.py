"""What the tests of the file system stand on.

layers.py      a layer from a compact description: ``{"etc/passwd": "root", "var": Dir()}``
linux.py       the few system calls that Python's ``os`` does not have
mounts.py      one tree out of layers, by unionfuse, kernel overlayfs, a peer, or a plain directory
snapshot.py    a whole tree as data, and two such trees compared in words
watchdog.py    the process that ends hung mounts and cleans up after a test run that died
actions.py     random changes of a tree as data, done to several trees alike
direct.py      the union without a mount, by path; with its hooks for faults
powerloss.py   what a disk may hold after a power cut, by a model
malformed.py   a mount's doors with a test in the place of the kernel
fuzzing*.py    what scripts/fuzz runs: readers of what strangers send, and those doors
torture.py     programs that write without pause and check all that they read
disks.py       real file systems in a file
backings.py    the files that the kernel holds for passthrough
scenarios.py   single operations for the tests that disturb them
waiting.py     waiting for what nobody reports
users.py       a function run as another user, or in namespaces of its own
debian.py      a real Debian tree, kept in ``.cache``

The arrows: mounts → (layers, snapshot, watchdog) → linux. Nothing but direct.py, powerloss.py,
malformed.py and fuzzing*.py imports the product: else it is started as a user starts it, by its
command.
"""
