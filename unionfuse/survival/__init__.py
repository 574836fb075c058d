"""What a daemon leaves to the one that takes its place on the same mount.

memory.py     the shared memory that a keeper holds: layout, INIT, counters
journal.py    node ids and open handles, written down before the kernel learns of them
intents.py    what is being changed right now, and what was answered: nothing is done twice
settling.py   a new daemon's first act: finishes or takes back what the dead one had begun
keeping.py    the daemon's line to its keeper, which holds descriptors and starts daemons anew

docs/survival.md says what all of this promises. keeper.c is the keeper itself.
"""
