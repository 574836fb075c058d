"""The life of a mount, from the command to its end.

command.py   its words: usage, version, what is refused
daemon.py    opens layers and upper, mounts, starts the doors, puts everything away
serving.py   the main thread while the mount lives: signals, and the end
spawner.py   a process that has imported all and forks daemons, so that a mount is quick
errand.py    asking it, by a caller that has imported nothing
logs.py      where the daemon's log goes
"""
