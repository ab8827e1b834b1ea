"""Makes sites/*.npz: what is inside transformers' models of the checkpoints in mesh/, and what comes of edits there.

Needs torch and transformers, like make.py. Run `python tests/golden/make_sites.py`; a second run writes the same bytes.

A file keeps, for a text of a prompt of 5 tokens and 11 greedy ones:
  prompt, output        int32, the two parts of the text
  at.<site>             float32[15, ...], the values of all tokens but the last one at a site, named as jaxinfer does
and for each of the edits in EDITS, in which some module's input or output is changed by a hook:
  vector                float32[64], what "steer" adds
  edit.<name>           int32[12], the greedy tokens after a prompt of 12 tokens (edit_prompt)
  edit_logprobs.<name>  float32[12], log_softmax of each step at the token it chose
Every step's two best logits are more than 1e-4 apart, and every edit changes the output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from make import HERE, MIN_MARGIN, save_npz
from transformers import AutoModelForCausalLM, PreTrainedModel

FAMILIES = ("llama", "gemma3", "gpt2", "mixtral")
LAYERS = (1, 3)
"""The layers whose blocks are looked into; the residual stream is kept behind every layer."""
PROMPT_LEN, NUM_OUTPUTS = 5, 11
EDIT_PROMPT_LEN, NUM_EDITED = 12, 12

Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(values [T, D], vector) -> values."""


