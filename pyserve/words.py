"""Wording that messages share."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """ "1 request", "0 requests"; for nouns whose plural is made with an s."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
