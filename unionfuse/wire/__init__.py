"""What goes over the FUSE channel: the structs, opcodes and flags of linux/fuse.h.

protocol.py       for Python: the structs, and INIT
_wire.pxd         for compiled code: what of them it writes
_attributes.pyx   what stat(2) shows of a node, kept in the form in which it is sent
"""
