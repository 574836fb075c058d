"""Registries: fetch images from them, send images to them, and to other machines over ssh.

    cli/{pull,push,login,logout,copy,tags}.py
        └─ pull.py, push.py      what to move, and in which order
             ├─ outgoing.py      which blobs and manifest stand for an image
             └─ session.py       a reference → its repository, through the configured mirrors
                  └─ client.py       the distribution specification: manifests, uploads, tags
                       ├─ blob.py        a blob as a stream that survives cuts
                       ├─ auth.py        challenges and tokens
                       │    └─ credentials.py   docker's config.json and credential helpers
                       └─ transport.py   a registry's connections: schemes, back-off, redirects
                            └─ http.py       connections of http.client, used again
        └─ ssh.py                copy: the layers that the other side lacks, over one ssh connection
    errors.py                   what goes wrong, in one line

Nothing in here is imported by verbs that need no registry.
"""
