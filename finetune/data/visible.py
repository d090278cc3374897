"""Text as a reader must see it: characters that hide, reorder or command are shown by name.

Rows, names and paths come from anywhere. A terminal obeys escape sequences, and both terminals and browsers reorder
text at bidirectional overrides, so that it seems to say something else; none of these characters is passed on.
"""

from __future__ import annotations

import re

# Controls but for newline; soft hyphen; what has no width, joins or directs; line and paragraph separators; halves of
# characters; private and reserved ones; tags.
HIDING = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\ufdd0-\ufdef\ud800-\udfff\U000e0000-\U000e0fff]"
)
RETURN = "\u21b5"  # stands before each newline


def visible(text: str, *, lines: bool = False) -> str:
    """`text` with nothing in it that hides.

    Args:
        text: any text.
        lines: whether newlines break the line, behind a sign; else the sign stands alone.
    """
    return HIDING.sub(_shown, text).replace("\n", f"{RETURN}\n" if lines else RETURN)


def _shown(match: re.Match[str]) -> str:
    number = ord(match.group())
    if number < 0x20:
        return chr(0x2400 + number)  # the pictures that Unicode has of them
    if number == 0x7F:
        return "\u2421"
    return f"\u27e8U+{number:04X}\u27e9"
