"""What the kernels take at most: everything that refuses a model or a request for them asks here.

The native code has its own copy of each; tests hold those of the slot rows to these.
"""

from __future__ import annotations

from typing import Final

# Attention. On a CPU any multiple of HEAD_DIM_STEP will do, a card has kernels for some sizes.
HEAD_DIM_STEP: Final = 8
MAX_HEAD_DIM: Final = 256
CUDA_HEAD_DIMS: Final = (64, 96, 128, 256)
CUDA_CAPPED_HEAD_DIMS: Final = (96, 128, 256)  # with a softcap
MAX_GROUP: Final = 64  # heads a KV head

# Latent attention. On a CPU any multiples of LATENT_STEP will do, a card has kernels for one size.
LATENT_STEP: Final = 8
MAX_LATENT_SIZE: Final = 1024
MAX_LATENT_ROPE_DIM: Final = 256
CUDA_LATENT_SIZES: Final = (512, 64)  # of the latent and of what is rotated

# Mixtures of experts. On a CPU any widths will do, a card reads rows in vectors of EXPERTS_STEP.
EXPERTS_STEP: Final = 8
FP8_EXPERTS_STEP: Final = 16  # of 8-bit floats
MAX_EXPERTS: Final = 512
MAX_TOP_EXPERTS: Final = 32  # that a token goes to
MAX_EXPERT_GROUPS: Final = 32

# Sampling.
MAX_BAD_WORDS: Final = 128
MAX_VOCAB_SIZE: Final = 2**19
TOP_LOGPROBS: Final = 20  # most likely tokens that are told of a row, whatever was asked
MAX_LOGIT_BIAS: Final = 300  # entries of a sequence, all of them in its slot's row
MAX_STOP_TOKEN_IDS: Final = 64  # likewise
