"""A wrapper whose "keys" are the token ids themselves: its log-probabilities are a hash of what the slot's pages hold,
as far as the engine's settings let a token see.

Any page that is shared, evicted, copied or addressed wrongly changes the tokens, so that comparing with the plain
functions `continuation` and `logprobs` checks the whole host side without a device. Pages that the engine has taken and
not yet written hold no text, pages without an owner are not read, and those with more than one not written.
"""

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxinfer.config.attention_span import WHOLE_TEXT, AttentionSpan
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.engine.page_allocator import PageAllocator
from jaxinfer.request import MAX_LOGPROBS, Request
from jaxinfer.wrappers.abstract_model_inference_wrapper import AbstractModelInferenceWrapper
from jaxinfer.wrappers.chains import ChainRule
from jaxinfer.wrappers.in_flight import InFlight, StepHandle
from jaxinfer.wrappers.step_batch import NO_TARGET, SAMPLING_FIELDS, AllowedTokens, StepBatch
from jaxinfer.wrappers.step_result import LogprobArrays, StepResult
from jaxinfer.wrappers.step_shapes import PREFILL_BLOCK, StepShapes

VOCAB_SIZE = 97
UNKNOWN = -1


def logprobs(token_ids: Sequence[int]) -> np.ndarray:
    """Log-probabilities float64[V] of the token behind a text."""
    digest = hashlib.shake_128(np.asarray(token_ids, np.int64).tobytes()).digest(4 * VOCAB_SIZE)
    logits = np.frombuffer(digest, np.uint32) / 2**29
    return logits - np.log(np.exp(logits).sum())


def next_token(token_ids: Sequence[int], seed: int = 0, allowed: np.ndarray | None = None) -> int:
    """The most likely one of those allowed; a seed other than 0 changes what is likely."""
    values = logprobs([-seed, *token_ids] if seed else token_ids)
    return int((values if allowed is None else np.where(allowed, values, -np.inf)).argmax())


def seen(token_ids: Sequence[int], span: AttentionSpan) -> list[int]:
    """What the last one of these tokens sees."""
    first = 0 if span.window is None else max(len(token_ids) - span.window, 0)
    return [token_id for place, token_id in enumerate(token_ids) if place >= first or place < span.sink_tokens]


def continuation(
    prompt: Sequence[int],
    max_tokens: int,
    stop: frozenset[int] = frozenset(),
    *,
    seed: int = 0,
    span: AttentionSpan = WHOLE_TEXT,
) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(seen(tokens, span), seed))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


def text_of(request: Request, max_model_len: int, span: AttentionSpan = WHOLE_TEXT) -> list[int]:
    """What a request without the engine gets, one token after the other."""
    prompt, seed = request.prompt_token_ids, request.seed if request.top_k else 0
    most = min(request.max_tokens, max_model_len - len(prompt))
    if request.constraint is None:
        return continuation(prompt, most, request.stop_token_ids, seed=seed, span=span)
    state, tokens = request.constraint.start(), list(prompt)
    while len(tokens) < len(prompt) + most:
        tokens.append(next_token(seen(tokens, span), seed, unpacked(state.allowed())))
        state.advance(tokens[-1])
        if tokens[-1] in request.stop_token_ids or state.is_complete or not state.allowed().any():
            break
    return tokens[len(prompt) :]


def unpacked(words: np.ndarray) -> np.ndarray:
    """bool[V] of a packed mask."""
    return np.unpackbits(words.astype("<u4").view(np.uint8), bitorder="little")[:VOCAB_SIZE].astype(bool)


@dataclass(eq=False)
class FakeStep:
    """A launched step: what each live logit row sees, by row, and what comes of it."""

    batch: StepBatch
    texts: dict[int, list[int]]
    seeds: dict[int, int]
    scores: LogprobArrays | None
    result: StepResult | None = None


