"""Text as a reader must see it: characters that hide, reorder or command are shown by name.

Rows, names and paths come from anywhere. A terminal obeys escape sequences, and both terminals and browsers reorder
text at bidirectional overrides, so that it seems to say something else; none of these characters is passed on.
"""

from __future__ import annotations

import re
import unicodedata

UNUSUAL = re.compile("[^ -~\n]")
# Controls, formats (directions, joiners, tags), halves of characters, separators of lines and paragraphs, unassigned.
HIDING = ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp")
# Letters and marks without any shape: joiners, fillers, selectors of variants.
SHAPELESS = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
RETURN = "\u21b5"  # stands before each newline


def visible(text: str, *, lines: bool = False) -> str:
    """`text` with nothing in it that hides.

    Args:
        text: any text.
        lines: whether newlines break the line, behind a sign; else the sign stands alone.
    """
    return UNUSUAL.sub(_shown, text).replace("\n", f"{RETURN}\n" if lines else RETURN)


def _shown(match: re.Match[str]) -> str:
    letter = match.group()
    if unicodedata.category(letter) not in HIDING and not SHAPELESS.match(letter):
        return letter
    number = ord(letter)
    if number < 0x20:
        return chr(0x2400 + number)  # the pictures that Unicode has of them
    if number == 0x7F:
        return "\u2421"
    return f"\u27e8U+{number:04X}\u27e9"
