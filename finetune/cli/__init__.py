"""The command line: parse words, call a story, draw the result."""
