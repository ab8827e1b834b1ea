"""The logit lens: what the model would predict if it ended after each layer.

Owns: the lens (final norm and head on the residual stream of every layer), its table and its picture.
Does not know: how the residual stream is captured.

Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int

from jaxinfer.communication.mesh import PIPE, TENSOR
from jaxinfer.communication.sharding import REPLICATED
from jaxinfer.config.model_config import ModelConfig
from jaxinfer.research.table import Table
from jaxinfer.wrappers.assembly import abstract_model
from jaxinfer.wrappers.decoder_wrapper import DecoderWrapper

_BLOCK = 256
"""Rows of logits that exist at a time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LogitLens:
    """What each layer would predict after each token of a text.

    Args:
      layers: numbers of the L layers, ascending.
      token_ids: int32[T], the text.
      tokens: the text of each token; its id where there is no tokenizer.
      top_ids, top_probs: int32[L, T, K], float32[L, T, K], the most likely next tokens, best first.
      top_tokens: the texts of top_ids.
      next_probs, next_ranks: float32[L, T - 1], int32[L, T - 1], probability and rank (1 is the first) of the token
        that does come next.
      entropies: float32[L, T], of the prediction, in nats.
    """

    layers: tuple[int, ...]
    token_ids: Int[np.ndarray, " T"]
    tokens: tuple[str, ...]
    top_ids: Int[np.ndarray, "L T K"]
    top_probs: Float32[np.ndarray, "L T K"]
    top_tokens: tuple[tuple[tuple[str, ...], ...], ...]
    next_probs: Float32[np.ndarray, "L M"]
    next_ranks: Int[np.ndarray, "L M"]
    entropies: Float32[np.ndarray, "L T"]

    @property
    def table(self) -> Table:
        """A row for each layer and token."""
        rows = []
        for i, layer in enumerate(self.layers):
            for j, token in enumerate(self.tokens):
                row: dict[str, Any] = {
                    "layer": layer,
                    "position": j,
                    "token": token,
                    "prediction": self.top_tokens[i][j][0],
                }
                row |= {"probability": float(self.top_probs[i, j, 0]), "entropy": float(self.entropies[i, j])}
                has_next = j + 1 < len(self.tokens)
                row["next_token_probability"] = float(self.next_probs[i, j]) if has_next else None
                row["next_token_rank"] = int(self.next_ranks[i, j]) if has_next else None
                rows.append(row)
        return Table(rows, axes=("layer",), value="probability")

    def to_pandas(self) -> Any:
        """The table as a pandas.DataFrame (needs the extra [notebook])."""
        return self.table.to_pandas()

    def plot(self, axes: Any = None) -> Any:
        """Draws the most likely token after each layer and token, coloured by its probability (needs [notebook]).

        Args:
          axes: matplotlib axes to draw on; None makes a figure.

        Returns:
          The axes.
        """
        import matplotlib.pyplot as pyplot

        count, length = len(self.layers), len(self.tokens)
        if axes is None:
            size = (max(4, 0.95 * length + 1.5), max(2.5, 0.42 * count + 1.3))
            _, axes = pyplot.subplots(figsize=size, layout="constrained")
        image = axes.imshow(self.top_probs[..., 0], vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
        for i in range(count):
            for j in range(length):
                dark = self.top_probs[i, j, 0] < 0.6
                text = self.top_tokens[i][j][0].replace("$", r"\$")
                axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        axes.set_xticks(range(length), [token.replace("$", r"\$") for token in self.tokens], rotation=30, ha="right")
        axes.set_yticks(range(count), map(str, self.layers))
        axes.set(xlabel="token", ylabel="layer", title="most likely next token after each layer")
        axes.figure.colorbar(image, ax=axes, label="probability")
        return axes

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(token)}</th>" for token in self.tokens)
        rows = []
        for i in range(len(self.layers) - 1, -1, -1):
            cells = "".join(self._cell(i, j) for j in range(len(self.tokens)))
            rows.append(f"<tr><th>{self.layers[i]}</th>{cells}</tr>")
        return f"<table><tr><th>layer</th>{head}</tr>{''.join(rows)}</table>"

    def _cell(self, i: int, j: int) -> str:
        pairs = zip(self.top_tokens[i][j], self.top_probs[i, j], strict=True)
        title = html.escape(", ".join(f"{token!r} {probability:.3f}" for token, probability in pairs))
        shade = f"background: rgba(66, 133, 244, {float(self.top_probs[i, j, 0]):.2f})"
        return f'<td style="{shade}" title="{title}">{html.escape(self.top_tokens[i][j][0])}</td>'


