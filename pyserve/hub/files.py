"""Which files of a model or an adapter the server reads, in a hub listing or in a folder."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from pyserve.checkpoint_files import (
    INDEX_FILE,
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    SINGLE_FILE,
    read_weight_map,
)
from pyserve.errors import CheckpointError
from pyserve.hub.client import HubClient, Listing, RemoteFile

# Which files of a repository are wanted: all of a model, its files but the weights, or an adapter.
Kind = Literal["model", "texts", "adapter"]
ADAPTER_TEXT, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TEXTS = (
    "config.json", "generation_config.json", "tokenizer*.json", "*.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json", "modules.json",
)  # fmt: skip
MORE_TEMPLATES = re.compile(r"additional_chat_templates/[\w-][\w.-]*\.jinja")
MODULES = re.compile(r"[0-9]{1,2}_[A-Za-z]{1,40}/config\.json")  # a module of sentence-transformers
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # any one of them is enough

FIRST_BYTES = 64 * 1024  # read first of each file, as most headers are shorter
MAX_HEADERS_BYTES = 256 * 2**20  # headers of all files of a model; 200 large shards have 20 MB
LFS_POINTER, MAX_LFS_POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024


def served_texts(listing: Listing, kind: Kind) -> list[RemoteFile]:
    """The files that the server reads, except for the weights."""
    if kind == "adapter":
        return [file for name, file in listing.files.items() if name == ADAPTER_TEXT]
    patterns = (*TEXTS, INDEX_FILE) if kind == "model" else TEXTS
    return [file for name, file in listing.files.items() if _is_among(name, patterns)]


def describing_texts(listing: Listing) -> list[RemoteFile]:
    """The files that, with the headers of the weights, describe a model's architecture."""
    names = ("config.json", "modules.json", INDEX_FILE)
    return [
        file for name, file in listing.files.items() if name in names or MODULES.fullmatch(name)
    ]


def may_be_served(name: str) -> bool:
    return _is_among(name, (*TEXTS, INDEX_FILE, ADAPTER_TEXT, "*.safetensors"))


def _is_among(name: str, patterns: Iterable[str]) -> bool:
    if MORE_TEMPLATES.fullmatch(name) or MODULES.fullmatch(name):
        return True
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in patterns)


def refuse_lfs_pointers(folder: Path, *, named: str) -> None:
    """Raise CheckpointError where a file of `folder` is a git-lfs pointer instead of the file.

    named  how the message calls the model.
    """
    for path in sorted(folder.iterdir()):
        if not may_be_served(path.name) or not path.is_file():
            continue
        if path.stat().st_size > MAX_LFS_POINTER_BYTES or not os.access(path, os.R_OK):
            continue
        if path.read_bytes().startswith(LFS_POINTER):
            raise CheckpointError(
                f"{named}: {path.name} is a git-lfs pointer, not the file that it stands for: "
                "run git lfs pull in that folder"
            )


def looks_whole(snapshot: Path, kind: Kind) -> bool:
    """Whether all files that a start needs exist in a folder; their contents are not checked."""
    if kind == "adapter":
        return all((snapshot / name).is_file() for name in (ADAPTER_TEXT, ADAPTER_WEIGHTS))
    if not any((snapshot / name).is_file() for name in TOKENIZERS):
        return False
    if kind == "texts":
        return True
    if not (snapshot / "config.json").is_file():
        return False
    if (snapshot / SINGLE_FILE).is_file():
        return True
    try:
        names = _indexed_files(snapshot / INDEX_FILE)
    except CheckpointError:
        return False
    return all((snapshot / name).is_file() for name in names)


def likely_weights(listing: Listing, kind: Kind) -> list[RemoteFile]:
    """The weights that the index will probably name, as a guess before the index is fetched."""
    if kind == "texts":
        return []
    if kind == "adapter":
        return [file for name, file in listing.files.items() if name == ADAPTER_WEIGHTS]
    if SINGLE_FILE in listing.files:
        return [listing.files[SINGLE_FILE]]
    return [
        file
        for name, file in listing.files.items()
        if fnmatchcase(name, "model*.safetensors") and "/" not in name
    ]


def served_weights(
    listing: Listing, folder: Path, *, named: str, kind: Kind = "model"
) -> list[RemoteFile]:
    """The safetensors files that the loader will read; the index, if any, is in `folder`.

    Raises CheckpointError where there are none.
    """
    if kind == "texts":
        return []
    others = {Path(name).suffix for name in listing.files} & {".bin", ".pth", ".pt", ".gguf"}
    has = f", only {' and '.join(sorted(others))}" if others else ""
    if kind == "adapter":
        for name in (ADAPTER_TEXT, ADAPTER_WEIGHTS):
            if name not in listing.files:
                raise CheckpointError(f"{named} is no adapter: there is no {name}{has}")
        return [listing.files[ADAPTER_WEIGHTS]]
    if SINGLE_FILE in listing.files:
        return [listing.files[SINGLE_FILE]]
    if INDEX_FILE not in listing.files:
        raise CheckpointError(
            f"{named} has no weights as safetensors ({SINGLE_FILE} or {INDEX_FILE}){has}"
        )
    names = _indexed_files(folder / INDEX_FILE)
    lacking = [name for name in names if name not in listing.files]
    if lacking:
        raise CheckpointError(f"{named}: {INDEX_FILE} lists {lacking[0][:200]}, which is not there")
    return [listing.files[name] for name in names]


def _indexed_files(path: Path) -> list[str]:
    """Names of the files that an index lists."""
    return sorted(set(read_weight_map(path).values()))


async def write_headers(
    client: HubClient, weights: list[RemoteFile], commit: str, folder: Path, *, named: str
) -> None:
    """Write into `folder` sparse copies of `weights`, which contain only the safetensors headers.

    Raises CheckpointError where the headers have more than MAX_HEADERS_BYTES together.
    """
    streams = asyncio.Semaphore(8)
    left_bytes = MAX_HEADERS_BYTES

    async def write(file: RemoteFile) -> None:
        nonlocal left_bytes
        async with streams:
            text = await client.read(file, 0, min(FIRST_BYTES, file.size), commit=commit)
            end = LENGTH_BYTES + int.from_bytes(text[:LENGTH_BYTES], "little")
            left_bytes -= min(end, LENGTH_BYTES + MAX_HEADER_BYTES)
            if left_bytes < 0:
                raise CheckpointError(
                    f"{named}: the headers of its {len(weights)} safetensors files have more than "
                    f"{MAX_HEADERS_BYTES} bytes"
                )
            # Whatever reads the file will refuse a header that is too long.
            if len(text) < end <= min(LENGTH_BYTES + MAX_HEADER_BYTES, file.size):
                text += await client.read(file, len(text), end, commit=commit)
        with (folder / file.name).open("wb") as sink:
            sink.write(text[:end])
            sink.truncate(file.size)

    await asyncio.gather(*[write(file) for file in weights])
