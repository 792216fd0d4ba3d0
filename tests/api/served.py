"""A server process around the scripted engine, for tests of start, signals and exit codes.

Arguments: port, folder of the tokenizer, what `load` does, seconds to drain.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from pyserve import log
from pyserve.api.serve import Loaded, Report, run_server
from pyserve.config import ServerConfig
from pyserve.errors import PlanError
from pyserve.text.chat_template import ChatTemplate
from pyserve.text.tokenizer import GenerationDefaults, Tokenizer
from tests.api.fakes import FakeEngine, Script


def load(report: Report) -> Loaded:
    how = sys.argv[3]
    report("build", 0, 0)
    report("load", 1, 4)
    if how == "hang":
        time.sleep(60)
    if how == "slow":
        time.sleep(0.5)
    if how == "too big":
        raise PlanError("the model needs 9 GiB, 4 GiB are free")
    if how == "bug":
        raise RuntimeError("boom")
    if how == "exit":
        sys.exit(3)
    tokenizer = Tokenizer.from_folder(Path(sys.argv[2]))
    return Loaded(
        tokenizer=tokenizer,
        chat_template=ChatTemplate.load(tokenizer),
        defaults=GenerationDefaults(),
        engine=FakeEngine(lambda number: Script([80], 0.01)),
    )


if __name__ == "__main__":
    log.setup("info")
    settings = ServerConfig(
        served_model_names=("tiny",),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        shutdown_timeout_s=float(sys.argv[4]),
    )
    sys.exit(run_server(settings, load))
