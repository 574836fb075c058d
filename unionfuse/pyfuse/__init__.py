"""The complete door: pyfuse3 on trio, which answers what the express lane does not know.

channel.py     the socket pair over which libfuse shakes hands with us in the kernel's place
eventloop.py   the thread that trio and pyfuse3 run in
operations.py  pyfuse3.Operations: each request is a call of the union
"""
