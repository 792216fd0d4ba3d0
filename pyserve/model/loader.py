"""Fills a Decoder from a checkpoint, or with random weights (load_format "dummy").

Tensors are read in the order in which they are stored, directly into their place in the (fused)
parameters, and converted on the way. Names, shapes and dtypes are checked before any data is read.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Iterable, Set
from pathlib import Path

import torch

from pyserve import log
from pyserve.errors import CheckpointError
from pyserve.model.build import build_model
from pyserve.model.config import ModelConfig
from pyserve.model.decoder import Decoder
from pyserve.model.destination import (
    FLOATS,
    Destination,
    Destinations,
    Part,
    Sink,
    finish_loading,
)
from pyserve.model.fused_experts import as_stored
from pyserve.model.layers.pooler import HEAD_NAME, SCORE_NAME
from pyserve.model.placement import META, Placement
from pyserve.model.weights import (
    CheckpointReader,
    StoredTensor,
    bytes_to_read,
    index_checkpoint,
    name_some,
)

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)

MODEL_PREFIX = "model."
TEXT_PREFIX = "language_model."  # of the text model's tensors in a multimodal checkpoint
EMBEDDING_NAME = "model.embed_tokens.weight"
FINAL_NORM_NAME = "model.norm.weight"

LAYER_NAMES = re.compile(r"model\.layers\.(\d{1,9})\.")
# Only layers that predict tokens further ahead have it: one that lacks it is one of the model's.
AHEAD_NAMES = re.compile(r"model\.layers\.(\d{1,9})\.(.*\.)?eh_proj\..*")

# Old checkpoints store tensors that follow from config.json, rotary tables and causal masks. They
# are ignored.
DERIVED_NAMES = re.compile(
    r"(.*\.)?(rotary_emb\.(original_)?inv_freq|rotary_emb\.(cos|sin)_cached"
    r"|causal_mask|attention_mask|masked_bias|position_ids)"
)
MASK_NAMES = re.compile(r"(.*\.)?self_attn\.bias")  # [1, 1, n, n], in the manner of GPT-2
MASK_DIMS = 4
# Names of tensors that only quantised matrices have.
QUANTISED_NAMES = re.compile(r".*\.(qweight|weight_packed|weight_scale|weight_scale_inv|absmax)")

DUMMY_STD = 0.02  # standard deviation of transformers' initialisation
# On a CPU, noise of this length is made once and copied from random offsets, which is as fast as
# memory. The length is a prime, so that the rows of a matrix do not repeat.
DUMMY_NOISE_LEN = 4_194_301


def load_model(
    path: Path,
    config: ModelConfig,
    placement: Placement,
    *,
    load_format: str,
    seed: int,
    progress: Progress,
    max_model_len: int | None = None,
) -> Decoder:
    """Build the model and fill it from the safetensors files in the folder `path`.

    load_format    "dummy": random weights drawn from `seed` instead.
    progress       called with (bytes done, bytes in all), at least at the start and at the end.
    max_model_len  as in build_model.

    Raises CheckpointError naming the tensors that are missing, left over, or of a wrong shape or
    dtype.
    """
    if config.towers:
        log.get_logger().info(
            "only the text model is loaded, without %s", " and ".join(config.towers)
        )
    stored = None if load_format == "dummy" else _held(_index(path, config), config, placement)
    model = build_model(config, placement, max_model_len=max_model_len)
    destinations = model.destinations()
    if stored is None:
        if placement.device.type == "cpu":
            _fill_with_noise(destinations, placement.dtype, seed, progress)
        else:
            _fill_with_noise_there(destinations, placement.device, seed, progress)
    else:
        stored, destinations = as_stored(stored, destinations, config)
        _check(stored, destinations, config)
        _stream(stored, destinations, placement.device, progress)
    finish_loading(destinations.values())
    return model


def check_checkpoint(path: Path, config: ModelConfig) -> None:
    """Check names, shapes and dtypes in the folder's safetensors headers against `config`.

    Raises CheckpointError.
    """
    shapes = build_model(config, Placement(torch.bfloat16, META), max_model_len=1)
    stored, destinations = as_stored(_index(path, config), shapes.destinations(), config)
    _check(stored, destinations, config)


def _index(path: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """The tensors of the folder by the names that a Decoder uses.

    The names in the files may lack the leading "model." (saved from the model without its head) or
    repeat it (saved from a wrapper). If embedding and head are one matrix, safetensors' save_model
    keeps either name. Left out are the towers of a multimodal model, the head of a model that pools
    if nothing reads it, and extra layers that predict further tokens.
    """
    stored: dict[str, StoredTensor] = {}
    prefixes = (MODEL_PREFIX, TEXT_PREFIX) if config.towers else (MODEL_PREFIX,)
    named = [(_plain_name(it.name, prefixes), it) for it in index_checkpoint(path).values()]
    ahead: set[str] = set()
    if config.has_extra_layers:
        matches = (AHEAD_NAMES.fullmatch(name) for name, _ in named)
        ahead = {match[1] for match in matches if match and int(match[1]) >= len(config.layers)}
    for name, tensor in named:
        if config.quantization is not None:
            name = config.quantization.plain_name(name)
        if name.removeprefix(MODEL_PREFIX).startswith(tuple(f"{it}." for it in config.towers)):
            continue
        if (layer := LAYER_NAMES.match(name)) and layer[1] in ahead:
            continue
        if name in stored:
            raise CheckpointError(
                f"the checkpoint holds {name} twice: as {stored[name].name} and as {tensor.name}"
            )
        stored[name] = tensor
    if config.tie_word_embeddings and EMBEDDING_NAME not in stored and HEAD_NAME in stored:
        stored[EMBEDDING_NAME] = stored.pop(HEAD_NAME)
    pooling = config.pooling
    if pooling is not None and not (config.tie_word_embeddings or pooling.has_text_head):
        stored.pop(HEAD_NAME, None)
    return stored


def _held(
    stored: dict[str, StoredTensor], config: ModelConfig, placement: Placement
) -> dict[str, StoredTensor]:
    """The tensors of the layers that this rank of a pipeline holds, and of what is around them.

    Other ranks check their own.
    """
    num_layers = len(config.layers)
    here = placement.layers(num_layers)

    def is_held(name: str) -> bool:
        layer = LAYER_NAMES.match(name)
        if layer is None or int(layer[1]) >= num_layers:
            return placement.has_ends or name == FINAL_NORM_NAME
        return int(layer[1]) in here

    return {name: tensor for name, tensor in stored.items() if is_held(name)}


def _plain_name(name: str, prefixes: tuple[str, ...]) -> str:
    while name.startswith(prefixes):
        name = name.partition(".")[2]
    return name if name in (HEAD_NAME, SCORE_NAME) else MODEL_PREFIX + name


def _check(
    stored: dict[str, StoredTensor], destinations: Destinations, config: ModelConfig
) -> None:
    needed = {name for name, place in destinations.items() if not place.is_optional}
    missing = needed - stored.keys()
    if missing:
        raise _lacks(missing, stored, config)
    wanted = {*destinations, HEAD_NAME} if config.tie_word_embeddings else destinations.keys()
    left_over = {
        tensor.name
        for name, tensor in stored.items()
        if name not in wanted and not _is_derived(tensor)
    }
    if left_over:
        raise CheckpointError(
            f"the checkpoint holds tensors {config.architecture} does not have with this "
            f"config.json: {name_some(left_over)}{_note_of_quantised(left_over)}"
        )
    for name, destination in destinations.items():
        tensor = stored.get(name)
        if tensor is None:
            continue
        if not destination.fits(tensor.shape):
            raise CheckpointError(
                f"{tensor.file}: {tensor.name} has shape {list(tensor.shape)}, "
                f"config.json makes it {list(destination.shape)}"
                f"{_note_of_quantisation(destination, config)}"
            )
        if tensor.dtype not in destination.dtypes:
            raise CheckpointError(
                f"{tensor.file}: {tensor.name} is {tensor.dtype}, "
                f"supported are {', '.join(destination.dtypes)}"
            )


def _lacks(
    missing: Set[str], stored: dict[str, StoredTensor], config: ModelConfig
) -> CheckpointError:
    """The error for a checkpoint that lacks these tensors, with a likely cause."""
    text = f"the checkpoint lacks: {name_some(missing)}"
    if config.quantization is None:
        text += _note_of_quantised(stored)
    for name in sorted(missing):
        plain = f"{name.rpartition('.')[0]}.weight"
        is_plain = plain in stored and stored[plain].dtype in FLOATS
        if config.quantization is not None and is_plain:
            text += (
                f"; {plain} is there, a plain matrix, but config.json says that it is quantised "
                f"({config.quantization.method})"
            )
            break
    pair = {HEAD_NAME, EMBEDDING_NAME}
    if len(missing & pair) == 1 and pair & stored.keys():
        text += (
            "; config.json does not say tie_word_embeddings: true; set it if embedding and head "
            "are one matrix"
        )
    return CheckpointError(text)


def _note_of_quantised(names: Iterable[str]) -> str:
    name = next((name for name in names if QUANTISED_NAMES.fullmatch(name)), None)
    if name is None:
        return ""
    return f"; {name} is of a quantised matrix, which config.json does not say it is"


def _note_of_quantisation(destination: Destination, config: ModelConfig) -> str:
    quantization = config.quantization
    if quantization is None or destination.dtypes == FLOATS:
        return ""
    return f" ({quantization.words()})"


def _is_derived(tensor: StoredTensor) -> bool:
    if len(tensor.shape) == MASK_DIMS and MASK_NAMES.fullmatch(tensor.name):
        return True
    return DERIVED_NAMES.fullmatch(tensor.name) is not None


def _stream(
    stored: dict[str, StoredTensor], destinations: Destinations, device: torch.device,
    progress: Progress,
) -> None:  # fmt: skip
    wanted: list[tuple[StoredTensor, Part | Sink]] = []
    for name, destination in destinations.items():
        if name in stored:
            sinks = () if destination.sink is None else (destination.sink,)
            wanted += [(stored[name], part) for part in (*destination.parts, *sinks)]
    tied_head = None if HEAD_NAME in destinations else stored.get(HEAD_NAME)
    total = sum(bytes_to_read(tensor, part) for tensor, part in wanted)
    done = 0
    progress(done, total)
    with CheckpointReader(device=device) as reader:
        for tensor, part in sorted(wanted, key=lambda pair: (pair[0].file, pair[0].offset)):
            read = (
                reader.feed(tensor, part) if isinstance(part, Sink) else reader.copy(tensor, part)
            )
            for num_bytes in read:
                done += num_bytes
                progress(done, total)
        reader.wait()
        if tied_head is not None:
            _check_tied_head(reader, tied_head, destinations[EMBEDDING_NAME])


def _check_tied_head(reader: CheckpointReader, head: StoredTensor, embedding: Destination) -> None:
    """Check that a stored head equals the embedding although config.json says that they are tied.

    Some checkpoints say so wrongly and would answer nonsense. Each rank compares the rows that it
    holds. Raises CheckpointError.
    """
    is_comparable = head.shape == embedding.shape and head.dtype in FLOATS
    part = embedding.parts[0]
    flat, first = part.view.view(-1), part.start * embedding.shape[1]

    def is_same(start: int, piece: torch.Tensor) -> bool:
        begin, end = max(start, first), min(start + piece.numel(), first + flat.numel())
        own, other = flat[max(begin - first, 0) : end - first], piece[begin - start : end - start]
        return begin >= end or torch.equal(own, other.to(own.device, own.dtype))

    if not is_comparable or not all(is_same(*piece) for piece in reader.pieces(head)):
        raise CheckpointError(
            f"{head.file}: {HEAD_NAME} differs from {EMBEDDING_NAME}, but config.json says "
            f"tie_word_embeddings; set it to false"
        )


def _seed_of(seed: int, name: str, part: Part | None = None) -> int:
    """The seed of the random weights of a tensor, or of a part of it. Ranks that hold the same part
    get the same weights, and different parts get different ones."""
    place = "" if part is None else f"{part.dim} {part.start}"
    return zlib.crc32(f"{seed} {name} {place}".encode())


def _fill_with_noise_there(
    destinations: Destinations, device: torch.device, seed: int, progress: Progress
) -> None:
    """Draw random weights on the card, which is as fast as writing them. Different kinds of cards
    draw different numbers."""
    total = sum(destination.nbytes for destination in destinations.values())
    done = 0
    progress(done, total)
    generator = torch.Generator(device)
    for name, destination in destinations.items():
        generator.manual_seed(_seed_of(seed, name))
        if destination.dummy is not None:
            destination.dummy(generator)
        for part in destination.parts if destination.dummy is None else ():
            generator.manual_seed(_seed_of(seed, name, part))
            part.view.normal_(destination.dummy_mean, DUMMY_STD, generator=generator)
        done += destination.nbytes
    torch.cuda.synchronize(device)
    progress(done, total)


def _fill_with_noise(
    destinations: Destinations, dtype: torch.dtype, seed: int, progress: Progress
) -> None:
    """Copy random weights, made once in `dtype`, from random offsets; on a CPU."""
    total = sum(destination.nbytes for destination in destinations.values())
    done = 0
    progress(done, total)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(DUMMY_NOISE_LEN, generator=generator)
    noise = (noise * DUMMY_STD).to(dtype)
    for name, destination in destinations.items():
        if destination.dummy is not None:
            destination.dummy(generator.manual_seed(_seed_of(seed, name)))
        for part in destination.parts if destination.dummy is None else ():
            starts = random.Random(_seed_of(seed, name, part))
            flat = part.view.view(-1)
            filled = 0
            while filled < flat.numel():
                piece = noise[starts.randrange(DUMMY_NOISE_LEN) :][: flat.numel() - filled]
                flat[filled : filled + piece.numel()].copy_(piece)
                filled += piece.numel()
            if destination.dummy_mean:
                flat += destination.dummy_mean
        done += destination.nbytes
        progress(done, total)
