"""What a visitor of the page does."""

from __future__ import annotations

from tests.api.fakes import Server
from tests.api.pages.browser import Tab

PHONE, DESKTOP = (390, 844), (1280, 800)  # CSS pixels
DONE = "$$('.assistant:not(.pending)').length === {}"
ANSWER = ".assistant > [data-part=content]"


def open_page(tab: Tab, server: Server, path: str = "/") -> None:
    tab.open(f"http://127.0.0.1:{server.port}{path}")
    tab.wait("$('#status').className === 'good' && !$('#send').disabled")


def say(tab: Tab, text: str) -> None:
    tab.wait("!$('#send').disabled")
    tab.run("$('#text').focus()")
    tab.type(text)
    tab.press("Enter")


def ask(tab: Tab, text: str, *, num_answers: int = 1) -> None:
    say(tab, text)
    tab.wait(DONE.format(num_answers))


def last_prompt(server: Server) -> str:
    """The prompt of the last sequence, as text."""
    return server.tokenizer.decode(server.engine.submitted[-1].prompt, skip_special_tokens=False)
