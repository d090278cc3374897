"""Write the Chinese support tickets, or verify them: `python data/tickets-zh/make.py [--check]`."""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from maker import main  # noqa: E402 - what the data sets share lies beside them, in no package
from ticket_grammar import data_set  # noqa: E402

BLOCKS = {"train": 24, "heldout": 3}
"""Blocks of 64 rows: 1,536 to train on, 192 held out."""

if __name__ == "__main__":
    raise SystemExit(main(FOLDER, data_set(FOLDER, BLOCKS)))
