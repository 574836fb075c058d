"""The tables of the store's database, and how older ones become the current ones.

`PRAGMA user_version` counts the migrations that were applied. A migration is never changed once it
was published; a new one is added.
"""

from __future__ import annotations

import sqlite3

from unionimage.errors import UserError

MIGRATIONS = (
    """
    -- Content by digest, in blobs/sha256/: configs, manifests, layers as they came.
    CREATE TABLE blobs (
        digest TEXT PRIMARY KEY,
        size INTEGER NOT NULL
    ) WITHOUT ROWID;

    -- Unpacked layers, in diff/. recipe: 1 if recipes/ can give the tar back.
    CREATE TABLE layers (
        diff_id TEXT PRIMARY KEY,
        tar_size INTEGER NOT NULL,
        size INTEGER NOT NULL,
        entries INTEGER NOT NULL,
        recipe INTEGER NOT NULL,
        created REAL NOT NULL
    ) WITHOUT ROWID;

    -- The blobs that hold a layer's tar: compressed forms that came in or were made for a push.
    CREATE TABLE layer_blobs (
        diff_id TEXT NOT NULL REFERENCES layers ON DELETE CASCADE,
        digest TEXT NOT NULL REFERENCES blobs,
        compression TEXT NOT NULL,
        PRIMARY KEY (diff_id, digest)
    ) WITHOUT ROWID;

    -- id: digest of the config. parent: the image it was made from here, for `images -a`.
    CREATE TABLE images (
        id TEXT PRIMARY KEY REFERENCES blobs,
        manifest TEXT REFERENCES blobs,
        parent TEXT,
        chain_id TEXT,
        created TEXT NOT NULL,
        added REAL NOT NULL,
        used REAL NOT NULL
    ) WITHOUT ROWID;

    CREATE TABLE image_layers (
        image TEXT NOT NULL REFERENCES images ON DELETE CASCADE,
        position INTEGER NOT NULL,
        diff_id TEXT NOT NULL REFERENCES layers,
        PRIMARY KEY (image, position)
    ) WITHOUT ROWID;
    CREATE INDEX image_layers_by_layer ON image_layers (diff_id);

    -- The steps of an image, 1 the oldest; diff_id is null for one that made no layer.
    CREATE TABLE history (
        image TEXT NOT NULL REFERENCES images ON DELETE CASCADE,
        step INTEGER NOT NULL,
        created TEXT NOT NULL,
        created_by TEXT NOT NULL,
        author TEXT NOT NULL,
        comment TEXT NOT NULL,
        diff_id TEXT,
        PRIMARY KEY (image, step)
    ) WITHOUT ROWID;

    -- Full names: registry/path:tag.
    CREATE TABLE names (
        name TEXT PRIMARY KEY,
        image TEXT NOT NULL REFERENCES images ON DELETE CASCADE
    ) WITHOUT ROWID;
    CREATE INDEX names_by_image ON names (image);

    -- registry/path@digest, by which an image was pulled or pushed.
    CREATE TABLE digests (
        name TEXT PRIMARY KEY,
        image TEXT NOT NULL REFERENCES images ON DELETE CASCADE
    ) WITHOUT ROWID;

    -- Who uses what. A lease's owner is `lease:ID` and ends with its process; all others stay.
    CREATE TABLE holds (
        owner TEXT NOT NULL,
        kind TEXT NOT NULL CHECK (kind IN ('blob', 'layer', 'image')),
        key TEXT NOT NULL,
        PRIMARY KEY (owner, kind, key)
    ) WITHOUT ROWID;
    CREATE TABLE leases (
        id TEXT PRIMARY KEY,
        purpose TEXT NOT NULL,
        created REAL NOT NULL
    ) WITHOUT ROWID;

    CREATE TABLE mounts (
        target TEXT PRIMARY KEY,
        image TEXT,
        step INTEGER,
        driver TEXT NOT NULL,
        upper TEXT,
        layers TEXT NOT NULL,
        boot TEXT NOT NULL,
        namespace INTEGER NOT NULL,
        created REAL NOT NULL
    ) WITHOUT ROWID;
    """,
    """
    -- Contents of files in layers, for sharing them (dedupe.py); empty where that is not done.
    CREATE TABLE files (
        hash INTEGER NOT NULL,
        size INTEGER NOT NULL,
        diff_id TEXT NOT NULL REFERENCES layers ON DELETE CASCADE,
        path BLOB NOT NULL
    );
    CREATE INDEX files_by_content ON files (hash, size);
    CREATE INDEX files_by_layer ON files (diff_id);
    """,
    """
    -- Names that stand for the images of several platforms (platforms.py), and the OCI index.
    CREATE TABLE indexes (
        name TEXT PRIMARY KEY REFERENCES names ON DELETE CASCADE,
        digest TEXT NOT NULL REFERENCES blobs
    ) WITHOUT ROWID;
    CREATE TABLE index_images (
        name TEXT NOT NULL REFERENCES indexes ON DELETE CASCADE,
        position INTEGER NOT NULL,
        image TEXT NOT NULL REFERENCES images ON DELETE CASCADE,
        PRIMARY KEY (name, position)
    ) WITHOUT ROWID;
    CREATE INDEX index_images_by_image ON index_images (image);
    """,
    """
    -- Every compressed form that a layer was seen in. Outlives blob and layer: before a
    -- push compresses it again, the registry is asked whether it has one of them.
    CREATE TABLE forms (
        diff_id TEXT NOT NULL,
        compression TEXT NOT NULL,
        digest TEXT NOT NULL,
        size INTEGER NOT NULL,
        seen REAL NOT NULL,
        PRIMARY KEY (diff_id, digest)
    ) WITHOUT ROWID;
    INSERT INTO forms SELECT diff_id, compression, digest, size, strftime('%s', 'now')
        FROM layer_blobs JOIN blobs USING (digest);
    """,
)


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the database up to date; several processes may try at once.

    Raises:
        UserError: it was written by a newer version of this program.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == len(MIGRATIONS):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise UserError(
                f"the store has version {version}, this program knows {len(MIGRATIONS)}: upgrade it"
            )
        for number in range(version, len(MIGRATIONS)):
            for statement in _statements(MIGRATIONS[number]):
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _statements(script: str) -> list[str]:
    """`executescript` would commit by itself."""
    statements, pending = [], ""
    for line in script.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            statements.append(pending)
            pending = ""
    return statements
