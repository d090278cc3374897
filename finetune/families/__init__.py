"""One file per model family: the facts its config.json does not state."""
