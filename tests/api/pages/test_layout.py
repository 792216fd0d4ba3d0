"""How the page looks, in a real browser: what is in view, what can be read, in which colours."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.api.fakes import Server
from tests.api.pages.browser import MISSING, PROGRAM, Tab
from tests.api.pages.visit import ANSWER, DESKTOP, DONE, PHONE, ask, say

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=MISSING)


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_the_input_stays_in_view_and_the_answer_scrolls(
    tab: Tab, server: Server, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    info = replace(server.engine.info, max_model_len=8192)
    monkeypatch.setattr(server.engine, "info", info)
    tab.view(*size)
    server.play("Hello world, how are you?\n\n" * 6 + "```\n" + "x" * 60 + "\n```\n")
    for number in range(1, 11):
        ask(tab, "hello", num_answers=number)
    assert not tab.run("$$('.failure').some(e => e.checkVisibility())")
    distance = "(e => e.scrollHeight - e.clientHeight - e.scrollTop)($('#scroll'))"
    tab.wait(f"{distance} < 2")
    for selector in ("#text", "#send", "#open-settings"):
        box = tab.run(f"$('{selector}').getBoundingClientRect().toJSON()")
        assert box["top"] >= 0 and box["left"] >= 0, selector
        assert box["bottom"] <= size[1] and box["right"] <= size[0], selector
    assert tab.run("document.documentElement.scrollHeight") <= size[1]
    assert tab.run("document.documentElement.scrollWidth") <= size[0]
    assert tab.run("$('#scroll').scrollWidth") <= size[0]
    # What the reader scrolls back to stays while an answer comes.
    server.play("Hello world, how are you?\n\n" * 100, eos=False, delay_s=0.01)
    say(tab, "more")
    tab.wait(f"{DONE.format(10)} && $('.pending > .prose').innerText.length > 100")
    tab.wait(f"{distance} < 50")
    tab.run("$('#scroll').scrollTop -= 300")
    tab.wait("!$('#jump').hidden")
    top = tab.run("$('#scroll').scrollTop")
    before = tab.run("$('.pending > .prose').innerText.length")
    tab.wait(f"$('.pending > .prose').innerText.length > {before + 50}")
    assert tab.run("$('#scroll').scrollTop") == top
    tab.click("#jump")
    tab.wait(f"{distance} < 2 && $('#jump').hidden")
    tab.press("Escape")
    tab.wait(DONE.format(11))


def test_markdown_and_the_copy_button(tab: Tab, server: Server) -> None:
    code = "def f():\n    return '<b>'"
    server.play(
        f"# Title\n\n**bold** `x<y`\n\n```python\n{code}\n```\n\n| a | b |\n|---|--:|\n| 1 | 2 |\n"
    )
    ask(tab, "hi")
    assert tab.text(".prose h1") == "Title" and tab.text(".prose strong") == "bold"
    assert tab.text(".prose p code") == "x<y"
    assert tab.run("$('.prose .code code').textContent") == code
    assert tab.text(".prose .code-head span") == "python"
    assert tab.run("getComputedStyle($('td:last-child')).textAlign") == "right"
    # Without navigator.clipboard, as over plain HTTP from another machine.
    tab.run("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    tab.run("addEventListener('copy', () => { window.copied = document.activeElement.value })")
    tab.click(".prose .code-head button")
    tab.wait("$('.prose .code-head button').innerText === 'Copied'")
    assert tab.run("copied") == code


CODE = {
    "python": 'def f(x):  # it\'s\n    return "a\\"b" + 0x1f',
    "rust": "fn f<'a>() { let c = 'x'; /* \\n */ }",
    "SQL": "SELECT 'it''s' -- why\nFROM t",
    "sh": "echo a#b <script> # c",
}
COLOURED = {
    "python": [("word", "def"), ("comment", "# it's"), ("word", "return"), ("text", '"a\\"b"'),
               ("number", "0x1f")],
    "rust": [("word", "fn"), ("word", "let"), ("text", "'x'"), ("comment", "/* \\n */")],
    "SQL": [("word", "SELECT"), ("text", "'it'"), ("text", "'s'"), ("comment", "-- why"),
            ("word", "FROM")],
    "sh": [("comment", "# c")],
    "text": [],
}  # fmt: skip


def test_code_has_colours_and_keeps_its_text(tab: Tab, server: Server) -> None:
    blocks = {**CODE, "text": 'if "x"'}
    server.play("\n\n".join(f"```{name}\n{code}\n```" for name, code in blocks.items()))
    ask(tab, "hi")
    assert tab.run("$$('.code code').map(e => e.textContent)")[-len(blocks) :] == [*blocks.values()]
    spans = "[...e.children].map(s => [s.className.replace('code-', ''), s.textContent])"
    found = tab.run(f"$$('{ANSWER} .code code').map(e => {spans})")
    assert found == [[list(pair) for pair in pairs] for pairs in COLOURED.values()]
    size = "getComputedStyle({}).fontSize"
    code_size, pre_size = (tab.run(size.format(f"$('.code {name}')")) for name in ("code", "pre"))
    assert code_size == pre_size


def test_all_of_markdown_is_shown(tab: Tab, server: Server) -> None:
    server.play(
        "## a\n\n*b* __c__ ~~d~~ <x@y.org>\n\n- e\n  1. f\n- [x] g\n\n> h\n\n---\n\n3. i\n\n"
        "[j](http://k.org 'l')\\\nm\n\n###### n\n"
    )
    ask(tab, "hi")
    found = tab.run(f"$$('{ANSWER} *').map(e => e.tagName.toLowerCase())")
    assert set(found) == {
        "a", "blockquote", "br", "del", "div", "em", "h2", "h6", "hr", "li", "ol", "p", "strong",
        "ul",
    }  # fmt: skip
    assert tab.run("$('.prose ol[start]').start") == 3
    assert tab.run("$$('.prose a').map(e => e.href)") == ["mailto:x@y.org", "http://k.org/"]
    assert "☑ g" in tab.text(ANSWER)


def test_formulas_and_html_are_shown_as_they_are_written(tab: Tab, server: Server) -> None:
    formula = "\\[\n\\frac{a_1}{b*c*d}\n\\]"
    html = "<ul>\n  <li>x\n</ul>"
    server.play(
        f"So \\(a_1 * b_1\\) and $$x_2$$, $\\log n_1$:\n\n{formula}\n\n$5 or $6, $A_1:$B\n\n{html}"
    )
    ask(tab, "hi")
    codes = tab.run("$$('.prose code').map(e => e.textContent)")
    assert codes == ["\\(a_1 * b_1\\)", "$$x_2$$", "$\\log n_1$", formula]
    assert "$5 or $6, $A_1:$B" in tab.text(".assistant") and html in tab.text(".assistant")


def test_light_and_dark(tab: Tab) -> None:
    back = "getComputedStyle(document.body).backgroundColor"
    light = tab.run(back)
    tab.view(*PHONE, is_dark=True)
    assert tab.run(back) != light


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_everything_has_a_name(tab: Tab, server: Server, size: tuple[int, int]) -> None:
    tab.view(*size)
    ask(tab, "hi")
    tab.click("#open-settings")
    tab.call("Accessibility.enable")
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "textbox", "spinbutton", "combobox", "link", "checkbox", "log", "dialog"}
    named = [node for node in nodes if node.get("role", {}).get("value") in roles]
    assert len(named) > 10
    assert all(node["name"]["value"] for node in named if not node["ignored"])


def test_the_side_panel_on_a_phone(tab: Tab, server: Server) -> None:
    tab.view(*PHONE)
    ask(tab, "hi")
    assert not tab.is_seen("#side")
    tab.click("#open-side")
    tab.wait("$('#side').checkVisibility()")
    tab.click("#new")
    tab.wait("!$('#side').checkVisibility()")
    assert tab.is_seen("#empty")


def test_the_docs_are_drawn(tab: Tab, server: Server) -> None:
    tab.open(f"http://127.0.0.1:{server.port}/docs")
    tab.wait("$$('.opblock').length > 10")
    assert "/v1/chat/completions" in tab.text(".swagger-ui")