class FakeWrapper(AbstractModelInferenceWrapper):
    """With a pipeline of S stages, a batch's tokens are known S - 1 launches after its own."""

    def __init__(self, config: EngineConfig, *, max_model_len: int):
        self._shapes = StepShapes(config, max_model_len=max_model_len)
        self._num_pages = config.num_kv_pages
        self._page_size = config.page_size
        self._span = config.span
        self.pages = np.full((self._num_pages + 1, self._page_size), UNKNOWN)
        slots, width = config.max_num_seqs + 1, self._shapes.table_width
        self.last_token = np.zeros(slots, int)
        self.length = np.zeros(slots, int)
        self.table = np.zeros((slots, width), int)
        self.sampling = np.zeros((slots, SAMPLING_FIELDS), np.int32)
        self.in_pipeline: deque[FakeStep] = deque()
        self.through: deque[FakeStep] = deque()
        self.num_pending = self.max_pending = 0
        self.max_pages_used = 0
        self.batches: list[StepBatch] = []
        self._taken: set[int] = set()
        self._knows_owners = True
        self.masks: list[AllowedTokens] = []
        self._in_flight = InFlight(self._shapes)
        self.rule = ChainRule.of(config, platform="cpu", weight_bytes=0)
        self.chains: list[int] = []

    shapes = property(lambda self: self._shapes)
    num_pages = property(lambda self: self._num_pages)
    span = property(lambda self: self._span)
    row_usage = property(lambda self: self._in_flight.usage)
    num_compilations = property(lambda self: 0)

    def watch(self, allocator: PageAllocator) -> None:
        """Learns whose pages are whose, and which are taken; these are emptied by the first step that has them."""
        self._allocator, allocate = allocator, allocator.allocate

        def allocate_watched(count: int) -> list[int]:
            pages = allocate(count)
            self._taken.update(pages)
            return pages

        allocator.allocate = allocate_watched

    def launch(self, batch: StepBatch) -> FakeStep:
        self.batches.append(batch)
        self.masks.append(batch.allowed)
        self.max_pages_used = max(self.max_pages_used, self._allocator.num_used)
        self._in_flight.count_rows(self._in_flight.enter(StepHandle(batch)))
        taken = self._taken & {*batch.decode_page_id.tolist(), *batch.chunk_pages.ravel().tolist()}
        self._taken -= taken
        self.pages[list(taken)] = UNKNOWN
        for source, destination in batch.page_copies:
            assert self._owners(source) and self._owners(destination) == 1
            self.pages[destination] = self.pages[source]
        where = self._decode(batch) | self._prefill(batch)
        texts, seeds = {}, {}
        for row, slot in enumerate(batch.logit_slots):
            if slot != batch.dump_slot:
                owner, position = where[batch.logit_index[row]]
                assert owner == slot
                texts[row], seeds[row] = self._read(slot, position + 1), self._seed(slot)
                if batch.logit_feeds[row]:
                    self.last_token[slot] = UNKNOWN
        step = FakeStep(batch, texts, seeds, None if batch.targets is None else self._scores(batch))
        self.in_pipeline.append(step)
        if len(self.in_pipeline) == self._shapes.num_stages:
            self._leave(self.in_pipeline.popleft(), batch.allowed)
        else:
            assert not len(batch.allowed.slots)
        self.num_pending += 1
        self.max_pending = max(self.max_pending, self.num_pending)
        return step

    def chain_len(self, batch: StepBatch) -> int:
        return self.rule.chain_len(batch)

    def launch_chain(self, batches: Sequence[StepBatch]) -> list[FakeStep]:
        assert {self.chain_len(batch) for batch in batches} == {len(batches)} != {1}
        assert all(batches[0].shape.holds(batch.shape) for batch in batches)
        self.chains.append(len(batches))
        self._knows_owners = False  # the whole chain is scheduled, so its last steps may have given pages back
        handles = super().launch_chain(batches)
        self._knows_owners = True
        return handles

    def collect(self, handle: FakeStep) -> StepResult:
        while (step := self.through.popleft()) is not handle:
            assert not step.texts, "a step that sampled was left out"
            self.num_pending -= 1
        self.num_pending -= 1
        return handle.result

    def warmup(self, *, background: bool = False) -> None:
        pass

    def close(self) -> None:
        pass

    def _decode(self, batch: StepBatch) -> dict[int, tuple[int, int]]:
        """Takes the decode rows in; logit index -> slot and position of its token."""
        where = {}
        for row, slot in enumerate(batch.decode_slots):
            if slot == batch.dump_slot:
                continue
            if batch.decode_page_index[row] < self.table.shape[1]:
                self.table[slot, batch.decode_page_index[row]] = batch.decode_page_id[row]
            assert self.last_token[slot] != UNKNOWN, "a token was decoded before it left the pipeline"
            self._write(slot, self.length[slot], self.last_token[slot])
            where[row] = (slot, self.length[slot])
            self.length[slot] += 1
        return where

    def _prefill(self, batch: StepBatch) -> dict[int, tuple[int, int]]:
        """As _decode, for the prefill rows."""
        self.table[batch.chunk_slots] = batch.chunk_pages
        self.sampling[batch.chunk_slots] = batch.chunk_sampling
        where = {}
        for row, slot in enumerate(batch.prefill_slots):
            if slot == batch.dump_slot:
                continue
            start, length = batch.prefill_start[row], batch.prefill_len[row]
            for offset in range(length):
                self._write(slot, start + offset, batch.prefill_tokens[row, offset])
                where[self._shapes.max_decode + row * PREFILL_BLOCK + offset] = (slot, start + offset)
            self.length[slot] = start + length
        return where

    def _scores(self, batch: StepBatch) -> LogprobArrays:
        texts = [
            self._read(slot, start + offset + 1) if target != NO_TARGET else []
            for slot, start, targets in zip(batch.prefill_slots, batch.prefill_start, batch.targets, strict=True)
            for offset, target in enumerate(targets)
        ]
        return score(texts, batch.targets.ravel(), MAX_LOGPROBS)

    def _leave(self, step: FakeStep, allowed: AllowedTokens) -> None:
        batch = step.batch
        masks = dict(zip(allowed.slots.tolist(), map(unpacked, allowed.words), strict=True))
        assert batch.edited or not masks
        assert masks.keys() <= set(batch.logit_slots.tolist())
        tokens = np.zeros(batch.shape.num_logits, np.int32)
        for row, text in step.texts.items():
            tokens[row] = next_token(text, step.seeds[row], masks.get(batch.logit_slots[row]))
        self.last_token[batch.logit_slots[batch.logit_feeds]] = tokens[batch.logit_feeds]
        found = None
        if batch.num_top is not None and step.texts:
            found = score([step.texts.get(row, []) for row in range(len(tokens))], tokens, batch.num_top)
        step.result = StepResult(token_ids=tokens, logprobs=found, scores=step.scores)
        self.through.append(step)

    def _write(self, slot: int, position: int, token_id: int) -> None:
        page = self.table[slot, position // self._page_size]
        assert page != 0, "a live token was written to the dump page"
        assert not self._knows_owners or self._owners(page) == 1, "a page that is free or shared was written"
        self.pages[page, position % self._page_size] = token_id

    def _read(self, slot: int, length: int) -> list[int]:
        positions = np.array(seen(range(length), self._span))
        pages = self.table[slot, positions // self._page_size]
        assert not self._knows_owners or all(map(self._owners, set(pages.tolist()))), "a free page was read"
        text = self.pages[pages, positions % self._page_size].tolist()
        assert UNKNOWN not in text, "a position was read that nobody wrote"
        return text

    def _owners(self, page: int) -> int:
        return self._allocator._owners[page]

    def _seed(self, slot: int) -> int:
        """Only top_k lets a seed count, so that tests that do not care compare with the plain continuation."""
        *_, top_k, low, high = self.sampling[slot].view(np.uint32).tolist()
        return low | high << 32 if top_k else 0


def score(texts: Sequence[Sequence[int]], token_ids: np.ndarray, num_top: int) -> LogprobArrays:
    """What the model says of the tokens behind texts; zeros behind an empty one."""
    values = np.stack([logprobs(text) if text else np.zeros(VOCAB_SIZE) for text in texts])
    chosen = np.take_along_axis(values, np.maximum(token_ids, 0)[:, None], axis=1)
    top = np.argsort(-values, axis=1, kind="stable")[:, :num_top]
    return LogprobArrays(
        logprob=chosen[:, 0],
        rank=1 + (values > chosen).sum(1).astype(np.int32),
        top_ids=top.astype(np.int32),
        top_logprobs=np.take_along_axis(values, top, axis=1),
    )
