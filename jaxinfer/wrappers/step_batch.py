"""What the engine gives a wrapper for one step, as numpy arrays.

Owns: the arrays of a step, the edits of its logits among them.
Does not know: jax, requests, queues.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt32

from jaxinfer.wrappers.step_shapes import PREFILL_BLOCK, StepShape, StepShapes
from jaxinfer.wrappers.step_taps import StepTaps

SAMPLING_FIELDS = 6
"""int32 words of a slot's sampling numbers: temperature, top_p, min_p (float32 bits), top_k, seed low, seed high."""
NO_TARGET = -1


class SamplerVariant(enum.Enum):
    """Which compiled sampler a batch needs: GREEDY for rows of temperature 0 alone, UNFILTERED for rows without top_k,
    top_p or min_p, CANDIDATES where all random rows have such a filter, FULL for any rows. A later one can do all that
    an earlier one can."""

    GREEDY = "greedy"
    UNFILTERED = "unfiltered"
    CANDIDATES = "candidates"
    FULL = "full"


@dataclass(frozen=True, kw_only=True)
class SlotEdits:
    """The logit edits of E sequences whose first token since admission is sampled, as J entries.

    Args:
      slots: int32[E], the slots of the sequences.
      is_edited: bool[E], False for a sequence without edits, whose slot has to lose those of an earlier sequence.
      bias_of_others: float32[E], bias of the tokens without a BIAS entry; -inf allows only tokens that have one.
      penalties: float32[E, 3], repetition, presence, frequency.
      min_position: int32[E], first position in the text, the prompt included, at which a stop token may come.
      num_entries: int32[E], how many entries each sequence has; those of the first come first.
      kinds, token_ids, values: int32[J], int32[J], float32[J], as in logit_edits.EditEntries.
    """

    slots: Int32[np.ndarray, " E"]
    is_edited: Bool[np.ndarray, " E"]
    bias_of_others: Float32[np.ndarray, " E"]
    penalties: Float32[np.ndarray, "E 3"]
    min_position: Int32[np.ndarray, " E"]
    num_entries: Int32[np.ndarray, " E"]
    kinds: Int32[np.ndarray, " J"]
    token_ids: Int32[np.ndarray, " J"]
    values: Float32[np.ndarray, " J"]

    @classmethod
    def none(cls) -> SlotEdits:
        """The edits of no sequence."""
        integers, floats = np.zeros(0, np.int32), np.zeros(0, np.float32)
        return cls(
            slots=integers,
            is_edited=np.zeros(0, bool),
            bias_of_others=floats,
            penalties=np.zeros((0, 3), np.float32),
            min_position=integers,
            num_entries=integers,
            kinds=integers,
            token_ids=integers,
            values=floats,
        )


