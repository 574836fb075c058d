"""The merged tree in memory: nodes, names, listings. Nothing is changed on disk here.

tree.py        lookup: which node a name is
node.py        nodes, and what is asked of them
view.py        a directory as merged from the layers; merging.py makes it when it is needed
_tables.pyx    merged directories in memory, compiled: the express lane answers from them
               (_block.pxd, _shelf.pxd, _merge.pxd are its parts)
inodes.py, origins.py, links.py, redirects.py
               inode numbers, and where a node comes from
attributes.py, xattrs.py
               what is shown of a node
openfiles.py   handles, and the descriptors behind them
young.py       directories whose new files compiled code makes
forgetting.py, revival.py, farewell.py
               nodes let go, made anew, and what is left of one without a name
journal.py, _notes.pyx
               what is written down for the next daemon
"""
