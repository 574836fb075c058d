"""Images from Dockerfiles."""

# How data flows; every arrow points down this list.
#
#   build.py         a request of the command line → an image in the store
#   squash.py        the layers that a build added → one
#   execute.py       a plan → layers: the cache first, then stages side by side
#   runstep.py       RUN: mounts, secrets, the OCI runtime
#   copystep.py      COPY, ADD, WORKDIR: what is copied, its digest, the writing
#   kitchen.py       where steps are carried out: scratch space, mounts, a lease
#   helper.py        the process that mounts quickly, and cleans up after a kill
#   extract.py       archives → files below a directory
#   place.py         files → a root file system that may be hostile
#   select.py        which files a source names, and their digest
#   context.py       directory, tar, stdin, git → the build context
#   records.py       what the cache takes, and giving it up
#   cache.py         key → what a step made
#   plan.py          instructions and base images → immutable steps
#   config.py        instructions about the config alone, history texts
#   runmount.py      RUN --mount=…
#   instructions.py  commands → typed instructions
#   expand.py ignore.py   variables; .dockerignore
#   parser.py        text → commands (BuildKit's parser)
#   view.py          how a build shows itself
