"""The command line: parses the flags into config objects, loads the model and starts the server.

`python -m pyserve --model X`, `pyserve serve X` and `pyserve X` are the same. `pyserve plan` only
computes what fits, `run-batch` answers a file, and `chat`, `complete` and `bench` talk to a running
server. This module imports inside functions so that wrong flags are refused and the first line is
logged before the server's code is imported, and the port is open before torch is imported.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pyserve import __version__, allocator, collector, log
from pyserve.config import (
    DEMO_MODEL,
    UNNAMED,
    BatchConfig,
    EngineConfig,
    LaunchConfig,
    Launched,
    ServerConfig,
    env,
    launched,
    named_keys,
)
from pyserve.errors import CheckpointError, ConfigError, StartupError
from pyserve.flag_rows import settings
from pyserve.flags import ENGINE, LAUNCH, SERVER, given, parse_args, split_batch

if TYPE_CHECKING:
    from pyserve.api.serve import Loaded, Report
    from pyserve.engine.preload import Preload
    from pyserve.engine.tensor_parallel.spawned import Spawned
    from pyserve.text.tokenizer import Tokenizer

DEMO_MODEL_NAME = "pyserve-demo"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SWITCH_INTERVAL_S = 1e-4  # measured: see "The interpreter's lock" in bench/notes.md


def main(argv: list[str] | None = None) -> int:
    """Run the server until it is told to stop; returns the process's exit code."""
    log.setup("info")
    argv = sys.argv[1:] if argv is None else argv
    batch: BatchConfig | None = None
    try:
        if len(argv) == 2 and "help" in argv:
            argv = [*(word for word in argv if word != "help"), "--help"]
        if argv[:1] == ["plan"]:
            from pyserve.plan.command import main as plan

            return plan(argv[1:])
        if argv[:1] in (["chat"], ["complete"]):
            from pyserve.remote.talk import main as talk

            return talk(argv[0], argv[1:])
        if argv == ["collect-env"]:
            from pyserve.environment import describe_machine

            print("\n".join(f"{name}: {value}" for name, value in describe_machine()))
            return 0
        if argv[:1] == ["bench"]:
            from pyserve.remote.bench import main as bench

            return bench(argv[1:])
        if argv[:1] == ["run-batch"]:
            batch, argv = split_batch(argv[1:])
        args = parse_args(_with_file(argv))
        launch = _launch_config(args)
        log.setup(launch.log_level)
        os.environ.update(launch.env)
        server_config = _server_config(args)
        engine_config = _engine_config(args, DEMO_MODEL)  # refuses bad values before the port opens
        _check_paths(args)
        _check_adapters(engine_config, server_config)
        here = launched()
        if here is not None and here.tp_rank > 0:
            log.setup(launch.log_level, prefix=f"rank {here.tp_rank}: ")
            _prepare_threads()
            return _follow(args)
        _check_leaders_paths(launch, server_config)
        name = server_config.served_model_names[0]
        log.get_logger().info("pyserve %s is starting (model %s)", __version__, name)
        if batch is None or batch.enable_metrics:
            _warn_of_exposure(server_config)
            _tell_of_names(server_config)
        if launch.model is None:
            log.get_logger().info("no --model: this is the bundled demo model")
        _prepare_threads()
        allocator.fix_thresholds()
        with collector.imports():
            from pyserve.api.serve import run_server
        _check_text(launch, server_config)
        load = _loader(args)
        if batch is not None:
            from pyserve.api.run_batch import run_batch

            return run_batch(batch, server_config, load)
    except StartupError as error:
        log.get_logger().error("%s", error)
        return 2
    return run_server(server_config, load)


def _prepare_threads() -> None:
    """Configure the threads of libraries, and how the interpreter switches between threads.

    The libraries read these variables when they are loaded.
    """
    # Spinning threads of libgomp would take the event loop's core.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Otherwise tokenizers would use a thread pool of its own with one thread per core.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A step releases the GIL at each of its ops. A thread that works on text then returns it only
    # after this interval: with Python's default of 5 ms a step could wait so a hundred times.
    sys.setswitchinterval(SWITCH_INTERVAL_S)


