"""One run: its folder, arguments, ranks, checkpoints, callbacks and record."""