class Lens:
    """Final norm and head on their own, on the mesh of a model.

    Args:
      decoder: runs the model.
      config: the model's numbers.
    """

    def __init__(self, decoder: DecoderWrapper, config: ModelConfig):
        self._decoder = decoder
        self._vocab_size = config.vocab_size
        graph, abstract = nnx.split(abstract_model(config, decoder.layout))
        variables = nnx.to_flat_state(abstract)
        self._names = [".".join(map(str, path)) for path, _ in variables]
        tree = jax.tree.structure(abstract)

        def logits(leaves: list[Array], x: Float[Array, "M D"]) -> Float[Array, "M V"]:
            model = nnx.merge(graph, jax.tree.unflatten(tree, leaves))
            return model.head.logits(model.final_norm(x.astype(model.head.dtype)))

        specs = [variable.spec for _, variable in variables]
        mapped = jax.shard_map(
            logits,
            mesh=decoder.mesh,
            in_specs=(specs, REPLICATED),
            out_specs=PartitionSpec(None, (PIPE, TENSOR)),
            check_vma=False,
        )
        self._logits = jax.jit(mapped)

    def logprobs(self, residual: Float[np.ndarray, "M D"]) -> Float32[np.ndarray, "M V"]:
        """The log-probabilities of all tokens after values of the residual stream, up to 256 of them."""
        params = self._decoder.held_params
        padded = np.zeros((_BLOCK, residual.shape[1]), np.float32)
        padded[: len(residual)] = residual
        logits = self._logits([params[name] for name in self._names], jnp.asarray(padded))
        logits = np.asarray(logits)[: len(residual), : self._vocab_size]
        most = logits.max(axis=1, keepdims=True)
        return logits - most - np.log(np.exp(logits - most).sum(axis=1, keepdims=True))


def look(
    lens: Lens,
    residuals: Mapping[int, Float32[np.ndarray, "T D"]],
    token_ids: Sequence[int],
    *,
    num_top: int,
    text_of: Any,
) -> LogitLens:
    """Looks through the lens at the residual stream behind some layers.

    Args:
      lens: of the model.
      residuals: the captured values by layer.
      token_ids: the text.
      num_top: tokens to report at each place.
      text_of: the text of a token id.
    """
    layers, length = tuple(sorted(residuals)), len(token_ids)
    following = np.array([*token_ids[1:], token_ids[-1]], np.int32)
    found: dict[str, list[np.ndarray]] = {"ids": [], "probs": [], "next": [], "ranks": [], "entropies": []}
    for layer in layers:
        for start in range(0, length, _BLOCK):
            block = lens.logprobs(residuals[layer][start : start + _BLOCK])
            rows = np.arange(len(block))
            best = np.argpartition(-block, num_top - 1, axis=1)[:, :num_top]
            best = np.take_along_axis(best, np.argsort(-np.take_along_axis(block, best, 1), axis=1), 1)
            chosen = block[rows, following[start : start + _BLOCK]]
            found["ids"].append(best.astype(np.int32))
            found["probs"].append(np.exp(np.take_along_axis(block, best, 1)))
            found["next"].append(np.exp(chosen))
            found["ranks"].append(1 + (block > chosen[:, None]).sum(axis=1, dtype=np.int32))
            found["entropies"].append(-(np.exp(block) * block).sum(axis=1))
    stacked = {name: np.concatenate(parts) for name, parts in found.items()}
    arrays = {name: array.reshape(len(layers), length, *array.shape[1:]) for name, array in stacked.items()}
    texts = tuple(tuple(tuple(map(text_of, ids)) for ids in layer) for layer in arrays["ids"].tolist())
    return LogitLens(
        layers=layers,
        token_ids=np.array(token_ids, np.int32),
        tokens=tuple(map(text_of, token_ids)),
        top_ids=arrays["ids"],
        top_probs=arrays["probs"].astype(np.float32),
        top_tokens=texts,
        next_probs=arrays["next"][:, :-1].astype(np.float32),
        next_ranks=arrays["ranks"][:, :-1],
        entropies=arrays["entropies"].astype(np.float32),
    )