def _with_file(argv: list[str]) -> list[str]:
    """`argv`, with the settings of the --config file added, if one is given."""
    path = given(argv).get("config")
    if path is None:
        return argv
    from pyserve.config_file import with_settings

    return with_settings(path, argv)


def _launch_config(args: argparse.Namespace) -> LaunchConfig:
    return LaunchConfig(**settings(LAUNCH, args))


def _server_config(args: argparse.Namespace) -> ServerConfig:
    if args.uds is not None and (args.host is not None or args.port is not None):
        log.get_logger().warning("--host and --port have no effect beside --uds")
    said = settings(SERVER, args)
    said["api_keys"] = said["api_keys"] or tuple(filter(None, [env("VLLM_API_KEY")]))
    names = args.served_model_name or [args.model or DEMO_MODEL_NAME]
    return ServerConfig(**said | {"served_model_names": tuple(dict.fromkeys(names))})


def _warn_of_exposure(config: ServerConfig) -> None:
    if not config.api_keys and config.uds is None and config.host not in LOOPBACK:
        address = f"{config.host}:{config.port}"
        log.get_logger().warning(
            "anyone who reaches %s can use the model: pass --api-key KEY to require one", address
        )


def _tell_of_names(config: ServerConfig) -> None:
    """Log the names of API keys, as a key with a "=" in it may be taken for NAME=KEY by mistake."""
    users = dict.fromkeys(user for user, _ in named_keys(config.api_keys))
    if any(not user.startswith(UNNAMED) for user in users):
        log.get_logger().info("/metrics counts the use of API keys by name: %s", ", ".join(users))


def _check_paths(args: argparse.Namespace) -> None:
    """Refuse paths that cannot work before the port opens, not minutes later."""
    launch = _launch_config(args)
    for flag, name in (("--model", launch.model), ("--tokenizer", launch.tokenizer)):
        if name is None:
            continue
        path = os.path.expanduser(name)
        if not _may_be_found(name):
            raise ConfigError(f"{flag} {name[:200]} is neither a folder nor a name on the hub")
        has_config = os.path.lexists(os.path.join(path, "config.json"))
        if flag == "--model" and os.path.isdir(path) and not has_config:
            raise ConfigError(f"{flag} {name}: there is no config.json in this folder")
    if launch.download_dir is not None and _nearest_folder(launch.download_dir) is None:
        raise ConfigError(f"--download-dir {launch.download_dir}: is not a folder, nor could it be")


def _check_leaders_paths(launch: LaunchConfig, config: ServerConfig) -> None:
    """The same for paths that a rank which only follows does not need to have."""
    if launch.generation_config not in ("auto", "vllm"):
        _generation_folder(launch.generation_config, DEMO_MODEL)
    ready_file = config.ready_file
    if ready_file is not None and (
        os.path.isdir(ready_file) or not os.path.isdir(ready_file.parent)
    ):
        raise ConfigError(f"--ready-file {ready_file} must be a file in a folder that exists")


def _may_be_found(name: str) -> bool:
    """Whether `name` is a folder, or could be a repository of the hub."""
    # os.path returns False for names that the system refuses, where Path would raise.
    path = os.path.expanduser(name)
    if os.path.isfile(path) or not name:
        return False
    return name[0] not in "/.~" or os.path.isdir(path)


def _check_adapters(config: EngineConfig, server_config: ServerConfig) -> None:
    """Refuse adapters whose paths cannot work, or that have a name of the model."""
    for module in config.lora_modules:
        named = f"--lora-modules {module.name}"
        if module.name in server_config.served_model_names:
            raise ConfigError(f"{named} is the name of the model: see --served-model-name")
        if not _may_be_found(module.path):
            raise ConfigError(
                f"{named}: {module.path[:200]} is neither a folder nor a name on the hub"
            )
    if config.lora_dir is not None and not os.path.isdir(config.lora_dir):
        raise ConfigError(f"--lora-dir {config.lora_dir} is not a folder")


def _check_text(launch: LaunchConfig, config: ServerConfig) -> None:
    """Refuse a chat template or a parser name that cannot work."""
    from pyserve.text.chat_template import read_override
    from pyserve.text.reasoning import check_name as check_reasoning_parser
    from pyserve.text.tool_parsers.registry import check_name as check_tool_parser

    if launch.chat_template is not None:
        read_override(launch.chat_template)
    check_reasoning_parser(config.reasoning_parser)
    check_tool_parser(config.tool_call_parser)


