"""The sampling half of a step, for one shard: from hidden states to tokens and their log-probabilities.

Owns: the head, which sampler runs, the columns of the results.
Does not know: how programs are compiled, how a sampler works, requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinfer.interventions import HookKind, HookTable
from jaxinfer.layers.embedding import VocabularyEmbedding
from jaxinfer.sampling import logit_edits, sampling
from jaxinfer.sampling.logit_edits import EditState
from jaxinfer.sampling.sampling import SamplingNumbers
from jaxinfer.sampling.user_functions import LogitsHooks
from jaxinfer.wrappers.decode_state import DecodeState
from jaxinfer.wrappers.pipeline import LogitRows
from jaxinfer.wrappers.step_batch import SamplerVariant

SCORE_BLOCK = 256
"""Rows of logits that exist at a time, at most, while prompts are scored."""
_SAMPLERS = {
    SamplerVariant.UNFILTERED: sampling.sample_unfiltered,
    SamplerVariant.CANDIDATES: sampling.sample_candidates,
    SamplerVariant.FULL: sampling.sample_full,
}


@dataclass(frozen=True, kw_only=True)
class FunctionsOfLogits:
    """The user's processors and samplers in a step.

    Args:
      kinds: the functions, in the order in which they are called.
      tables: the parameters of each.
      rows: int32[I, M], row of each logit row in the table of each function, or 0.
    """

    kinds: Sequence[HookKind]
    tables: Sequence[HookTable]
    rows: Int[Array, "I M"]

    def hooks(self, edits: EditState, rows: LogitRows, numbers: SamplingNumbers, backend: str) -> LogitsHooks:
        """The functions for the rows of a step."""
        return LogitsHooks(
            self.kinds,
            self.tables,
            self.rows,
            position=rows.position,
            output_counts=edits.output_count[rows.slot],
            seed=numbers.seed,
            backend=backend,
        )


def sample_step(
    head: VocabularyEmbedding,
    state: DecodeState,
    edits: EditState | None,
    hidden: Float[Array, "M D"],
    rows: LogitRows,
    *,
    variant: SamplerVariant,
    num_top: int | None,
    functions: FunctionsOfLogits | None = None,
) -> tuple[DecodeState, EditState | None, Int[Array, "M J"]]:
    """The sampling half of a step, for one shard.

    Args:
      head: gives the logits of hidden states; holds this device's slice of the vocabulary.
      state: the decode state of all slots.
      edits: the logit edits of all slots; None for a step without edited rows.
      hidden, rows: what the forward half returned.
      variant: which sampler to run.
      num_top: how many of the most likely tokens to report, beside the sampled one, with log-probabilities before any
        edit; None reports no log-probabilities at all.
      functions: the user's processors and samplers; None for none. They need the edits, which count outputs.

    Returns:
      The state with the new last tokens, the edits with the new tokens counted, and int32[M, J]: token ids in the first
      column, followed by the columns of score_step if log-probabilities are reported. With functions the last column
      has, for each row, the number of the first one (from 1) whose result cannot be used, or 0.
    """
    raw = _raw_logits(head, hidden)
    logits = raw if edits is None else logit_edits.edited(raw, edits, rows.slot, rows.position)
    numbers = SamplingNumbers.unpack(rows.sampling)
    hooks = None if functions is None or edits is None else functions.hooks(edits, rows, numbers, head.backend)
    logits = logits if hooks is None else hooks.processed(logits)
    if variant is SamplerVariant.GREEDY:
        tokens = sampling.greedy(logits)
    else:
        tokens = _SAMPLERS[variant](logits, numbers, rows.position, backend=head.backend)
    tokens = tokens if hooks is None else hooks.sampled(logits, tokens)
    beyond = state.last_token.shape[0]  # out of bounds, hence dropped
    fed = jnp.where(rows.feeds == 1, rows.slot, beyond)
    last_token = state.last_token.at[fed].set(tokens, mode="drop")
    state = DecodeState(
        last_token=last_token, length=state.length, page_table=state.page_table, sampling=state.sampling
    )
    if edits is not None:
        edits = logit_edits.count_outputs(edits, rows.slot, tokens, rows.feeds == 1)
    columns = [tokens[:, None]] if num_top is None else [tokens[:, None], _scores(raw, tokens, num_top, head.backend)]
    columns += [] if hooks is None else [hooks.failed[:, None]]
    return state, edits, jnp.concatenate(columns, axis=1)


def score_step(
    head: VocabularyEmbedding, hidden: Float[Array, "T D"], targets: Int[Array, " T"], *, num_top: int
) -> Int[Array, "T J"]:
    """The log-probabilities of given tokens, for one shard; computed in blocks, so that few logits exist at a time.

    Args:
      head: gives the logits of hidden states; holds this device's slice of the vocabulary.
      hidden: hidden states of the tokens in front of the targets.
      targets: int32[T], the tokens to score; the row of a target that is no token id (NO_TARGET) means nothing.
      num_top: how many of the most likely tokens to report as well.

    Returns:
      int32[T, 2 + 2 * num_top], the columns logprob, rank, top ids.., top logprobs.., floats as their bits.
    """
    num_tokens = hidden.shape[0]
    block = math.gcd(num_tokens, SCORE_BLOCK)

    def scored(rows: tuple[Array, Array]) -> Array:
        return _scores(_raw_logits(head, rows[0]), rows[1], num_top, head.backend)

    blocks = lax.map(scored, (hidden.reshape(-1, block, hidden.shape[1]), targets.reshape(-1, block)))
    return blocks.reshape(num_tokens, -1)


def _raw_logits(head: VocabularyEmbedding, hidden: Float[Array, "M D"]) -> Float[Array, "M V"]:
    """The head's logits with NaN replaced by -inf, so that a diverged model cannot crash the engine.

    A NaN is then never the largest, and a row of nothing but NaN yields token 0.
    """
    logits = head.logits(hidden)
    return jnp.where(jnp.isnan(logits), -jnp.inf, logits)


def _scores(logits: Float[Array, "M V"], tokens: Int[Array, " M"], num_top: int, backend: str) -> Int[Array, "M J"]:
    found = sampling.token_logprobs(logits, tokens, num_top=num_top, backend=backend)
    columns = (_bits(found.logprob[:, None]), found.rank[:, None], found.top_ids, _bits(found.top_logprobs))
    return jnp.concatenate(columns, axis=1)


def _bits(x: Float[Array, "M J"]) -> Int[Array, "M J"]:
    return lax.bitcast_convert_type(x, jnp.int32)