@dataclass(frozen=True, kw_only=True)
class AllowedTokens:
    """The tokens that constraints allow next, for the J slots that have a constraint.

    Args:
      slots: int32[J].
      words: uint32[J, ceil(V / 32)], a bit per token: token t is allowed if bit t % 32 of word t // 32 is 1.
    """

    slots: Int32[np.ndarray, " J"]
    words: UInt32[np.ndarray, "J K"]

    @classmethod
    def none(cls) -> AllowedTokens:
        """No slot has a constraint."""
        return cls(slots=np.zeros(0, np.int32), words=np.zeros((0, 0), np.uint32))


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """All that a wrapper is told of one step, as arrays that could be sent elsewhere; padded to the step's shape.

    A padding row names the dump slot and has length 0. The wrapper keeps every slot's last token, length, page table
    and sampling numbers; a step brings only what changes.

    Args:
      shape: the shape of the arrays below.
      dump_slot: the last slot, which no sequence has.
      decode_slots: int32[R], slot of each decode row.
      decode_page_index, decode_page_id: int32[R], page table entry to set before the step, and the page to put there;
        index W (the width of the table) sets none.
      chunk_slots: int32[N], slot of each chunk of the prefill segment.
      chunk_pages: int32[N, W], the slot's whole page table.
      chunk_sampling: int32[N, SAMPLING_FIELDS], the slot's sampling numbers.
      prefill_slots: int32[P], slot of each prefill row; rows of one chunk follow each other.
      prefill_start, prefill_len: int32[P], position of the row's first token, and how many of its Q tokens are no
        padding.
      prefill_tokens: int32[P, Q], Q = PREFILL_BLOCK whatever the shape.
      logit_index: int32[M], the token after which each logit row samples: r is decode row r, max_decode + p * Q + q is
        token q of prefill row p.
      logit_slots: int32[M], the slot whose sampling numbers apply; the dump slot for padding.
      logit_feeds: bool[M], whether the sampled token becomes its slot's last token.
      page_copies: int32[n, 2], source and destination pages, copied before anything is written.
      variant: the sampler to run.
      num_top: how many of the most likely tokens to report at each logit row, beside the sampled one; None reports no
        log-probabilities at all.
      targets: int32[P, Q], the token whose log-probability is wanted after each prefill token, NO_TARGET for none;
        None if the step scores no prompt.
      edited: whether any sampled row has logit edits or a constraint.
      edits: the edits of the sequences whose first token since admission is sampled in this step.
      allowed: the allowed tokens of constrained slots in the step that is sampled with this launch. With one stage that
        is this step; in a pipeline it is the one that leaves when this one enters.
      taps: what the step captures and changes at the sites of the model; None for nothing.
    """

    shape: StepShape
    dump_slot: int
    decode_slots: Int32[np.ndarray, " R"]
    decode_page_index: Int32[np.ndarray, " R"]
    decode_page_id: Int32[np.ndarray, " R"]
    chunk_slots: Int32[np.ndarray, " N"]
    chunk_pages: Int32[np.ndarray, "N W"]
    chunk_sampling: Int32[np.ndarray, "N F"]
    prefill_slots: Int32[np.ndarray, " P"]
    prefill_start: Int32[np.ndarray, " P"]
    prefill_len: Int32[np.ndarray, " P"]
    prefill_tokens: Int32[np.ndarray, "P Q"]
    logit_index: Int32[np.ndarray, " M"]
    logit_slots: Int32[np.ndarray, " M"]
    logit_feeds: Bool[np.ndarray, " M"]
    page_copies: Int32[np.ndarray, "J 2"]
    variant: SamplerVariant
    num_top: int | None = None
    targets: Int32[np.ndarray, "P Q"] | None = None
    edited: bool = False
    edits: SlotEdits = field(default_factory=SlotEdits.none)
    allowed: AllowedTokens = field(default_factory=AllowedTokens.none)
    taps: StepTaps | None = None

    @property
    def num_live_rows(self) -> int:
        """Rows of both segments, without padding."""
        return int((self.decode_slots != self.dump_slot).sum() + (self.prefill_slots != self.dump_slot).sum())

    @property
    def has_logits(self) -> bool:
        """Whether the step samples any token."""
        return bool((self.logit_slots != self.dump_slot).any())

    @classmethod
    def idle(cls, shapes: StepShapes) -> StepBatch:
        """A step without work, which moves the steps in a pipeline on by one stage."""
        shape = shapes.shape(num_decode=0, num_prefill=0, num_logits=0)
        num_chunks = shapes.num_chunks(shape)

        def full(*dims: int, value: int = 0) -> np.ndarray:
            return np.full(dims, value, np.int32)

        return cls(
            shape=shape,
            dump_slot=shapes.num_slots,
            decode_slots=full(shape.num_decode, value=shapes.num_slots),
            decode_page_index=full(shape.num_decode, value=shapes.table_width),
            decode_page_id=full(shape.num_decode),
            chunk_slots=full(num_chunks, value=shapes.num_slots),
            chunk_pages=full(num_chunks, shapes.table_width),
            chunk_sampling=full(num_chunks, SAMPLING_FIELDS),
            prefill_slots=full(shape.num_prefill, value=shapes.num_slots),
            prefill_start=full(shape.num_prefill),
            prefill_len=full(shape.num_prefill),
            prefill_tokens=full(shape.num_prefill, PREFILL_BLOCK),
            logit_index=full(shape.num_logits),
            logit_slots=full(shape.num_logits, value=shapes.num_slots),
            logit_feeds=np.zeros(shape.num_logits, bool),
            page_copies=full(0, 2),
            variant=SamplerVariant.GREEDY,
        )


def pack_sampling(*, temperature: float, top_k: int, top_p: float, min_p: float, seed: int) -> Int32[np.ndarray, " F"]:
    """A slot's sampling numbers as int32 words.

    A top_k too large for an int32 becomes the largest one: both exceed every vocabulary, so neither filters anything.
    """
    floats = np.array([temperature, top_p, min_p], np.float32).view(np.int32)
    top_k = min(max(top_k, 0), np.iinfo(np.int32).max)
    integers = np.array([top_k, seed & 0xFFFFFFFF, seed >> 32], np.int64).astype(np.uint32).view(np.int32)
    return np.concatenate([floats, integers])
