"""One file per way to score an answer."""
