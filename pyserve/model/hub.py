"""From a model's name to a local folder: a folder as it is, anything else from the hub.

Only what is served is fetched: config, tokenizer and safetensors files; no code, no pickles.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pyserve import log
from pyserve.errors import ConfigError, StartupError

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96})?")

FETCHED = (
    "config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json",
    "tokenizer*", "*.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template*",
)  # fmt: skip
# Sub-folders hold other formats; consolidated files repeat the weights under other names.
NOT_FETCHED = ("*/*", "consolidated*")


def resolve_model(
    name: str,
    *,
    revision: str | None,
    token: str | None,
    download_dir: Path | None,
    flag: str = "--model",
) -> Path:
    """The folder of a model: `name` is a folder, or a repository of the hub, "owner/model".

    A repository is fetched into `download_dir`, or into the hub's own cache; what is there already
    is not fetched again. All files come from one commit. Raises StartupError that names `flag`.
    """
    named = f"{flag} {name}"
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        if revision is not None:
            log.get_logger().warning("%s is a folder: --revision has no effect", named)
        return Path(folder)
    if os.path.exists(folder):
        raise ConfigError(f"{named} is a file; it must be a folder or a name on the hub")
    if name.startswith(("/", ".", "~")) or not REPO_ID.fullmatch(name):
        raise ConfigError(f"{named} is neither a folder nor a name on the hub")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=download_dir,
                allow_patterns=list(FETCHED),
                ignore_patterns=list(NOT_FETCHED),
            )
        )
    except GatedRepoError as error:
        raise StartupError(
            f"{named} is gated: accept its terms on the hub and pass --hf-token"
        ) from error
    except RepositoryNotFoundError as error:
        raise StartupError(f"{named} is not on the hub, or is private: pass --hf-token") from error
    except RevisionNotFoundError as error:
        raise StartupError(f"{named} has no revision {revision}") from error
    except LocalEntryNotFoundError as error:
        raise StartupError(
            f"{named} is not a folder, not in the cache, and the hub cannot be reached"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise StartupError(f"{named}: the hub answered with status {status}") from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise StartupError(f"{named} could not be fetched: {reason}") from error
    except Exception as error:  # which HTTP library's kinds come here depends on the hub's version
        reason = type(error).__name__
        raise StartupError(f"{named} could not be fetched: {reason}") from error
