"""What an answer cannot do to the page, in a real browser."""

from __future__ import annotations

import contextlib
import socket

import pytest

from tests.api.fakes import Server
from tests.api.pages.browser import MISSING, PROGRAM, Browser, Tab
from tests.api.pages.visit import DONE, ask, open_page

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=MISSING)

# Each tries to run `window.wasRun = 1`, or to fetch something from ELSEWHERE.
HOSTILE = (
    "<script>window.wasRun = 1</script><script src='ELSEWHERE/a.js'></script>",
    "<img src=ELSEWHERE/b.png onerror='window.wasRun = 1'> ![x](ELSEWHERE/c.png 'x')",
    "<iframe src='ELSEWHERE/d'></iframe><iframe srcdoc='<script>top.wasRun=1</script>'></iframe>",
    "<svg onload='wasRun = 1'><image href='ELSEWHERE/e.svg'/><use href='ELSEWHERE/f'/></svg>",
    "<style>@import 'ELSEWHERE/g.css'; body { background: url(ELSEWHERE/h.png) }</style>",
    "<p style='background: url(ELSEWHERE/i.png)'>x</p><link rel=stylesheet href=ELSEWHERE/j.css>",
    "[x](javascript:wasRun=1) [y](JaVaScRiPt&colon;wasRun=1) <a href='javascript:wasRun=1'>z</a>",
    "[x](data:text/html,<script>opener.wasRun=1</script>) [y](vbscript:x) <javascript:wasRun=1>",
    "<form action=ELSEWHERE/k><input name=x autofocus onfocus='wasRun=1'><button>z</button></form>",
    "<base href=ELSEWHERE/><meta http-equiv=refresh content='0;url=ELSEWHERE/l'>",
    "<object data=ELSEWHERE/m></object><embed src=ELSEWHERE/m2><portal src=ELSEWHERE/m3></portal>",
    "![x][r]\n\n[r]: ELSEWHERE/n.png\n\n<video src=ELSEWHERE/o autoplay></video>",
    "```html\n<script>window.wasRun = 1</script>\n```\n\n`<img src=x onerror=wasRun=1>`",
    "```a\" onclick=\"wasRun=1\nx\n```\n[x](ELSEWHERE/q\"onmouseover=\"wasRun=1)",
    "<math><mtext><table><mglyph><style><img src onerror=wasRun=1></style></mglyph></table>",
    "| <img src=ELSEWHERE/r> |\n|---|\n| <script>wasRun=1</script> |",
    "<details open ontoggle=wasRun=1>x</details><a href=ELSEWHERE ping=ELSEWHERE/s>y</a>",
)  # fmt: skip
ALLOWED = {"DIV", "P", "A", "CODE", "PRE", "SPAN", "BUTTON", "TABLE", "THEAD", "TBODY", "TR", "TH",
           "TD", "BR"}  # fmt: skip


def check_nobody_came(sock: socket.socket) -> None:
    with pytest.raises(BlockingIOError):
        sock.accept()


def check_nothing_was_asked(sock: socket.socket) -> None:
    """Chromium connects for a frame before it looks at the policy, then sends nothing."""
    with contextlib.suppress(BlockingIOError):  # those were all
        while True:
            connection, _ = sock.accept()
            with connection, contextlib.suppress(TimeoutError):
                connection.settimeout(0.5)
                assert connection.recv(1) == b""


@pytest.mark.parametrize("place", ["content", "thinking"])
def test_a_hostile_answer_runs_nothing_and_fetches_nothing(
    tab: Tab, server: Server, elsewhere: socket.socket, place: str
) -> None:
    other = f"http://127.0.0.1:{elsewhere.getsockname()[1]}"
    for number, text in enumerate(HOSTILE, 1):
        answer = text.replace("ELSEWHERE", other)
        server.play(f"<think>{answer}</think>ok" if place == "thinking" else answer)
        ask(tab, "hi", num_answers=number)
        tab.run("$$('details').forEach(e => { e.open = true })")
    server.play("Hello")
    for _ in range(2):  # again as it is kept
        found = set(tab.run("$$('.prose *').map(e => e.tagName)"))
        assert found <= ALLOWED
        attributes = "$$('.prose *').flatMap(e => e.getAttributeNames())"
        assert set(tab.run(attributes)) <= {
            "class", "href", "title", "target", "rel", "type", "data-part",
        }  # fmt: skip
        assert "<script>window.wasRun = 1</script>" in tab.run("document.body.innerText")
        links = "$$('.prose a')"
        targets = tab.run(f"{links}.map(e => e.getAttribute('href'))")
        assert all(href is None or href.startswith(other) for href in targets)
        tab.run(f"{links}.filter(e => !e.href.startsWith('http')).forEach(e => e.click())")
        assert tab.run("window.wasRun") is None
        tab.reload()
        tab.wait(DONE.format(len(HOSTILE)))
        tab.run("$$('details').forEach(e => { e.open = true })")
    assert tab.dialogs == []
    assert all(url.startswith(f"http://127.0.0.1:{server.port}/") for url in tab.requested)
    check_nobody_came(elsewhere)


def test_the_policy_holds_where_the_sanitiser_would_not(
    browser: Browser, server: Server, elsewhere: socket.socket
) -> None:
    other = f"http://127.0.0.1:{elsewhere.getsockname()[1]}"
    with browser.tab() as tab:
        open_page(tab, server)
        assert "TrustedHTML" in tab.run(
            "(() => { try { document.body.innerHTML = '<p>x'; } catch (e) { return e.message } })()"
        )
        assert tab.run(f"fetch('{other}').then(() => 'came', e => e.name)") == "TypeError"
        for tag in ("img", "iframe", "video", "object", "embed"):
            attribute = "data" if tag == "object" else "src"
            tab.run(
                f"(e => {{ try {{ e.{attribute} = '{other}/x' }} catch {{ /* trusted types */ }}"
                f" document.body.append(e) }})(document.createElement('{tag}'))"
            )
        tab.run("document.body.setAttribute('style', 'color: red')")
        assert tab.run("getComputedStyle(document.body).color") != "rgb(255, 0, 0)"
        assert len(tab.problems) >= 7, tab.problems
    check_nothing_was_asked(elsewhere)


def test_text_of_the_user_and_of_errors_is_only_text(tab: Tab, server: Server) -> None:
    server.engine.room = 0
    text = "<img src=x onerror=wasRun=1>"
    ask(tab, text)
    assert tab.text(".bubble") == text and text in tab.text("#conversations")
    assert tab.run("$$('#app img, #side img').length") == 0
