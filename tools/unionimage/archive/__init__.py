"""Images as files: docker's archive and the OCI image layout, read and written.

sources: where an archive's members come from (a file, a pipe, a directory)
load:    members → images in the store          legacy: docker's oldest form
save:    images in the store → an archive
"""
