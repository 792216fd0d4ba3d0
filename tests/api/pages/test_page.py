"""What the page keeps, asks of its user and tells of the server, in a real browser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.api.fakes import MODEL, Server, run_server
from tests.api.pages.browser import MISSING, PROGRAM, Browser, Tab
from tests.api.pages.visit import ANSWER, DESKTOP, DONE, ask, last_prompt, open_page, say

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=MISSING)


def test_conversations_are_kept_in_this_browser(tab: Tab, server: Server) -> None:
    server.play("Hello")
    ask(tab, "the first")
    tab.click("#new")
    tab.wait("$('#empty').checkVisibility()")
    ask(tab, "the second")
    tab.reload()
    tab.wait(DONE.format(1))
    assert tab.text(".bubble") == "the second"
    assert tab.run("$$('.entry').map(e => e.innerText.trim())") == [
        "the second", "the first",
    ]  # fmt: skip
    tab.click(".entry:nth-child(2) [data-part='open']")
    tab.wait("$('.bubble').innerText === 'the first'")
    ask(tab, "more", num_answers=2)
    assert "the first" in last_prompt(server)
    tab.click(".entry:nth-child(1) [data-part='delete']")
    tab.wait("$$('.entry').length === 1")
    assert tab.dialogs == ['Delete "the first"?']
    tab.reload()
    tab.wait("$$('.entry').length === 1")
    assert tab.text("#conversations").strip() == "the second"


def test_what_is_kept_is_bounded(tab: Tab, server: Server) -> None:
    tab.run(
        "(() => { for (let i = 0; i < 120; i += 1) localStorage.setItem(`pyserve:/:chat:c${i}`,"
        " JSON.stringify({id: `c${i}`, title: `old ${i}`, updated: i, messages:"
        " [{role: 'user', content: 'x'.repeat(i > 90 ? 100000 : 10)}]}));"
        " localStorage.setItem('pyserve:/:chat:broken', '{'); })()"
    )
    tab.reload()
    tab.wait("$$('.entry').length === 120")
    ask(tab, "new one")
    assert tab.run("$$('.entry').length") == 100
    assert tab.text(".entry").strip() == "new one"
    # Others of this address have taken what is left: the oldest go, the newest stays whole.
    tab.run(
        "(() => { for (const n of [100000, 1000, 10]) try { for (let i = 0; ; i += 1)"
        " localStorage.setItem(`other${n}-${i}`, 'y'.repeat(n)) } catch { /* it is full */ } })()"
    )
    server.play("Hello world. " * 30)
    ask(tab, "hello", num_answers=2)
    assert 50 < tab.run("$$('.entry').length") < 100
    tab.reload()
    tab.wait(DONE.format(2))
    assert tab.text(".assistant:last-child").count("Hello world.") == 30
    assert not tab.run("$('#hint').classList.contains('unsaved')")


def test_two_tabs_have_the_same_conversations(tab: Tab, browser: Browser, server: Server) -> None:
    ask(tab, "from the first")
    with browser.tab(beside=tab) as other:
        other.view(*DESKTOP)
        open_page(other, server)
        other.click(".entry [data-part='open']")
        ask(other, "from the second", num_answers=2)
        tab.wait(DONE.format(2))
        assert "from the second" in tab.text("#messages")
        tab.call("Page.bringToFront")  # a hidden tab draws nothing
        ask(tab, "and the first again", num_answers=3)
        assert "from the second" in last_prompt(server)
        other.call("Page.bringToFront")
        other.wait(DONE.format(3))
        tab.call("Page.bringToFront")
        tab.click(".entry [data-part='delete']")
        other.wait("$$('.entry').length === 0 && $$('.message').length === 0")


def test_a_browser_that_keeps_nothing(browser: Browser, server: Server) -> None:
    throws = "{ get() { throw new DOMException('denied', 'SecurityError') } }"
    with browser.tab() as tab:
        tab.view(*DESKTOP)
        for name in ("localStorage", "sessionStorage"):
            source = f"Object.defineProperty(window, '{name}', {throws})"
            tab.call("Page.addScriptToEvaluateOnNewDocument", source=source)
        open_page(tab, server)
        ask(tab, "hi")
        tab.click("#new")
        ask(tab, "there")
        assert tab.run("$$('.entry').length") == 2  # as long as the page is open
        assert tab.run("$('#hint').classList.contains('unsaved')")
        assert tab.problems == []


def test_an_answer_that_a_reload_cut_off_is_kept(tab: Tab, server: Server) -> None:
    server.play("Hello world. ", eos=False, delay_s=0.02)
    say(tab, "hi")
    saved = "Object.values(localStorage).some(text => text.includes('Hello world. Hello'))"
    tab.wait(saved)
    tab.reload()
    tab.wait("$('.failure').checkVisibility()")
    assert "Hello world. Hello" in tab.text(".assistant")
    assert "before the answer was whole" in tab.text(".failure")


def test_the_key_is_asked_for(browser: Browser, tokenizer_folder: Path) -> None:
    with (
        run_server(tokenizer_folder, api_keys=("secret",), root_path="/llm") as server,
        browser.tab() as tab,
    ):
        server.play("Hello")
        open_page(tab, server, "/llm/")
        tab.wait("$('#key-form').checkVisibility()")
        assert tab.text("#model") == "pyserve"
        assert "YOUR_KEY" in tab.text("#curl") and "/llm/v1/chat" in tab.text("#curl")
        tab.click("#key")
        tab.type("wrong")
        tab.press("Enter")
        tab.wait("$('#key-error').checkVisibility()")
        assert "missing or wrong" in tab.text("#key-error")
        ask(tab, "hi")
        assert "missing or wrong" in tab.text(".failure")
        tab.run("$('#key').select()")
        tab.type("secret")
        tab.press("Enter")
        tab.wait("!$('#key-form').checkVisibility()")
        assert tab.text("#model") == MODEL
        tab.click("[data-part='retry']")
        tab.wait("$('.assistant .prose:not([data-part=reasoning])').innerText")
        assert "secret" not in tab.run("JSON.stringify(localStorage)")
        tab.reload()
        tab.wait(f"$('#model').innerText === '{MODEL}'")
        assert not tab.is_seen("#key-form")
        assert tab.problems == []


def test_progress_before_ready(browser: Browser, tokenizer_folder: Path) -> None:
    with run_server(tokenizer_folder) as server, browser.tab() as tab:
        startup = server.state.startup
        server.state.status = "starting"
        startup.report("build", 0, 0)
        tab.open(f"http://127.0.0.1:{server.port}/")
        tab.wait("$('#phases [aria-current]')")
        assert "Compile for this machine" in tab.text("#phases [aria-current]")
        assert tab.run("$('#progress').position") == -1  # unknown
        startup.report("load", 25, 100)
        tab.wait("$('#phases [aria-current]').innerText.includes('25 %')")
        assert "Load the weights" in tab.text("#phases [aria-current]")
        assert tab.run("$('#progress').value") == 0.25
        done = tab.run("$$('#phases .done').map(e => e.innerText)")
        assert [text.split()[0] for text in done] == ["Start:", "Compile"]
        assert all(text.endswith(" s") for text in done)
        assert tab.run("document.title") == "pyserve: load"
        assert tab.run("$('#send').disabled")
        tab.run("$('#text').focus()")
        tab.type("early")
        tab.press("Enter")  # kept until it can be sent
        server.state.status = "ready"
        tab.wait("!$('#send').disabled")
        assert not tab.is_seen("#starting")
        assert tab.text("#model") == MODEL
        server.play("Hello")
        tab.click("#send")
        tab.wait(DONE.format(1))
        assert tab.text(".bubble") == "early"
        assert tab.problems == []


def test_settings_are_sent_and_kept(tab: Tab, server: Server) -> None:
    ask(tab, "hi")
    assert server.engine.submitted[0].params.temperature == 1.0
    assert "system" not in last_prompt(server)
    tab.click("#open-settings")
    for name, value in (
        ("system", "You are terse."), ("temperature", "0.5"), ("top_k", "7"), ("seed", "3"),
        ("stop", "one\ntwo"), ("extra", '{"min_tokens": 2}'), ("theme", "dark"),
    ):  # fmt: skip
        tab.run(f"$('#settings [name={name}]').value = {json.dumps(value)}")
    tab.run("$('#settings [name=tools]').focus()")
    tab.type("[nonsense")
    tab.click("#settings button[value=save]")
    assert tab.run("$('#settings').open")  # it tells what is wrong
    tab.run("(e => { e.value = ''; e.dispatchEvent(new Event('input', {bubbles: true})) })"
            "($('#settings [name=tools]'))")  # fmt: skip
    tab.click("#settings button[value=save]")
    tab.wait("!$('#settings').open")
    assert tab.run("getComputedStyle(document.body).colorScheme") == "dark"
    assert tab.run("$('#open-settings').classList.contains('set')")
    for number in (2, 3):
        ask(tab, "hi", num_answers=number)
        params = server.engine.submitted[-1].params
        assert (params.temperature, params.top_k, params.seed) == (0.5, 7, 3)
        assert params.min_tokens == 2
        assert "<|im_start|>system\nYou are terse.<|im_end|>" in last_prompt(server)
        tab.reload()
        tab.wait(DONE.format(number))


def test_the_load_is_plotted(tab: Tab, server: Server) -> None:
    server.play("Hello world. ", eos=False, delay_s=0.01)
    say(tab, "hi")
    running = "$('[data-series=running] output').textContent"
    tab.wait(f"{running} === '1'")
    assert tab.text("[data-series=kv] output") == "25 %"  # 16 of 64 blocks
    assert tab.run("$('[data-series=kv] polyline').points.length") >= 1
    tab.press("Escape")
    tab.wait(f"{running} === '0'")


def test_of_several_choices_the_first_is_shown(tab: Tab, server: Server) -> None:
    kept = json.dumps({"extra": '{"n": 2}'})
    tab.run(f"localStorage.setItem('pyserve:/:settings', {json.dumps(kept)})")
    tab.reload()
    server.play("The quick brown fox")
    ask(tab, "hi")
    assert len(server.engine.submitted) == 2
    assert tab.text(ANSWER).strip() == "The quick brown fox"
