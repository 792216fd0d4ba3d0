"""`pyserve chat` and `pyserve complete`: talk to a running server from the terminal."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import time
from typing import Any

from pyserve import INTERRUPTED, flags, log
from pyserve.errors import StartupError
from pyserve.flag_words import plain_words
from pyserve.http_client import Choice, Connection, Endpoint, Reply
from pyserve.remote.server import (
    CONNECT_TIMEOUT_S,
    ServerError,
    add_server_flags,
    endpoint_of,
    served_models,
)

with contextlib.suppress(ImportError):
    import readline  # noqa: F401  # input() edits lines by it

PROMPT = "> "


def main(command: str, argv: list[str]) -> int:
    """Run `command`, "chat" or "complete"; returns the exit code.

    0: the input has ended, or --quick was answered; 1: no server answers, or with --quick it
    answered with an error; 2: a wrong flag; 130: Ctrl-C while no answer is being written.
    """
    try:
        parser = _parser(command)
        args = flags.parse(parser, plain_words(parser, argv))
        endpoint = endpoint_of(args.url, args.api_key)
        model = args.model_name or served_models(args.url, endpoint)[0]
    except StartupError as error:
        log.get_logger().error("%s", error)
        return 2
    except ServerError as error:
        log.get_logger().error("%s", error)
        return 1
    print(f"Using model: {model}", file=sys.stderr)
    talk = _Chat(args, endpoint, model) if command == "chat" else _Complete(args, endpoint, model)
    try:
        if args.quick is not None:
            return 0 if talk.say(args.quick) else 1
        while True:
            text = input(PROMPT)
            if text.strip():
                talk.say(text)
    except EOFError:
        print()
        return 0
    except KeyboardInterrupt:
        print()
        return INTERRUPTED


class _Talk:
    """A conversation with the server; answers are written to the terminal as they arrive."""

    path = ""

    def __init__(self, args: argparse.Namespace, endpoint: Endpoint, model: str) -> None:
        self._args = args
        self._endpoint = endpoint
        self._model = model
        self._is_thinking = False

    def say(self, text: str) -> bool:
        """Send `text` and write the answer; returns False, after a line on stderr, for an error."""
        try:
            reply = self._ask(self.body(text))
        except UnicodeEncodeError:  # invalid bytes of the terminal or a flag became surrogates
            print("error: the text is not valid UTF-8", file=sys.stderr)
            return False
        print(flush=True)
        answer = reply.texts.get(0, "")
        self.heard(text, answer)
        if reply.error is not None and reply.error != "aborted":
            print(f"error: {reply.error}", file=sys.stderr)
            return False
        if self._args.stats and reply.chunk_times:
            _print_stats(reply)
        return True

    def body(self, text: str) -> dict[str, Any]:
        """The fields of the request that hold `text`."""
        raise NotImplementedError

    def heard(self, text: str, answer: str) -> None:
        """Called with the answer to `text`, or with as much of it as arrived."""

    def _ask(self, body: dict[str, Any]) -> Reply:
        """Send a request and write the answer as it arrives; Ctrl-C ends only the answer."""
        body |= {
            "model": self._model, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        if self._args.max_tokens is not None:
            body["max_tokens"] = self._args.max_tokens
        before = signal.getsignal(signal.SIGINT)
        try:
            return asyncio.run(self._exchange(body))
        finally:
            signal.signal(signal.SIGINT, before)

    async def _exchange(self, body: dict[str, Any]) -> Reply:
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, _canceller())
        request = self._endpoint.encode("POST", self.path, body)
        started_s = time.perf_counter()
        reply = Reply(started_s)
        try:
            connection = await asyncio.wait_for(
                Connection.open(self._endpoint, has_text=True, on_choices=self._show),
                CONNECT_TIMEOUT_S,
            )
        except (OSError, asyncio.TimeoutError) as error:
            reply.error = f"no server answers: {error or 'it does not connect'}"
            return reply
        except asyncio.CancelledError:
            reply.error = "aborted"
            return reply
        exchange = asyncio.ensure_future(
            connection.exchange(request, started_s=started_s, timeout_s=None)
        )
        await asyncio.sleep(0)
        reply = connection.reply or reply
        try:
            reply = await exchange
        except asyncio.CancelledError:
            reply.error = "aborted"
        finally:
            connection.close()
            self._mark_thinking(is_thinking=False)
        return reply

    def _show(self, choices: list[Choice]) -> None:
        for choice in choices[:1]:
            delta = choice.delta
            text = choice.text if delta is None else delta.content
            thinking = None if delta is None else delta.reasoning or delta.reasoning_content
            if thinking:
                self._mark_thinking(is_thinking=True)
                sys.stdout.write(_printable(thinking))
            if text:
                self._mark_thinking(is_thinking=False)
                sys.stdout.write(_printable(text))
        sys.stdout.flush()

    def _mark_thinking(self, *, is_thinking: bool) -> None:
        if is_thinking != self._is_thinking:
            self._is_thinking = is_thinking
            sys.stdout.write("<think>\n" if is_thinking else "\n</think>\n\n")


class _Chat(_Talk):
    path = "/v1/chat/completions"

    def __init__(self, args: argparse.Namespace, endpoint: Endpoint, model: str) -> None:
        super().__init__(args, endpoint, model)
        self._messages: list[dict[str, str]] = []
        if args.system_prompt is not None:
            self._messages.append({"role": "system", "content": args.system_prompt})

    def body(self, text: str) -> dict[str, Any]:
        return {"messages": [*self._messages, {"role": "user", "content": text}]}

    def heard(self, text: str, answer: str) -> None:
        if answer:  # an unanswered text is dropped, as most templates want alternating turns
            self._messages.append({"role": "user", "content": text})
            self._messages.append({"role": "assistant", "content": answer})


class _Complete(_Talk):
    path = "/v1/completions"

    def body(self, text: str) -> dict[str, Any]:
        return {"prompt": text}


def _canceller() -> Any:
    task = asyncio.current_task()
    assert task is not None
    return task.cancel


def _printable(text: str) -> str:
    """Escape control characters, so that the model's text cannot control the terminal."""
    return log.printable(text)


def _print_stats(reply: Reply) -> None:
    ttft_s = reply.chunk_times[0] - reply.started_s
    print(f"TTFT: {1e3 * ttft_s:.1f} ms", file=sys.stderr)
    seconds = reply.chunk_times[-1] - reply.chunk_times[0]
    if seconds > 0:
        print(f"TPS: {(reply.num_output_tokens - 1) / seconds:.1f} tokens/s", file=sys.stderr)


def _parser(command: str) -> flags.Parser:
    what, name = ("a message", "MESSAGE") if command == "chat" else ("a prompt", "PROMPT")
    parser = flags.Parser(
        prog=f"python -m pyserve {command}",
        description=f"Ask a running server: {what} a line, until the end of the input (Ctrl-D). "
        "Ctrl-C ends an answer.",
        allow_abbrev=False,
    )
    add_server_flags(parser)
    if command == "chat":
        parser.add_argument("--system-prompt", metavar="TEXT", help="what the model is told first")
    parser.add_argument("-q", "--quick", metavar=name, help="ask this alone, and end")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of an answer at most")
    parser.add_argument("--stats", action="store_true", help="TTFT and tokens/s of each answer")
    return parser
