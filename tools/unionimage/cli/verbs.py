"""Which verbs there are, in the groups that the help shows, and docker's other spellings of them.

Nothing is imported here: the help and the dispatch read it at every start.
"""

from __future__ import annotations

# group -> verb -> (module below this package, one line of help). A module has
#   EXAMPLE: str             a command line or more that shows it, printed at the end of its --help
#   configure(parser)        adds its arguments to an argparse parser
#   run(args) -> int         does it and returns the exit code; raises UserError
#   ERROR_CODE: int = 1      (optional) the exit code of a UserError that does not say its own
# `args.root` is the store that was asked for or None; `common.open_store(args)` opens it.
GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "Images": {
        "images": ("images", "List images, or show them as a tree of layers"),
        "history": ("history", "Show the steps that made an image"),
        "inspect": ("inspect", "Show everything known about containers or images"),
        "tag": ("tag", "Give an image another name"),
        "rmi": ("rmi", "Remove images"),
        "diff": ("diff", "Show what was added, changed and deleted"),
        "du": ("du", "Show what takes the space in the store"),
        "which": ("which", "Show the layer and the step that a file comes from"),
        "explore": ("explore", "Show an image as a page of pictures"),
        "image": ("image", "Manage images"),
    },
    "Building": {
        "build": ("build", "Build an image from a Dockerfile"),
        "commit": ("commit", "Make an image from changes on top of another"),
        "import": ("import_", "Make an image of a root file system's tar"),
        "builder": ("builder", "Manage the build cache"),
    },
    "Archives and registries": {
        "save": ("save", "Write images to an archive"),
        "load": ("load", "Read images from an archive"),
        "export": ("export", "Write the file system of an image or container as one tar"),
        "pull": ("pull", "Download an image from a registry"),
        "push": ("push", "Upload an image to a registry"),
        "login": ("login", "Log in to a registry"),
        "logout": ("logout", "Log out of a registry"),
        "tags": ("tags", "List the tags of a repository in a registry"),
        "copy": ("copy", "Send an image to another host over ssh"),
    },
    "Mounts": {
        "mount": ("mount", "Mount an image, or what it was after a step, at a directory"),
        "umount": ("umount", "Unmount"),
        "mounts": ("mounts", "List mounted images"),
        "upgrade": (
            "upgrade",
            "Replace the daemon of a mount that has a keeper, while it is in use",
        ),
        "layers": ("layers", "List or change the layers of a mount while it is in use"),
        "index": ("index", "Build, verify or show lookup indexes"),
    },
    "Containers": {
        "run": ("run", "Make a container of an image and start it"),
        "create": ("create", "Make a container of an image"),
        "start": ("start", "Start stopped containers"),
        "stop": ("stop", "Stop containers"),
        "restart": ("restart", "Stop containers and start them again"),
        "kill": ("kill", "Send a signal to containers"),
        "pause": ("pause", "Freeze all processes of containers"),
        "unpause": ("unpause", "Let frozen containers go on"),
        "wait": ("wait", "Wait until containers end and print their exit codes"),
        "rm": ("rm", "Remove containers"),
        "rename": ("rename", "Give a container another name"),
        "ps": ("ps", "List containers"),
        "logs": ("logs", "Show what a container has written"),
        "attach": ("attach", "Attach this terminal to a running container"),
        "exec": ("exec_", "Run one more command in a running container"),
        "top": ("top", "Show the processes of a container"),
        "stats": ("stats", "Show what containers use"),
        "port": ("port", "Show where the ports of a container are published"),
        "update": ("update", "Change the limits of containers"),
        "events": ("events", "Show what happens to containers"),
        "cp": ("cp", "Copy files between a container and the host"),
        "volume": ("volume", "Manage volumes"),
        "network": ("network", "Manage networks"),
        "container": ("container", "Manage containers"),
    },
    "The store and this program": {
        "prune": ("prune", "Remove images that nothing names and data that nothing uses"),
        "check": ("check", "Verify every blob, layer and index in the store"),
        "system": ("system", "Show and clean up what there is in all"),
        "version": ("version", "Show the version of this program"),
        "completion": ("completion", "Print the completion script for a shell"),
        "man": ("man", "Print the manual page of a verb"),
    },
}

VERBS = {verb: told for group in GROUPS.values() for verb, told in group.items()}


# Verbs that docker also takes behind a noun.
_OF_AN_IMAGE = "history tag save load import build pull push diff mount"
_OF_A_CONTAINER = (
    "run create start stop restart kill pause unpause wait rm rename logs attach cp exec top stats "
    "port update diff commit export"
)

# Docker's grouped forms, and its other spellings: the first words -> the verb and what it implies.
ALIASES: dict[tuple[str, ...], tuple[str, ...]] = {
    **{("image", verb): (verb,) for verb in _OF_AN_IMAGE.split()},
    ("image", "ls"): ("images",),
    ("image", "list"): ("images",),
    ("image", "rm"): ("rmi",),
    ("image", "remove"): ("rmi",),
    ("image", "prune"): ("prune",),
    ("image", "unmount"): ("umount",),
    ("image", "umount"): ("umount",),
    ("image", "tree"): ("images", "--tree"),
    ("image", "inspect"): ("inspect", "--type", "image"),
    **{("container", verb): (verb,) for verb in _OF_A_CONTAINER.split()},
    ("container", "inspect"): ("inspect", "--type", "container"),
    ("container", "ls"): ("ps",),
    ("container", "list"): ("ps",),
    ("container", "ps"): ("ps",),
    ("builder", "build"): ("build",),
    ("buildx", "build"): ("build",),
    ("buildx", "prune"): ("builder", "prune"),
    ("info",): ("system", "info"),
    ("system", "events"): ("events",),
}
