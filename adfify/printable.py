"""Foreign text on one line of a terminal: file names, labels and keys can hold anything."""

from __future__ import annotations

import unicodedata

# Note [Foreign text is escaped]
# A file name may hold a newline, which forges a line of output, an escape sequence, which the terminal obeys, a sign
# that turns the reading direction, or bytes that are no text, which can't be encoded. Labels and state_dict keys come
# from files, too. Whatever of them is printed goes through `printable`; JSON escapes by itself.

_ESCAPED = {"Cc", "Cs", "Zl", "Zp"}  # control characters, lone surrogates, separators of lines and paragraphs
_LONGEST_LINE = 300
_DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def printable(value: object) -> str:
    """``str(value)`` with everything escaped that is no visible text: ``a\\nb`` on one line."""
    return "".join(_escaped(character) for character in str(value))


def first_line(error: BaseException) -> str:
    """The beginning of what a library's error says, which may go on for pages."""
    return printable(str(error).partition("\n")[0][:_LONGEST_LINE])


def printable_lines(text: str) -> str:
    """The same for a message of several lines, which stay lines."""
    return "\n".join(printable(line) for line in text.split("\n"))


def _escaped(character: str) -> str:
    hidden = unicodedata.category(character) in _ESCAPED or character in _DIRECTIONS
    return character.encode("unicode_escape").decode("ascii") if hidden else character
