"""A headless Chromium, driven over its DevTools pipe: no port, no driver, no package.

Commands go as JSON ended by a NUL byte to its file descriptor 3; answers and events come from 4.
"""

from __future__ import annotations

import base64
import json
import os
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
MISSING = "no Chromium here (Debian: apt-get install chromium)"
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-extensions", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
TIMEOUT_S = 40.0  # on a busy machine
KEYS = {"Enter": ("Enter", 13, "\r"), "Escape": ("Escape", 27, ""), "Tab": ("Tab", 9, "")}


class BrowserError(Exception):
    """Chromium refused a command, a script raised, or something did not come in time."""


class Tab:
    """One page. Events are gathered whenever something is asked of it.

    requested   URLs of all requests
    problems    uncaught exceptions, and what the page's policy kept from loading or running
    dialogs     texts of alert() and confirm(); each is answered with yes
    """

    def __init__(self, browser: Browser, session: str, context: str) -> None:
        self.session = session
        self.context = context
        self._browser = browser
        self.requested: list[str] = []
        self.problems: list[str] = []
        self.dialogs: list[str] = []

    def watch(self) -> None:
        """Have Chromium tell of events."""
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """The result of a DevTools command."""
        return self._browser.call(method, params, self)

    def view(self, width: int, height: int, *, is_dark: bool = False) -> None:
        """The size in CSS pixels, and the colours that the system prefers."""
        is_phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=is_phone)  # fmt: skip
        self.call("Emulation.setTouchEmulationEnabled", enabled=is_phone)
        colours = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[colours])

    def open(self, url: str) -> None:
        """Load `url`; a mere change of what follows # does not."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def reload(self) -> None:
        self.run("window.isOld = true")
        self.call("Page.reload")
        self.wait("!window.isOld && document.readyState === 'complete'")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited where it is a promise.

        $ and $$ are querySelector and querySelectorAll, as in the console.
        """
        reply = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True,
            userGesture=True, includeCommandLineAPI=True,
        )  # fmt: skip
        if "exceptionDetails" in reply:
            raise BrowserError(f"{expression}: {reply['exceptionDetails']}")
        return reply["result"].get("value")

    def wait(self, condition: str, timeout_s: float = TIMEOUT_S) -> None:
        """Until a JavaScript expression is true."""
        deadline = time.monotonic() + timeout_s
        while not self._is_true(condition):
            if time.monotonic() > deadline:
                raise BrowserError(f"not in time: {condition}; problems: {self.problems}")
            time.sleep(0.03)

    def text(self, selector: str) -> str:
        """The visible text of the first element that matches."""
        found: str = self.run(f"$({json.dumps(selector)}).innerText")
        return found

    def is_seen(self, selector: str) -> bool:
        """Whether the first element that matches is shown."""
        found: bool = self.run(f"$({json.dumps(selector)}).checkVisibility()")
        return found

    def click(self, selector: str) -> None:
        """A click in the middle of the first visible element that matches, by the mouse."""
        find = f"$$({json.dumps(selector)}).find(e => e.checkVisibility())"
        self.wait(find)
        x, y = self.run(
            f"(e => {{ e.scrollIntoView({{block: 'nearest'}}); const r = e.getBoundingClientRect();"
            f" return [r.x + r.width / 2, r.y + r.height / 2]; }})({find})"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Text into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, has_shift: bool = False) -> None:
        """A key of KEYS."""
        name, code, text = KEYS[key]
        event = {"key": name, "code": name, "windowsVirtualKeyCode": code}
        event["modifiers"] = 8 if has_shift else 0
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def picture(self, path: Path) -> None:
        """What is seen, as a PNG file."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def take(self, event: dict[str, Any]) -> None:
        """Account for an event."""
        method, params = event["method"], event["params"]
        if method == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(details.get("exception", details).get("description", str(details)))
        elif method == "Log.entryAdded" and params["entry"]["source"] != "network":
            self.problems.append(params["entry"]["text"])
        elif method == "Page.javascriptDialogOpening":
            self.dialogs.append(params["message"])
            self._browser.send("Page.handleJavaScriptDialog", {"accept": True}, self.session)

    def _is_true(self, condition: str) -> bool:
        try:
            return self.run(f"Boolean({condition})") is True
        except BrowserError as error:
            # Between two pages, or the element is not there yet.
            if re.search("context|navigated|TypeError", str(error)):
                return False
            raise


class Browser:
    """A process of Chromium with a profile of its own."""

    def __init__(self, profile: Path) -> None:
        assert PROGRAM is not None, MISSING
        from_us, self._to = os.pipe()
        self._from, to_us = os.pipe()
        command = f'exec "$0" "$@" 3<&{from_us} 4>&{to_us}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, PROGRAM, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(from_us, to_us), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.close(from_us)
        os.close(to_us)
        self._buffer = b""
        self._number = 0
        self._tabs: dict[str, Tab] = {}

    @contextmanager
    def tab(self, beside: Tab | None = None) -> Iterator[Tab]:
        """A page that finds nothing kept of others, but for what is kept of the one `beside`."""
        context = beside.context if beside else self._make_context()
        blank = {"url": "about:blank", "browserContextId": context}
        target = self.call("Target.createTarget", blank)["targetId"]
        attach = {"targetId": target, "flatten": True}
        session = self.call("Target.attachToTarget", attach)["sessionId"]
        tab = self._tabs[session] = Tab(self, session, context)
        try:
            tab.watch()
            yield tab
        finally:
            del self._tabs[session]
            if beside:
                self.call("Target.closeTarget", {"targetId": target})
            else:
                self.call("Target.disposeBrowserContext", {"browserContextId": context})

    def _make_context(self) -> str:
        context: str = self.call("Target.createBrowserContext", {})["browserContextId"]
        return context

    def send(self, method: str, params: dict[str, Any], session: str | None = None) -> int:
        """Send a command without waiting for its answer; its number."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        return self._number

    def call(self, method: str, params: dict[str, Any], tab: Tab | None = None) -> Any:
        """The result of a command; the events that come before it go to their tabs."""
        number = self.send(method, params, tab.session if tab else None)
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            message = self._receive(deadline, method)
            if message.get("id") == number:
                if "error" in message:
                    raise BrowserError(f"{method}: {message['error']['message']}")
                return message["result"]
            to = self._tabs.get(message.get("sessionId", ""))
            if to is not None and "method" in message:
                to.take(message)

    def close(self) -> None:
        """End it and all its processes."""
        os.close(self._to)
        os.close(self._from)
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it has ended as its pipe did
        self._process.wait(TIMEOUT_S)

    def _receive(self, deadline: float, wanted: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            readable, _, _ = select.select(
                [self._from], [], [], max(deadline - time.monotonic(), 0)
            )
            if not readable:
                raise BrowserError(f"no answer to {wanted} in {TIMEOUT_S:.0f} s")
            data = os.read(self._from, 2**20)
            if not data:
                raise BrowserError(f"Chromium has ended before it answered {wanted}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message
