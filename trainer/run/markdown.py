"""Writes any text into Markdown so that it stays text: inline, as code, and as a block."""

from __future__ import annotations

import re


def plain(text: str) -> str:
    """Escape text for Markdown, on one line."""
    return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", " ".join(str(text).split()))


def code(text: str) -> str:
    """Format any text as inline code."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    room = " " if "`" in text else ""
    return f"{fence}{room}{' '.join(text.split())}{room}{fence}"


def block(text: str, language: str = "text") -> str:
    """Format any text as a code block."""
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", text))]))
    return f"{fence}{language}\n{text}\n{fence}"


def sentence(text: str) -> str:
    """Escaped text that begins with a capital, to which a period can be added."""
    return plain(text[:1].upper() + text[1:])
