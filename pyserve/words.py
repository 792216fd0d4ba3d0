"""Wording that is used in many messages."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """A number with its noun, as "1 request" or "0 requests", for nouns whose plural ends in s."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
