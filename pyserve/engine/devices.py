"""The choice of device and dtype, and checks of what they support, before anything is built.

Rank r of a machine uses torch's device cuda:r, so CUDA_VISIBLE_DEVICES chooses the cards.
"""

from __future__ import annotations

from pathlib import Path

import torch

from pyserve import log
from pyserve.config import Device, Dtype, EngineConfig, LogprobsMode, launched
from pyserve.engine.planner import CardMemory
from pyserve.errors import ConfigError, StartupError
from pyserve.model.config import CheckpointDtype, ModelConfig
from pyserve.ops import cuda_card

CPU = torch.device("cpu")
DRIVER_VERSION = Path("/proc/driver/nvidia/version")  # visible even in containers without a card


def resolve_device(wanted: Device, *, is_demo: bool, tp_rank: int = 0) -> torch.device:
    """The device that `wanted` means for rank `tp_rank` on this machine.

    With "auto", a card that is present but unusable is an error: falling back to the CPU would
    silently serve far too slowly. Raises StartupError with a one-line remedy.

    is_demo  the demo model is served, for which a CPU is expected: no warning is logged.
    """
    if wanted == "cpu":
        return CPU
    if wanted == "auto" and not cuda_card.has_card() and not DRIVER_VERSION.exists():
        say = log.get_logger().info if is_demo else log.get_logger().warning
        say("no NVIDIA card found: serving on the CPU")
        return CPU
    try:
        cuda_card.check_cuda(_index(tp_rank))
    except StartupError as error:
        remedy = "" if "--device cpu" in str(error) else "; or pass --device cpu"
        raise StartupError(f"{error}{remedy}") from error
    return torch.device("cuda", _index(tp_rank))


def _index(tp_rank: int) -> int:
    """torch's index of the card of rank `tp_rank` on the rank's own machine."""
    here = launched()
    return tp_rank if here is None else here.local_index


def check_cards(device: torch.device, tp_size: int, pp_size: int = 1) -> None:
    """Check that torchrun's processes and this machine's cards match the parallel sizes.

    Raises ConfigError where processes or cards are missing, or the cards are of different kinds.
    """
    here = launched()
    if here is not None and here.tp_size != tp_size * pp_size:
        kind = "pipeline" if pp_size > 1 else "tensor"
        raise ConfigError(
            f"--{kind}-parallel-size {tp_size * pp_size}, but torchrun has started {here.tp_size} "
            "processes"
        )
    if here is None and pp_size > 1:
        raise ConfigError(
            f"--pipeline-parallel-size {pp_size} is for ranks that torchrun starts: on one machine "
            f"use --tensor-parallel-size"
        )
    if device.type == "cpu" or tp_size == 1:
        return
    if here is not None:  # under torchrun each process checks its own card only
        return
    num_cards = torch.cuda.device_count()
    if num_cards < tp_size:
        raise ConfigError(
            f"--tensor-parallel-size {tp_size} needs as many cards, and this machine shows "
            f"{num_cards}: see nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    kinds = [torch.cuda.get_device_name(index) for index in range(tp_size)]
    if len(set(kinds)) > 1:
        raise ConfigError(
            f"--tensor-parallel-size {tp_size} needs cards of one kind, and these are "
            f"{', '.join(kinds)}: choose by CUDA_VISIBLE_DEVICES"
        )


def describe(device: torch.device) -> str:
    """A description for the log: "cpu", or "cuda" with the card's name and compute capability."""
    if device.type == "cpu":
        return "cpu"
    major, minor = cuda_card.capability(device.index)
    return f"cuda ({torch.cuda.get_device_name(device)}, compute capability {major}.{minor})"


def card_memory(device: torch.device) -> CardMemory:
    """The card's memory in use now, which includes our CUDA context; creates it if needed.

    Raises StartupError where the context cannot be created.
    """
    try:
        torch.cuda.set_device(device)
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise StartupError(
            f"{torch.cuda.get_device_name(device)} takes no work ({reason}): other processes hold "
            f"it or its memory, see nvidia-smi; end them, or choose another card with "
            f"CUDA_VISIBLE_DEVICES"
        ) from error
    return CardMemory(total_bytes=total_bytes, used_bytes=total_bytes - free_bytes)


def check_model(model: ModelConfig, device: torch.device) -> None:
    """Raise ConfigError if the model needs something for which `device` has no kernels."""
    lacks = model.lacking_on_cuda()
    if device.type == "cuda" and lacks:
        raise ConfigError(
            f"config.json: {', '.join(lacks)}: served on the CPU only so far (--device cpu)"
        )


def check_logprobs_mode(mode: LogprobsMode, device: torch.device) -> None:
    """Raise ConfigError if there is no kernel for this logprobs mode on `device`."""
    if device.type == "cuda" and mode.startswith("processed"):
        raise ConfigError(
            f"--logprobs-mode {mode} is not built yet on an NVIDIA card: use raw_logprobs or "
            "raw_logits, or pass --device cpu"
        )


def check_adapters(config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> None:
    """Raise ConfigError if --enable-lora is given but this setup does not support adapters."""
    if not config.enable_lora:
        return
    if launched() is not None:
        raise ConfigError("--enable-lora is not built yet under torchrun")
    if model.pooling is not None:
        raise ConfigError("--enable-lora is not built yet for models of embeddings and scores")
    served = str(dtype).removeprefix("torch.")
    if config.lora_dtype not in ("auto", served):
        raise ConfigError(
            f"--lora-dtype {config.lora_dtype} is not supported for a model in {served}: use auto"
        )


def resolve_dtype(wanted: Dtype, stored: CheckpointDtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in. Raises ConfigError for one that is not supported on `device`."""
    logger = log.get_logger()
    if device.type == "cuda":
        if wanted == "float32":
            raise ConfigError(
                "--dtype float32 is not supported on an NVIDIA card: use bfloat16 or float16, "
                "or pass --device cpu"
            )
        if wanted == "auto" and stored == "float32":
            logger.info("the checkpoint is float32: computing in bfloat16 on an NVIDIA card")
            return torch.bfloat16
        dtype = stored if wanted == "auto" else wanted
        return torch.float16 if dtype == "float16" else torch.bfloat16
    if wanted == "float16":
        raise ConfigError("--dtype float16 is not supported on a CPU: use bfloat16 or float32")
    if wanted == "auto" and stored == "float16":
        logger.info("the checkpoint is float16: computing in float32 on a CPU")
        return torch.float32
    dtype = stored if wanted == "auto" else wanted
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32
