"""Experiments with an LLM: sweeps, the logit lens, gradients.

Owns: what an LLM has to generate or capture for an experiment.
Does not know: how results are computed, tabulated and drawn (research/).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxinfer.api.arguments import as_prompts
from jaxinfer.config.validation import require_int
from jaxinfer.research.gradients import LogprobFunction, make_logprob_fn
from jaxinfer.research.logit_lens import Lens, LogitLens, look
from jaxinfer.research.sweep import Reduction, check_reductions, rows_of, settings_of
from jaxinfer.research.table import Table
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.text.preparation import Prompt

if TYPE_CHECKING:
    from jaxinfer.api.llm import LLM


def sweep(
    llm: LLM,
    prompts: Prompt | Sequence[Prompt],
    fields: Mapping[str, Any],
    *,
    reductions: Mapping[str, Reduction],
    use_tqdm: bool,
) -> Table:
    """See LLM.sweep."""
    prompt_list, _ = as_prompts(prompts)
    check_reductions(reductions, llm.sites, list(fields))
    settings, axes = settings_of(fields, capture=[site for site, _ in reductions.values()])
    pairs = [(prompt, setting) for setting in settings for prompt in prompt_list]
    asked = [setting.params for _, setting in pairs]
    outputs: Any = llm.generate([prompt for prompt, _ in pairs], asked, use_tqdm=use_tqdm)
    rows = [
        row
        for output, (_, setting) in zip(outputs, pairs, strict=True)
        for row in rows_of(output, setting.shown, reductions)
    ]
    varied = [name for name in axes if name != "seed"] or axes
    return Table(rows, axes=[*varied, "prompt"], value="mean_logprob")


def logit_lens(llm: LLM, prompt: Prompt, *, layers: Sequence[int] | None, num_top: int) -> LogitLens:
    """See LLM.logit_lens."""
    config = llm.model_config
    llm.prepare(prompt)  # refuses lists of prompts
    if layers is not None and not hasattr(layers, "__iter__"):
        raise TypeError(f"layers must be a sequence of layer numbers, got {layers!r}")
    chosen = tuple(range(config.num_layers) if layers is None else layers)
    for layer in chosen:
        require_int("layers entry", layer, 0, config.num_layers - 1)
    if not chosen:
        raise ValueError("layers must name at least one layer, got none")
    num_top = require_int("num_top", num_top, 1, config.vocab_size)
    lens = Lens(llm.decoder, config)
    sites = {layer: f"layers.{layer}.residual" for layer in chosen}
    params = SamplingParams(temperature=0.0, max_tokens=0, capture=list(sites.values()), capture_tokens="prompt")
    output = llm.generate(prompt, params)
    captures = output.captures or {}
    tokenizer = llm.tokenizer
    return look(
        lens,
        {layer: captures[site] for layer, site in sites.items()},
        output.prompt_token_ids,
        num_top=num_top,
        text_of=str if tokenizer is None else tokenizer.token_text,
    )


def logprob_fn(llm: LLM) -> LogprobFunction:
    """A function that gives the log-probabilities of texts under given weights, for jax.grad, jax.jvp and jax.jit.

    It computes what the engine does, in the same dtype and on the same mesh, so that it equals what the sampler saw as
    far as rounding allows, but keeps no pages and takes whole texts. With it, the weights that serve can be trained:

      logprobs = jaxinfer.logprob_fn(llm)
      loss = lambda weights: -logprobs(weights, tokens).mean()
      gradients = jax.grad(loss)(llm.params)
      llm.update_weights(jax.tree.map(lambda w, g: w - 1e-3 * g, llm.params, gradients))

    Args:
      llm: gives model, mesh and layout; the function does not keep its weights.

    Returns:
      (weights, tokens) -> float32[R, L - 1]. weights: a tree like llm.params. tokens: int32[R, L], R texts of L tokens,
      2 <= L <= max_model_len + 1; pad shorter texts on the right and ignore what comes out for the padding. The
      log-probability of tokens[:, i + 1], given those in front of it, before any temperature, is in column i. The
      gradient for the layers that only pad pipeline stages is zero.

    Raises:
      ValueError: several processes hold the model, or shards outnumber its kv heads: the copies of a head would be
        trained apart. The function raises it for other shapes of tokens.
    """
    return make_logprob_fn(llm.decoder, llm.model_config, max_len=llm.max_model_len + 1)
