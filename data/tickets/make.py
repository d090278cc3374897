"""Write the support tickets, or verify them: `python data/tickets/make.py [--check]`."""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from maker import main  # noqa: E402 - what the data sets share lies beside them, in no package
from ticket_grammar import data_set  # noqa: E402

BLOCKS = {"train": 47, "heldout": 5}
"""Blocks of 64 rows: 3,008 to train on, 320 held out."""

if __name__ == "__main__":
    raise SystemExit(main(FOLDER, data_set(FOLDER, BLOCKS)))
