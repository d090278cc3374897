"""The base model: check, load, quantise, adapt, merge, compare."""
