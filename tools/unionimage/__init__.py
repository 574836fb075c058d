"""Images and containers on unionfuse: build, commit, move, look into and run layer stacks."""
