"""The benchmark: the same work on unionfuse and on every peer, interleaved, in one run."""

# __main__   the command line: what is measured, how often; writes table, JSON and plot
# trees      the layers that all of them mount, made once and kept
# peers      how each file system is mounted, and what its daemon holds in memory
# workloads  what is done in a mount, and how long it took
# probe.c    the timed loops, without an interpreter's share in them
# report     medians, intervals and ratios; the table and the plot
