"""What every maker of a data set does on the command line: write its files, or with --check compare them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def main(folder: Path, content: dict[str, str]) -> int:
    """Write `content` (file name to text) into `folder`, each file at once, or compare; returns an exit code.

    With --check nothing is written, and the exit code is 1 when a file differs or is missing.
    """
    parser = argparse.ArgumentParser(description=f"Write {', '.join(content)} into {folder.name}/.")
    parser.add_argument("--check", action="store_true", help="only verify that the files equal what would be written")
    check = parser.parse_args().check
    wrong = 0
    for name, text in content.items():
        path = folder / name
        if check:
            same = path.is_file() and path.read_text(encoding="utf-8") == text
            print(f"{path}: {'as generated' if same else 'differs from what the maker writes'}")
            wrong += not same
            continue
        temporary = path.with_name(f".{name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
        print(f"{path}: {text.count(chr(10)):,} rows")
    return 1 if wrong else 0
