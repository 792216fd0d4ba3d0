"""What stands behind the stop strings: text in, parts out."""

from __future__ import annotations

from pyserve.text.parts import Content, Plain, content_of


def test_plain_text_is_content_as_it_comes() -> None:
    stage = Plain()
    parts = [*stage.push(Content("Hello")), *stage.push(Content(" world")), *stage.flush()]
    assert parts == [Content("Hello"), Content(" world")]
    assert content_of(parts) == "Hello world"
