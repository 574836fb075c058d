"""Images and containers on top of unionfuse: build, commit, move, look into and run layer stacks."""
