"""From sources to batches: read, render, mask, pack, collate."""
