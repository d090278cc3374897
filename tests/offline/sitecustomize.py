"""Blocks the network in every Python process a test starts: tests/conftest.py puts this folder on PYTHONPATH."""

import network

network.block()