def _nearest_folder(path: Path) -> Path | None:
    """`path`, or the nearest parent of it that exists; None where that is not a folder."""
    path = path.absolute()
    while not os.path.lexists(path):
        path = path.parent
    return path if os.path.isdir(path) else None


def _engine_config(args: argparse.Namespace, model_path: Path) -> EngineConfig:
    return EngineConfig(model_path=model_path, **settings(ENGINE, args))


def _tokenizer(folder: Path) -> Tokenizer:
    from pyserve.text.tokenizer import Tokenizer
    from pyserve.text.tokenizer_json import TOKENIZER_FILE

    if os.path.lexists(folder / TOKENIZER_FILE):
        return Tokenizer.from_folder(folder)
    from pyserve.text.sentencepiece_model import MODEL_FILE, convert_model

    if os.path.lexists(folder / MODEL_FILE):
        return Tokenizer.from_folder(folder, converted=convert_model(folder))
    from pyserve.text.convert import convert_tokenizer

    return Tokenizer.from_folder(folder, converted=convert_tokenizer(folder))


def _generation_folder(choice: str, model_path: Path) -> Path:
    if choice in ("auto", "vllm"):
        return model_path
    if not os.path.isfile(os.path.join(choice, "generation_config.json")):
        raise ConfigError(
            f"--generation-config must be auto, vllm or a folder with generation_config.json, "
            f"got {choice[:200]}"
        )
    return Path(choice)


def _loader(args: argparse.Namespace) -> Callable[[Report], Loaded]:
    """Make the function with which the server loads the model, on a worker thread."""
    from pyserve.engine.preload import Preload
    from pyserve.engine.tensor_parallel.spawned import spawn

    def load(report: Report) -> Loaded:
        preload = Preload(is_card_wanted=args.device != "cpu")
        spawned: list[Spawned] = []
        try:
            here = launched()
            if here is not None:
                _agree(args, here, preload)
            else:
                spawned += spawn(_engine_config(args, DEMO_MODEL).tensor_parallel_size)
            return _load(args, report, preload, spawned)
        except BaseException:
            for process in spawned:
                process.kill()
            raise
        finally:
            preload.end()

    return load


def _load(
    args: argparse.Namespace, report: Report, preload: Preload, spawned: list[Spawned]
) -> Loaded:
    from concurrent.futures import ThreadPoolExecutor

    from pyserve.api.state import Loaded
    from pyserve.model.config import ModelConfig
    from pyserve.text.chat_template import ChatTemplate
    from pyserve.text.grammar import Grammars
    from pyserve.text.reasoning import ReasoningParser
    from pyserve.text.score_template import ScoreTemplate
    from pyserve.text.tokenizer import GenerationDefaults
    from pyserve.text.tool_parsers.registry import ToolFormat

    launch = _launch_config(args)
    config = _server_config(args)
    model_path = DEMO_MODEL
    if launch.model is not None:
        model_path = _resolve(args, report, preload, flag="--model", revision=launch.revision)
        report("start", 0, 0)  # ends the download phase
    if not os.path.lexists(model_path / "config.json"):
        raise CheckpointError(f"--model {launch.model}: there is no config.json in {model_path}")
    # Reading the tokenizer holds the GIL most of the time; meanwhile `preload` maps torch's
    # libraries without the GIL.
    tokenizer = _tokenizer(_tokenizer_folder(args, report, preload, model_path))
    template = ChatTemplate.load(tokenizer, override=launch.chat_template)
    template.check_defaults(config.default_chat_template_kwargs or {})
    defaults = GenerationDefaults.from_folder(
        _generation_folder(launch.generation_config, model_path),
        has_sampling=launch.generation_config != "vllm",
    )
    engine_config = _engine_config(args, model_path)
    model = ModelConfig.from_path(model_path, use=engine_config.use)
    score_template = None
    if model.pooling is not None and model.pooling.kind == "score":
        engine_config = replace(engine_config, answer_ids=tokenizer.ids_of(model.pooling.answers))
        score_template = ScoreTemplate.find(template, tokenizer, model_type=model.model_type)
    find_adapter = partial(_find_adapter, launch)
    for module in engine_config.lora_modules:
        flag, fetched = f"--lora-modules {module.name}", partial(report, "download")
        _find_adapter(launch, module.path, flag=flag, progress=fetched)
        report("start", 0, 0)
    preload.wait()
    with collector.imports():
        from pyserve.engine.load import build_engine

    with ThreadPoolExecutor(1, "grammars") as pool:
        # Preparing grammars holds the GIL, which loading weights and the GPU's steps mostly leave
        # free; so both are done at the same time.
        grammars = Grammars.of(tokenizer, defaults, model.vocab_size)
        preparing = pool.submit(grammars.prepare)
        engine = build_engine(
            engine_config, progress=report, find_adapter=find_adapter, spawned=spawned
        )
        preparing.result()
    return Loaded(
        tokenizer=tokenizer,
        chat_template=template,
        defaults=defaults,
        engine=engine,
        reasoning=ReasoningParser.named(config.reasoning_parser, tokenizer),
        tools=ToolFormat.named(config.tool_call_parser, tokenizer),
        score_template=score_template,
        prepared=grammars,
    )


