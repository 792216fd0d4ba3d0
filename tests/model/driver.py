"""Runs a Decoder by hand: block tables, slots and contexts as the engine would make them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch

from pyserve.model.activations import Arena
from pyserve.model.context import AdapterRows, ForwardContext
from pyserve.model.decoder import Decoder

BLOCK_SIZE = 16


class Driver:
    """Sequences of at most `max_len` tokens each; their blocks are scattered over the cache."""

    def __init__(self, decoder: Decoder, num_seqs: int = 1, max_len: int = 256) -> None:
        self.decoder = decoder
        blocks_per_seq = -(-max_len // BLOCK_SIZE)
        blocks = list(range(num_seqs * blocks_per_seq + 3))
        random.Random(0).shuffle(blocks)
        self._table = torch.tensor(blocks[: num_seqs * blocks_per_seq], dtype=torch.int32)
        self._table = self._table.view(num_seqs, blocks_per_seq)
        self.kv_caches = []
        for spec in decoder.kv_specs():
            cache = spec.allocate(len(blocks), BLOCK_SIZE, torch.device("cpu"))
            for tensor in cache:
                tensor.fill_(float("nan"))  # what nobody wrote must not be read
            self.kv_caches.append(cache)
        self._lens = [0] * num_seqs

    def step(
        self, new_tokens: Mapping[int, Sequence[int]], num_padding: int = 0,
        adapter_starts: Sequence[int] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Append tokens to sequences, by number; logits [num_tokens, vocab_size] in that order.
        `num_padding` tokens and rows follow. adapter_starts as in ops/lora.py."""
        ids: list[int] = []
        positions: list[int] = []
        slots, seq_lens, starts = [], [], [0]
        for seq, tokens in new_tokens.items():
            begin = self._lens[seq]
            self._lens[seq] += len(tokens)
            ids += tokens
            positions += range(begin, begin + len(tokens))
            seq_lens.append(self._lens[seq])
            starts.append(len(ids))
            row = self._table[seq].tolist()
            slots += [
                row[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
                for position in range(begin, begin + len(tokens))
            ]
        rows = list(new_tokens) + [-1] * num_padding
        starts += [len(ids)] * num_padding
        seq_lens += [0] * num_padding
        ids += [0] * num_padding
        positions += [0] * num_padding
        slots += [-1] * num_padding
        activations = self.decoder.activations(self._arena(len(ids)), len(ids))
        adapters = None
        if adapter_starts is not None:
            starts_of_slots = torch.tensor(adapter_starts, dtype=torch.int32)
            adapters = AdapterRows(starts_of_slots, activations.shrunk)
        context = ForwardContext(
            input_ids=torch.tensor(ids, dtype=torch.int32),
            positions=torch.tensor(positions, dtype=torch.int32),
            slot_mapping=torch.tensor(slots, dtype=torch.int64),
            row_slots=torch.tensor(rows, dtype=torch.int32),
            cu_seqlens_q=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
            block_table=self._table,
            kv_caches=self.kv_caches,
            max_query_len=len(ids),
            attention_plans={},
            activations=activations,
            adapters=adapters,
        )
        logits = torch.empty(len(ids), self.decoder.config.vocab_size, dtype=self.decoder.dtype)
        num_parts = self.decoder.num_logit_parts(len(ids))
        parts = torch.empty(num_parts, dtype=self.decoder.dtype) if num_parts else None
        with torch.inference_mode():
            self.decoder.compute_logits(self.decoder.forward(context), logits, parts)
        return logits

    def _arena(self, num_tokens: int) -> Arena:
        """Memory that holds NaN, whatever is cut from it."""
        endless = Arena.endless()
        self.decoder.activations(endless, num_tokens)
        return Arena(torch.full((endless.num_bytes,), 0xFF, dtype=torch.uint8))
