"""A server process around the scripted engine, for tests of start, signals and exit codes.

Arguments: port, folder of the tokenizer, what happens, drain seconds, maybe a folder for batches.
What takes until the folder has a file go-<port>: held, a load; open, each answer.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
from pathlib import Path

from pyserve import log
from pyserve.api.serve import Loaded, Report, run_server
from pyserve.client import SequenceRequest, SequenceStream
from pyserve.config import ServerConfig
from pyserve.errors import BuildError, PlanError
from pyserve.text.chat_template import ChatTemplate
from pyserve.text.tokenizer import GenerationDefaults, Tokenizer
from tests.api.fakes import FakeEngine, Script

FATAL_TOKEN = 81


class Engine(FakeEngine):
    """Gives up soon after a prompt that begins with FATAL_TOKEN; "stuck": and never stops."""

    def start(self) -> None:
        super().start()
        is_watched = any(item is self for item in gc.get_objects())
        print(f"the collector looks at the engine: {is_watched}", flush=True)

    def submit(self, request: SequenceRequest) -> SequenceStream:
        stream = super().submit(request)
        if request.prompt_token_ids[0] == FATAL_TOKEN:
            asyncio.get_running_loop().call_later(0.1, self.give_up, "the engine has stopped: boom")
        return stream

    async def stop(self) -> None:
        if sys.argv[3] == "bad end":
            raise RuntimeError("boom")
        if sys.argv[3] == "stuck":
            threading.Thread(target=time.sleep, args=[600]).start()  # as a step that hangs
            await asyncio.sleep(600)
        await super().stop()


def is_let_go() -> bool:
    return Path(sys.argv[2], f"go-{sys.argv[1]}").exists()


def load(report: Report) -> Loaded:
    how = sys.argv[3]
    report("build", 0, 0)
    report("load", 1, 4)
    if how == "hang":
        time.sleep(600)
    if how in ("held", "fail at go"):
        while not is_let_go():
            time.sleep(0.01)
        if how == "fail at go":
            raise BuildError("compiling the native ops failed")
    if how == "too big":
        raise PlanError("the model needs 9 GiB, 4 GiB are free")
    if how == "bug":
        raise RuntimeError("boom")
    if how == "exit":
        sys.exit(3)
    script = Script([80], 0.01, may_end=is_let_go if how == "open" else lambda: True)
    tokenizer = Tokenizer.from_folder(Path(sys.argv[2]))
    return Loaded(
        tokenizer=tokenizer,
        chat_template=ChatTemplate.load(tokenizer),
        defaults=GenerationDefaults(),
        engine=Engine(lambda number: script),
    )


def main() -> int:
    log.setup("info")
    settings = ServerConfig(
        served_model_names=("tiny",),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        shutdown_timeout_s=float(sys.argv[4]),
        batch_dir=Path(sys.argv[5]) if len(sys.argv) > 5 else None,
    )
    return run_server(settings, load)


if __name__ == "__main__":
    sys.exit(main())
