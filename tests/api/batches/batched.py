"""`run-batch` around the scripted engine.

Arguments: folder of the tokenizer, input, output, seconds a token.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from pyserve import log
from pyserve.api.run_batch import run_batch
from pyserve.api.serve import Loaded, Report
from pyserve.client import SequenceRequest, SequenceStream
from pyserve.config import BatchConfig, ServerConfig
from pyserve.errors import ConfigError
from pyserve.text.chat_template import ChatTemplate
from pyserve.text.tokenizer import GenerationDefaults, Tokenizer
from tests.api.fakes import FakeEngine, Script

FATAL_TOKEN = 81


class Engine(FakeEngine):
    """Gives up after a prompt that begins with FATAL_TOKEN."""

    def submit(self, request: SequenceRequest) -> SequenceStream:
        stream = super().submit(request)
        if request.prompt_token_ids[0] == FATAL_TOKEN:
            asyncio.get_running_loop().call_soon(self.give_up, "the engine has stopped: boom")
        return stream


def load(report: Report) -> Loaded:
    report("load", 1, 4)
    tokenizer = Tokenizer.from_folder(Path(sys.argv[1]))
    return Loaded(
        tokenizer=tokenizer,
        chat_template=ChatTemplate.load(tokenizer),
        defaults=GenerationDefaults(),
        engine=Engine(lambda number: Script([80], float(sys.argv[4]))),
    )


def main() -> int:
    log.setup("info")
    batch = BatchConfig(input_file=Path(sys.argv[2]), output_file=Path(sys.argv[3]))
    try:
        return run_batch(batch, ServerConfig(served_model_names=("tiny",)), load)
    except ConfigError as error:
        log.get_logger().error("%s", error)
        return 2