def _find_adapter(
    launch: LaunchConfig, name: str, *, flag: str = "the adapter",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:  # fmt: skip
    """The folder of an adapter, which is downloaded if needed. Raises StartupError."""
    from pyserve.hub.resolve import resolve_adapter

    return resolve_adapter(
        name, flag=flag, token=launch.token, download_dir=launch.download_dir,
        progress=progress,
    )  # fmt: skip


def _agree(args: argparse.Namespace, here: Launched, preload: Preload) -> None:
    """Where torchrun has started several ranks, see that all mean the same."""
    if here.tp_size == 1:
        return
    preload.wait()
    with collector.imports():
        from pyserve.engine.tensor_parallel.launched import agree
        from pyserve.ops.meeting import meeting

    agree(_engine_config(args, DEMO_MODEL), meeting())


def _follow(args: argparse.Namespace) -> int:
    """Run as a follower: a rank that torchrun has started and that is not the leader (rank 0).

    Returns the exit code.
    """
    from pyserve.engine.preload import Preload
    from pyserve.engine.tensor_parallel.follower import follow_launched
    from pyserve.model.config import ModelConfig

    def report(phase: str, done: int, total: int) -> None:
        """Report nothing: the leader reports its own progress."""

    launch = _launch_config(args)
    model_path = DEMO_MODEL
    preload = Preload(is_card_wanted=False)
    here = launched()
    assert here is not None
    _agree(args, here, preload)
    if launch.model is not None:
        model_path = _resolve(args, report, preload, flag="--model", revision=launch.revision)
    config = _engine_config(args, model_path)
    model = ModelConfig.from_path(model_path, use=config.use)
    if model.pooling is not None and model.pooling.kind == "score":
        tokenizer = _tokenizer(_tokenizer_folder(args, report, preload, model_path))
        config = replace(config, answer_ids=tokenizer.ids_of(model.pooling.answers))
    preload.end()
    return follow_launched(config)


def _tokenizer_folder(
    args: argparse.Namespace, report: Report, preload: Preload, model_path: Path
) -> Path:
    """The folder of --tokenizer, downloaded where it must be; else the model's."""
    if args.tokenizer is None:
        return model_path
    return _resolve(args, report, preload, flag="--tokenizer", revision=None)


def _resolve(
    args: argparse.Namespace, report: Report, preload: Preload, *, flag: str, revision: str | None
) -> Path:
    """The folder of the model or tokenizer that `flag` names, which is downloaded if needed."""
    from pyserve.hub.resolve import resolve_model

    launch = _launch_config(args)
    is_model = flag == "--model"
    name = launch.model if is_model else launch.tokenizer
    assert name is not None

    def check(folder: Path) -> None:
        """Raise, before the weights are downloaded, what would be raised after that."""
        preload.wait()
        with collector.imports():
            from pyserve.engine.load import check_start

        check_start(_engine_config(args, folder))

    return resolve_model(
        name,
        revision=revision,
        token=launch.token,
        download_dir=launch.download_dir,
        flag=flag,
        has_weights=is_model and args.load_format != "dummy",
        progress=lambda done, total: report("download", done, total),
        check=check,
    )
