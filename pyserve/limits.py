"""Limits of the kernels. Whatever refuses a model or a request because of them uses these values.

The native code has its own copy of each limit; tests compare those of the slot rows with these.
"""

from __future__ import annotations

from typing import Final

# Attention. The CPU kernels take any multiple of HEAD_DIM_STEP; CUDA has kernels for some sizes.
HEAD_DIM_STEP: Final = 8
MAX_HEAD_DIM: Final = 256
CUDA_HEAD_DIMS: Final = (64, 96, 128, 256)
CUDA_CAPPED_HEAD_DIMS: Final = (96, 128, 256)  # head sizes with a softcap
MAX_GROUP: Final = 64  # query heads per KV head

# Latent attention. The CPU kernels take any multiples of LATENT_STEP; CUDA has one size.
LATENT_STEP: Final = 8
MAX_LATENT_SIZE: Final = 1024
MAX_LATENT_ROPE_DIM: Final = 256
CUDA_LATENT_SIZES: Final = (512, 64)  # kv_lora_rank, qk_rope_head_dim

# Mixtures of experts. The CPU kernels take any widths; CUDA reads rows in vectors of EXPERTS_STEP.
EXPERTS_STEP: Final = 8
FP8_EXPERTS_STEP: Final = 16  # the same for FP8 weights
MAX_EXPERTS: Final = 512
MAX_TOP_EXPERTS: Final = 32  # experts per token
MAX_EXPERT_GROUPS: Final = 32

# Sampling.
MAX_BAD_WORDS: Final = 128
MAX_VOCAB_SIZE: Final = 2**19
TOP_LOGPROBS: Final = 20  # most likely tokens that a row reports, however few were requested
MAX_LOGIT_BIAS: Final = 300  # entries of one sequence, which its slot's row has room for
MAX_STOP_TOKEN_IDS: Final = 64  # likewise
