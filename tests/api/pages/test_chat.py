"""A chat on the page, in a real browser: keys, stop, edit, another try; thinking and tools."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pyserve.errors import EngineError
from tests.api.fakes import Script, Server, run_server
from tests.api.pages.browser import MISSING, PROGRAM, Browser, Tab
from tests.api.pages.visit import ANSWER, DONE, ask, last_prompt, open_page, say
from tests.api.tool_talk import CALL, OF_TOOLS, TOOLS, with_template
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=MISSING)


def test_enter_sends_shift_enter_does_not_and_escape_stops(tab: Tab, server: Server) -> None:
    server.play("Hello world. ", eos=False, delay_s=0.01)
    tab.run("$('#text').focus()")
    tab.press("Enter")  # nothing to send
    tab.type("one")
    tab.press("Enter", has_shift=True)
    tab.type("two")
    assert tab.run("$('#text').value") == "one\ntwo"
    assert not server.engine.submitted
    tab.press("Enter")
    tab.wait("$('.pending > .prose').innerText.includes('Hello world.')")
    assert tab.text(".bubble") == "one\ntwo"
    assert tab.run("$('#text').value") == ""
    tab.press("Escape")
    tab.wait(DONE.format(1))
    wait_until(lambda: server.engine.submitted[0].is_aborted)
    assert "Hello world." in tab.text(".assistant") and "Stopped." in tab.text(".assistant")
    server.play("Second", delay_s=0.01)
    say(tab, "three")
    tab.wait("!$('#stop').hidden")
    tab.wait(DONE.format(2))
    assert "one\ntwo" in last_prompt(server) and "Hello world." in last_prompt(server)


def test_the_button_stops_too(tab: Tab, server: Server) -> None:
    server.play("Hello world. ", eos=False, delay_s=0.01)
    say(tab, "hi")
    tab.click("#stop")
    tab.wait(f"{DONE.format(1)} && !$('#send').hidden")
    wait_until(lambda: server.engine.submitted[0].is_aborted)


def test_an_answer_that_comes_at_once_with_code_can_be_copied(tab: Tab, server: Server) -> None:
    """The button of its code is not taken for its own."""
    server.play("Look:\n\n```python\nx = 1\n```\n", burst=100)
    ask(tab, "hi")
    assert tab.run("$$('.assistant [data-part=copy]').map((one) => one.hidden)") == [False, False]


def test_edit_and_answer_again(tab: Tab, server: Server) -> None:
    server.play("First")
    ask(tab, "hello")
    server.play("Second")
    ask(tab, "world", num_answers=2)
    server.play("Third")
    tab.click(".assistant:last-child [data-part='again']")
    tab.wait(f"{DONE.format(2)} && document.body.innerText.includes('Third')")
    assert "Second" not in tab.text("#messages") and "Second" not in last_prompt(server)
    server.play("Fourth")
    tab.click(".user [data-part='edit']")
    tab.wait("document.activeElement.closest('.editor')")
    tab.press("Escape")  # changes nothing
    assert tab.text(".bubble") == "hello"
    tab.click(".user [data-part='edit']")
    tab.type("changed ")
    tab.press("Enter")
    tab.wait(f"{DONE.format(1)} && document.body.innerText.includes('Fourth')")
    assert tab.run("$$('.message').length") == 2
    prompt = last_prompt(server)
    assert "changed" in prompt and "world" not in prompt and "First" not in prompt


def test_what_an_edit_took_away_comes_back(tab: Tab, server: Server) -> None:
    server.play("First")
    ask(tab, "hello")
    server.play("Second")
    ask(tab, "world", num_answers=2)
    assert not tab.is_seen("#earlier")
    server.play("Third")
    tab.click(".user [data-part='edit']")
    tab.type("other ")
    tab.press("Enter")
    tab.wait(f"{DONE.format(1)} && document.body.innerText.includes('Third')")
    tab.reload()
    tab.wait(DONE.format(1))
    tab.click("#earlier button")
    tab.wait(DONE.format(2))
    assert "First" in tab.text("#messages") and "Second" in tab.text("#messages")
    tab.click("#earlier button")  # and forth
    tab.wait(DONE.format(1))
    assert "Third" in tab.text("#messages")
    ask(tab, "more", num_answers=2)
    assert not tab.is_seen("#earlier")


def test_an_answer_that_was_cut_off_goes_on(tab: Tab, server: Server) -> None:
    server.play("Hello world. ", eos=False)
    tab.run("localStorage.setItem('pyserve:/:settings', '{\"max_tokens\": \"5\"}')")
    tab.reload()
    ask(tab, "hi")
    assert "Cut off" in tab.text(".note")
    begun = tab.text(ANSWER)
    server.play(" The end")
    tab.click("[data-part=goOn]")
    tab.wait(f"{DONE.format(1)} && $('.assistant').innerText.includes('The end')")
    assert tab.text(ANSWER).startswith(begun.rstrip())
    prompt = last_prompt(server)
    assert prompt.rstrip().endswith(begun.rstrip()) and prompt.count("assistant") == 1


def test_what_is_selected_survives_the_next_answer(tab: Tab, server: Server) -> None:
    server.play("The quick brown fox")
    ask(tab, "hi")
    server.play("Second", delay_s=0.2)
    say(tab, "more")
    tab.run(f"getSelection().selectAllChildren($('{ANSWER}'))")
    tab.wait(DONE.format(2))
    assert tab.run("getSelection().toString().trim()") == "The quick brown fox"


def test_a_failed_message_is_kept_for_another_try(tab: Tab, server: Server) -> None:
    server.engine.room = 0
    ask(tab, "precious words")
    assert "the queue is full" in tab.text(".failure") and "7 s" in tab.text(".failure")
    tab.reload()
    tab.wait(DONE.format(1))
    assert tab.text(".bubble") == "precious words" and "queue is full" in tab.text(".failure")
    server.engine.room = None
    tokens = server.tokenizer.encode("Half of it", add_special_tokens=False)
    server.engine.submitted.clear()
    server.engine.script = lambda number: Script(tokens, error=EngineError("the step failed"))
    tab.click("[data-part='retry']")
    tab.wait("document.body.innerText.includes('the step failed')")
    assert "Half of it" in tab.text(".assistant")
    server.play("All of it")
    tab.click("[data-part='retry']")
    tab.wait("document.body.innerText.includes('All of it')")
    assert tab.text("#messages").count("precious words") == 1
    assert not tab.run("$$('.failure').some(e => e.checkVisibility())")


def test_a_server_that_has_gone(browser: Browser, tokenizer_folder: Path) -> None:
    with browser.tab() as tab:
        with run_server(tokenizer_folder) as server:
            server.play("Hello")
            open_page(tab, server)
            ask(tab, "hi")
        tab.run("$('#text').focus()")
        tab.type("are you there")
        tab.press("Enter")
        tab.wait("document.body.innerText.includes('no answer from the server')")
        kept = "$('#text').value + document.body.innerText"
        assert "are you there" in tab.run(kept)
        tab.wait("$('#status').className === 'bad'")
        assert tab.text("#trouble") == "The server does not answer."


STUB = """
window.sent = [];
const fetched = window.fetch;
window.fetch = async (path, options) => {
  if (path !== "v1/chat/completions") return fetched(path, options);
  sent.push(JSON.parse(options.body));
  const frames = FRAMES.map((delta, i) => ({ choices: [{ index: 0, delta,
    finish_reason: i === FRAMES.length - 1 ? "tool_calls" : null }] }));
  const lines = [...frames.map((frame) => JSON.stringify(frame)), "[DONE]"];
  return new Response(lines.map((line) => `data: ${line}\\n\\n`).join(""));
};
0
"""


def call(index: int, arguments: str, name: str | None = None) -> dict[str, object]:
    """A delta with a piece of a tool call."""
    piece: dict[str, object] = {"index": index, "function": {"arguments": arguments}}
    if name is not None:
        piece |= {"id": f"call_{index}", "function": {"name": name, "arguments": arguments}}
    return {"tool_calls": [piece]}


def test_thinking_is_folded_and_tool_calls_are_shown(tab: Tab) -> None:
    frames = [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "Which ", "reasoning": "Which "}, {"reasoning": "city?"},
        {"content": "Let me look."}, call(0, '{"city": ', "weather"), call(0, '"Paris"}'),
        call(1, "{}", "time"), {},
    ]  # fmt: skip
    tab.run(STUB.replace("FRAMES", json.dumps(frames)))
    ask(tab, "Weather in Paris?")
    assert not tab.is_seen("[data-part=reasoning]")
    assert tab.text("summary").startswith("Thought for")
    tab.click("summary")
    tab.wait("$('[data-part=reasoning]').checkVisibility()")
    assert tab.text("[data-part=reasoning]").strip() == "Which city?"
    assert tab.text(".tool-call b") == "weather"
    assert json.loads(tab.text(".tool-call pre")) == {"city": "Paris"}
    tab.run("$$('.tool-results textarea').forEach((e, i) => e.value = `r${i}`)")
    tab.click(".tool-results button")
    tab.wait(DONE.format(2))
    sent = tab.run("sent.at(-1).messages")
    assert [message["role"] for message in sent] == ["user", "assistant", "tool", "tool"]
    assert sent[1]["content"] == "Let me look."
    assert [item["function"] for item in sent[1]["tool_calls"]] == [
        {"name": "weather", "arguments": '{"city": "Paris"}'}, {"name": "time", "arguments": "{}"},
    ]  # fmt: skip
    assert sent[2:] == [
        {"role": "tool", "tool_call_id": f"call_{i}", "content": f"r{i}"} for i in range(2)
    ]
    tab.reload()
    tab.wait(DONE.format(2))
    assert tab.text(".tool-call b") == "weather"


def test_tools_and_thinking_of_the_server(browser: Browser, tmp_path: Path) -> None:
    parsers: dict[str, Any] = {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"}
    folder = with_template(tmp_path / "tiny", OF_TOOLS)
    with (
        run_server(folder, enable_auto_tool_choice=True, **parsers) as server,
        browser.tab() as tab,
    ):
        server.engine.info = replace(server.engine.info, max_model_len=2048)
        server.play(f"<think>\nWhich city?\n</think>\n\nLet me look.\n{CALL}", delay_s=0.002)
        kept = json.dumps({"tools": json.dumps(TOOLS)})
        open_page(tab, server)
        tab.run(f"localStorage.setItem('pyserve:/:settings', {json.dumps(kept)})")
        tab.reload()
        ask(tab, "Weather in Paris?")
        assert '"name": "get_weather"' in last_prompt(server)
        tab.click("summary")
        tab.wait("$('[data-part=reasoning]').checkVisibility()")
        assert tab.text("[data-part=reasoning]").strip() == "Which city?"
        assert tab.text(ANSWER).strip() == "Let me look."
        assert tab.text(".tool-call b") == "get_weather"
        assert json.loads(tab.text(".tool-call pre")) == {"city": "Paris", "days": 2}
        server.play("<think>\n\n</think>\n\nIt is sunny.")
        tab.run("$('.tool-results textarea').value = 'sunny, 21'")
        tab.click(".tool-results button")
        tab.wait(f"{DONE.format(2)} && document.body.innerText.includes('It is sunny.')")
        assert "sunny, 21" in last_prompt(server) and "Which city?" not in last_prompt(server)
        assert tab.problems == []


def test_thinking_without_a_parser_is_folded_too(tab: Tab, server: Server) -> None:
    server.play("<think>\nHm, well.\n</think>\n\nFour")
    ask(tab, "two and two")
    assert tab.text(".assistant > .prose") == "Four"
    assert not tab.is_seen("[data-part=reasoning]")
    assert tab.run("$('[data-part=reasoning]').textContent").strip() == "Hm, well."


def test_thoughts_alone_are_not_folded(tab: Tab, server: Server) -> None:
    server.play("<think>\nHm, well, let me see.")
    ask(tab, "two and two")
    assert tab.text("[data-part=reasoning]").strip() == "Hm, well, let me see."
