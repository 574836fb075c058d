"""The lookup index: one file in the wire format, for what `find` and `ls -lR` ask of some layers.

lookup.py     its format, and reading it
builder.py    makes one of a layer, or of a chain's and one layer more; sections.py writes its parts
check.py      whether it still tells of its layers what they are
"""
