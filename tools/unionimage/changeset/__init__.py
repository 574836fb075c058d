"""Upper directory ↔ OCI layer tar, both ways. Hostile tars stop here.

The map: tar (the format) ← unpack (tar → directory), pack (directory → tar); recipe (what a tar has
beside its files' contents); compression (gzip, zstd); paths (constants).
"""
