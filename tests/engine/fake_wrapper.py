"""A wrapper whose "keys" are the token ids themselves: the next token is a hash of what the slot's pages hold.

Any page that is shared, evicted, copied or addressed wrongly changes the tokens, so that comparing with the plain
function `continuation` checks the whole host side without a device.
"""

import hashlib
from collections import deque
from collections.abc import Sequence

import numpy as np

from jaxinfer.config import EngineConfig
from jaxinfer.wrappers.abstract_model_inference_wrapper import AbstractModelInferenceWrapper
from jaxinfer.wrappers.in_flight import InFlight, StepHandle
from jaxinfer.wrappers.step_batch import PREFILL_BLOCK, AllowedTokens, StepBatch, StepResult, StepShapes

VOCAB_SIZE = 97
UNKNOWN = -1


def next_token(token_ids: Sequence[int]) -> int:
    digest = hashlib.sha256(np.asarray(token_ids, np.int64).tobytes()).digest()
    return int.from_bytes(digest[:4], "little") % VOCAB_SIZE


def continuation(prompt: Sequence[int], max_tokens: int, stop: frozenset[int] = frozenset()) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


class FakeWrapper(AbstractModelInferenceWrapper):
    """With a pipeline of S stages, a batch's tokens are known S - 1 launches after its own."""

    def __init__(self, config: EngineConfig, *, max_model_len: int):
        self._shapes = StepShapes(config, max_model_len=max_model_len)
        self._num_pages = config.num_kv_pages
        self._page_size = config.page_size
        self.pages = np.full((self._num_pages + 1, self._page_size), -1)
        slots, width = config.max_num_seqs + 1, self._shapes.table_width
        self.last_token = np.zeros(slots, int)
        self.length = np.zeros(slots, int)
        self.table = np.zeros((slots, width), int)
        self.in_pipeline: deque[tuple[StepBatch, np.ndarray]] = deque()
        self.through: deque[np.ndarray] = deque()
        self.num_pending = self.max_pending = 0
        self.batches: list[StepBatch] = []
        self._in_flight = InFlight(self._shapes)

    shapes = property(lambda self: self._shapes)
    num_pages = property(lambda self: self._num_pages)
    row_usage = property(lambda self: self._in_flight.usage)
    num_compilations = property(lambda self: 0)

    def launch(self, batch: StepBatch, allowed: AllowedTokens | None = None) -> np.ndarray:
        self.batches.append(batch)
        self._in_flight.enter(StepHandle(batch))
        for source, destination in batch.page_copies:
            self.pages[destination] = self.pages[source]
        dump = batch.dump_slot
        texts = {}
        for row, slot in enumerate(batch.decode_slots):
            if slot == dump:
                continue
            if batch.decode_page_index[row] < self.table.shape[1]:
                self.table[slot, batch.decode_page_index[row]] = batch.decode_page_id[row]
            assert self.last_token[slot] != UNKNOWN, "a token was decoded before it left the pipeline"
            self._write(self.table[slot], self.length[slot], self.last_token[slot])
            self.length[slot] += 1
            texts[row] = slot
        self.table[batch.chunk_slots] = batch.chunk_pages
        for row, slot in enumerate(batch.prefill_slots):
            if slot == dump:
                continue
            start, length = batch.prefill_start[row], batch.prefill_len[row]
            for offset in range(length):
                self._write(self.table[slot], start + offset, batch.prefill_tokens[row, offset])
            self.length[slot] = start + length
            texts[self._shapes.max_decode + row * PREFILL_BLOCK + length - 1] = slot
        tokens = np.zeros(batch.shape.num_logits, np.int32)
        for row, slot in enumerate(batch.logit_slots):
            if slot != dump:
                assert texts[batch.logit_index[row]] == slot
                tokens[row] = next_token(self._read(slot))
                if batch.logit_feeds[row]:
                    self.last_token[slot] = UNKNOWN
        self.in_pipeline.append((batch, tokens))
        if len(self.in_pipeline) == self._shapes.num_stages:
            self._leave(*self.in_pipeline.popleft())
        self.num_pending += 1
        self.max_pending = max(self.max_pending, self.num_pending)
        return tokens

    def _leave(self, batch: StepBatch, tokens: np.ndarray) -> None:
        self.last_token[batch.logit_slots[batch.logit_feeds]] = tokens[batch.logit_feeds]
        self.through.append(tokens)

    def collect(self, handle: np.ndarray) -> StepResult:
        assert self.through.popleft() is handle
        self.num_pending -= 1
        return StepResult(token_ids=handle, logprobs=None)

    def warmup(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _write(self, table: np.ndarray, position: int, token_id: int) -> None:
        page = table[position // self._page_size]
        assert page != 0, "a live token was written to the dump page"
        self.pages[page, position % self._page_size] = token_id

    def _read(self, slot: int) -> list[int]:
        positions = np.arange(self.length[slot])
        return self.pages[self.table[slot, positions // self._page_size], positions % self._page_size].tolist()
