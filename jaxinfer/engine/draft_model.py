"""Speculative decoding with drafts by a small model.

Owns: how far the small model has computed each sequence, and the steps in which it samples drafts.
Does not know: devices, how drafts are verified. Never imports jax.

The small model's wrapper uses the same slots and page ids as the large one's. What the large model computes of a
prompt, the small one computes too, so that shared and cached pages hold the keys of both.

The small model samples with each request's own sampling numbers, seed and positions. Both models thus add the same
noise and choose the same token more often than with independent samples. Where keys of the small model are missing (in
the part of a text that was generated without drafts), its drafts are worse; the output stays the same.

Source: Leviathan et al. 2023, "Fast inference from transformers via speculative decoding", for drafts by a small model;
Daliri et al. 2024, "Coupling without communication and drafter-invariant speculative decoding", for the shared noise
in place of rejection sampling.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxinfer.config.attention_span import AttentionSpan
from jaxinfer.engine.batch import make_batch
from jaxinfer.engine.schedule import DecodeRow, PrefillChunk, Schedule
from jaxinfer.engine.sequence import SequenceState
from jaxinfer.wrappers.abstract_model_inference_wrapper import AbstractModelInferenceWrapper
from jaxinfer.wrappers.step_batch import StepBatch
from jaxinfer.wrappers.step_shapes import PREFILL_BLOCK

MAX_UNREAD = 8
"""Launches that may wait to be read, at most; with an unbounded queue, processes that share a mesh would deadlock."""
_UNDRAFTED = 0


class DraftModel:
    """A Drafter that proposes what a small model samples.

    Args:
      wrapper: the wrapper of the small model, with the same shapes and number of pages as the large one's.
      num_tokens: tokens to propose at a time, at most.
    """

    def __init__(self, wrapper: AbstractModelInferenceWrapper, num_tokens: int):
        self._wrapper = wrapper
        self._num_tokens = num_tokens
        self._num_computed: weakref.WeakKeyDictionary[SequenceState, int] = weakref.WeakKeyDictionary()

    @property
    def span(self) -> AttentionSpan:
        """What the small model sees; it may go back by one prefill row to tokens that it has not computed."""
        window = self._wrapper.span.window
        return dataclasses.replace(self._wrapper.span, window=None if window is None else window + PREFILL_BLOCK)

    def plan(self, sequence: SequenceState, most: int) -> Sequence[int]:
        """Placeholders for drafts, as many as may be proposed; see Drafter.plan."""
        return [_UNDRAFTED] * min(most, self._num_tokens)

    def complete(self, schedule: Schedule) -> Schedule:
        """Computes the prompts of a schedule, then samples its drafts; see Drafter.complete."""
        self._compute_prompts(schedule)
        wanted = [chunk for chunk in schedule.prefills if chunk.drafts]
        drafts = iter(self._propose(wanted))
        chunks = tuple(
            dataclasses.replace(chunk, token_ids=[chunk.token_ids[0], *next(drafts)]) if chunk.drafts else chunk
            for chunk in schedule.prefills
        )
        return dataclasses.replace(schedule, prefills=chunks)

    def _compute_prompts(self, schedule: Schedule) -> None:
        known = [chunk for chunk in schedule.prefills if not chunk.drafts]
        for chunk in known:
            self._num_computed[chunk.sequence] = chunk.start + len(chunk.token_ids)
        if known:
            chunks = tuple(dataclasses.replace(chunk, num_sampled=0, scored=range(0)) for chunk in known)
            self._launch(Schedule((), chunks, schedule.page_copies))

    def _propose(self, wanted: Sequence[PrefillChunk]) -> list[list[int]]:
        """The drafts of each chunk.

        The first step computes the known tokens that the small model lacks and samples one draft for each chunk. Every
        further step decodes one more; the last draft, its input, is on the device already.
        """
        unread: deque[Any] = deque()
        read: list[np.ndarray] = []
        most = max((len(chunk.drafts) for chunk in wanted), default=0)
        for number in range(most):
            going_on = [chunk for chunk in wanted if len(chunk.drafts) > number]
            rows = tuple(DecodeRow(chunk.sequence, chunk.slot, None, chunk.start + number) for chunk in going_on)
            step = Schedule(rows, ()) if number else Schedule((), tuple(map(self._missing, going_on)))
            unread.append(self._launch(step))
            if len(unread) > MAX_UNREAD:
                read.append(self._wrapper.collect(unread.popleft()).token_ids)
        read += [self._wrapper.collect(handle).token_ids for handle in unread]
        drafts: list[list[int]] = [[] for _ in wanted]
        for number, tokens in enumerate(read):
            going_on = [entry for entry, chunk in zip(drafts, wanted, strict=True) if len(chunk.drafts) > number]
            for entry, token_id in zip(going_on, tokens, strict=False):  # the tokens of padding rows follow
                entry.append(int(token_id))
        return drafts

    def _missing(self, chunk: PrefillChunk) -> PrefillChunk:
        """A chunk of the known tokens that the small model has not computed: the last ones, one prefill row at most."""
        sequence, end = chunk.sequence, chunk.start + 1
        start = max(min(self._num_computed.get(sequence, chunk.start), chunk.start), end - PREFILL_BLOCK)
        self._num_computed[sequence] = chunk.start + len(chunk.drafts)
        return dataclasses.replace(chunk, start=start, token_ids=sequence.token_ids[start:end], num_sampled=1)

    def _launch(self, schedule: Schedule) -> Any:
        """Launches a step, and idle ones after it until it has left the pipeline."""
        shapes = self._wrapper.shapes
        handle = self._wrapper.launch(dataclasses.replace(make_batch(schedule, shapes), num_top=None))
        for _ in range(shapes.num_stages - 1):
            self._wrapper.launch(StepBatch.idle(shapes))
        return handle