def steer(values: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Adds the vector at the prompt's last token and all behind it."""
    changed = values.clone()
    changed[EDIT_PROMPT_LEN - 1 :] += vector
    return changed


def without_a_head(values: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Sets the result of head 3 of 8 to zero."""
    heads = values.clone().reshape(len(values), 8, -1)
    heads[:, 3] = 0
    return heads.reshape(values.shape)


def halved_in_the_prompt(values: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Halves the values of the prompt's tokens."""
    changed = values.clone()
    changed[:EDIT_PROMPT_LEN] *= 0.5
    return changed


def shifted(values: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Adds the vector, as far as there are dimensions for it, to all tokens."""
    return values + vector[: values.shape[1]]


EDITS: dict[str, tuple[str, Change]] = {
    "steer": ("layers.2.residual", steer),
    "head": ("layers.1.attention.heads", without_a_head),
    "mlp": ("layers.3.mlp.output", halved_in_the_prompt),
    "values": ("layers.2.attention.values", shifted),
}


class Inside:
    """The inside of a model of transformers, by the names of jaxinfer's sites."""

    def __init__(self, model: PreTrainedModel, family: str):
        self.model = model
        self.is_gpt2, self.is_mixtral, self.is_gemma = (family == name for name in ("gpt2", "mixtral", "gemma3"))
        self.base = model.transformer if self.is_gpt2 else model.model
        self.layers = self.base.h if self.is_gpt2 else self.base.layers

    def hook(self, site: str, call: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
        """Calls a function with the values [T, ...] at a site; what it returns, unless None, takes their place."""
        if site == "final_norm":
            return self._behind(self.base.ln_f if self.is_gpt2 else self.base.norm, call)
        _, number, part = site.split(".", 2)
        layer = self.layers[int(number)]
        attention = layer.attn if self.is_gpt2 else layer.self_attn
        if part == "residual":
            return self._behind(layer, call)
        if part == "attention.input":
            return self._behind(layer.ln_1 if self.is_gpt2 else layer.input_layernorm, call)
        if part in ("attention.queries", "attention.keys", "attention.values"):
            which = ("attention.queries", "attention.keys", "attention.values").index(part)
            if self.is_gpt2:
                return self._behind(attention.c_attn, call, part=slice(64 * which, 64 * (which + 1)))
            return self._behind((attention.q_proj, attention.k_proj, attention.v_proj)[which], call)
        if part == "attention.heads":
            return self._before(attention.c_proj if self.is_gpt2 else attention.o_proj, call)
        if part == "attention.output":
            normed = layer.post_attention_layernorm if self.is_gemma else attention
            return self._behind(normed, call)
        if part == "mlp.input":
            if self.is_gpt2:
                return self._behind(layer.ln_2, call)
            return self._behind(
                layer.pre_feedforward_layernorm if self.is_gemma else layer.post_attention_layernorm, call
            )
        if part == "mlp.gate":
            return self._behind(layer.mlp.act if self.is_gpt2 else layer.mlp.act_fn, call)
        if part == "mlp.neurons":
            return self._before(layer.mlp.c_proj if self.is_gpt2 else layer.mlp.down_proj, call)
        if part == "mlp.output":
            return self._behind(layer.post_feedforward_layernorm if self.is_gemma else layer.mlp, call)
        raise ValueError(site)

    def sites(self) -> list[str]:
        """The sites that are kept, save the embedding, the attention weights and the router."""
        blocks = ["attention.input", "attention.queries", "attention.keys", "attention.values", "attention.heads"]
        blocks += ["attention.output", "mlp.input", "mlp.output"]
        blocks += [] if self.is_mixtral else ["mlp.gate", "mlp.neurons"]
        inside = [f"layers.{layer}.{block}" for layer in LAYERS for block in blocks]
        return [*(f"layers.{layer}.residual" for layer in range(len(self.layers))), *inside, "final_norm"]

    def _behind(self, module: Any, call: Callable, part: slice = slice(None)) -> Any:
        def hooked(_: Any, __: Any, output: Any) -> Any:
            values = output[0] if isinstance(output, tuple) else output
            changed = call(values.reshape(-1, values.shape[-1])[:, part])
            if changed is None:
                return None
            new = values.clone()
            new.reshape(-1, values.shape[-1])[:, part] = changed
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return module.register_forward_hook(hooked)

    def _before(self, module: Any, call: Callable) -> Any:
        def hooked(_: Any, arguments: Any) -> Any:
            values = arguments[0]
            changed = call(values.reshape(-1, values.shape[-1]))
            return None if changed is None else (changed.reshape(values.shape), *arguments[1:])

        return module.register_forward_pre_hook(hooked)


def logits(model: PreTrainedModel, ids: list[int], **options: Any) -> Any:
    """One forward pass without a cache."""
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False, **options)


def greedy(model: PreTrainedModel, prompt: list[int], count: int) -> tuple[list[int], list[float], float]:
    """The tokens, their log-probabilities and the smallest margin, each step a forward pass of its own."""
    ids, logprobs, margin = list(prompt), [], np.inf
    for _ in range(count):
        last = logits(model, ids).logits[0, -1]
        best = torch.topk(last, 2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        ids.append(int(best.indices[0]))
        logprobs.append(float(torch.log_softmax(last, -1)[ids[-1]]))
    return ids[len(prompt) :], logprobs, margin


def inside_values(inside: Inside, ids: list[int]) -> dict[str, np.ndarray]:
    """The values of all tokens at all sites that are kept."""
    found: dict[str, np.ndarray] = {}

    def keep(site: str) -> Callable[[torch.Tensor], None]:
        return lambda values: found.update({site: values.detach().numpy().copy()}) or None

    handles = [inside.hook(site, keep(site)) for site in inside.sites()]
    routed: dict[int, torch.Tensor] = {}
    if inside.is_mixtral:
        for layer in LAYERS:
            gate = inside.layers[layer].mlp.gate
            handles.append(
                gate.register_forward_pre_hook(lambda module, a, layer=layer: routed.update({layer: a[0]}) or None)
            )
    out = logits(inside.model, ids, output_hidden_states=True, output_attentions=True)
    for handle in handles:
        handle.remove()
    for site, values in found.items():
        if site.endswith(("queries", "keys", "values", "heads")):
            config = inside.model.config
            is_kv = site.endswith(("keys", "values"))
            num_heads = getattr(config, "num_key_value_heads", None) if is_kv else config.num_attention_heads
            found[site] = values.reshape(len(values), num_heads or config.num_attention_heads, -1)
    for layer in LAYERS:
        found[f"layers.{layer}.attention.probs"] = out.attentions[layer][0].transpose(0, 1).numpy().copy()
        if inside.is_mixtral:
            weight = inside.layers[layer].mlp.gate.weight
            scores = routed[layer].reshape(-1, weight.shape[1]) @ weight.T
            found[f"layers.{layer}.mlp.router"] = torch.softmax(scores, -1).detach().numpy()
    return {"embedding": out.hidden_states[0][0].numpy(), "logits": out.logits[0].numpy(), **found}


def make(family: str) -> str:
    """Writes one file; returns a line that says what came of it."""
    model = AutoModelForCausalLM.from_pretrained(
        HERE / "mesh" / family, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    inside = Inside(model, family)
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        prompt, edit_prompt = (rng.integers(3, 301, length).tolist() for length in (PROMPT_LEN, EDIT_PROMPT_LEN))
        vector = rng.standard_normal(64).astype(np.float32)
        output, _, margin = greedy(model, prompt, NUM_OUTPUTS)
        plain, _, _ = greedy(model, edit_prompt, NUM_EDITED)
        arrays: dict[str, Any] = {"prompt": prompt, "output": output, "edit_prompt": edit_prompt}
        arrays = {name: np.array(ids, np.int32) for name, ids in arrays.items()} | {"vector": vector}
        for name, (site, change) in EDITS.items():
            handle = inside.hook(site, partial(change, vector=torch.from_numpy(vector)))
            tokens, logprobs, edit_margin = greedy(model, edit_prompt, NUM_EDITED)
            handle.remove()
            margin = min(margin, edit_margin if tokens != plain else 0.0)
            arrays |= {f"edit.{name}": np.array(tokens, np.int32)}
            arrays |= {f"edit_logprobs.{name}": np.array(logprobs, np.float32)}
        if margin > MIN_MARGIN:
            break
    else:
        raise RuntimeError(f"{family}: no seed below 1000 gives edits that change the output, without near-ties")
    values = inside_values(inside, [*prompt, *output[:-1]])
    arrays |= {f"at.{site}": np.ascontiguousarray(array, np.float32) for site, array in values.items()}
    path = HERE / "sites" / f"{family}.npz"
    path.parent.mkdir(exist_ok=True)
    save_npz(path, arrays)
    return f"sites/{family}: seed {seed}, smallest margin {margin:.1e}, {path.stat().st_size / 1000:.0f} kB"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for family in FAMILIES:
        print(make(family), flush=True)
