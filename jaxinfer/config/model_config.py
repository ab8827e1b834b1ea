"""ModelConfig: the numbers of a decoder-only model, and RopeConfig, those of its rotary embedding.

Owns: every number of an architecture, which combinations exist, and how many parameters follow from them.
Does not know: jax, files; models.hf_config reads the numbers from a checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jaxinfer.config.attention_span import MAX_WINDOW, AttentionSpan, widest
from jaxinfer.config.validation import require_choice, require_float, require_int

ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu_new", "gelu", "relu")
NORM_PLACES = ("before", "after", "both")
NORM_KINDS = ("rms", "layer")
QK_NORMS = ("none", "head", "projection")
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary position embedding: base and context-extension rule.

    Args:
      theta: base of the frequencies.
      kind: "default", or an extension: "linear", "dynamic" (NTK), "llama3", "yarn", "longrope".
      factor: how many times longer than original_max_len the context became.
      original_max_len: tokens the model was pre-trained on.
      low_freq_factor, high_freq_factor: for llama3, the band of frequencies between unscaled and scaled ones, in
        rotations per original_max_len.
      beta_fast, beta_slow: the same band for yarn, its upper and its lower end, both > 0.
      attention_factor: yarn's and longrope's multiplier on cos and sin; None derives it from the other numbers.
      mscale, mscale_all_dim: yarn's optional inputs to attention_factor.
      truncate: whether yarn rounds its band to whole dimensions.
      short_factors, long_factors: longrope's divisors of the frequencies, one for each rotated pair, for contexts up to
        original_max_len and for longer ones.
      rotated_share: share of each head's dimensions that is rotated, from the first dimension on.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    original_max_len: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    rotated_share: float = 1.0

    def __post_init__(self) -> None:
        require_choice("rope kind", self.kind, ROPE_KINDS)
        require_float("rope rotated_share", self.rotated_share, "in (0, 1]", 0, 1, open_low=True)
        if self.kind != "default" and self.factor < 1:
            raise ValueError(f"rope factor must be >= 1, got {self.factor}")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"rope low_freq_factor must be below high_freq_factor, got {self.low_freq_factor} and "
                f"{self.high_freq_factor}"
            )
        if self.kind == "yarn" and not 0 < self.beta_slow <= self.beta_fast:
            raise ValueError(
                f"rope beta_slow must be > 0 and not above beta_fast, got {self.beta_slow} and {self.beta_fast}"
            )
        # Both rules divide by a logarithm of these.
        if self.kind == "yarn" and self.theta <= 1:
            raise ValueError(f"rope theta must be > 1 for yarn, got {self.theta}")
        if self.kind == "longrope" and self.original_max_len < 2:
            raise ValueError(f"rope original_max_len must be >= 2 for longrope, got {self.original_max_len}")

    def rotated_dims(self, head_dim: int) -> int:
        """How many of a head's dimensions are rotated; an even number."""
        return int(head_dim * self.rotated_share)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The numbers of a decoder-only transformer of any family.

    Args:
      architecture: the checkpoint's class name, the key into the model registry.
      vocab_size: tokens of the vocabulary, without the padding that spreads it evenly over the mesh.
      hidden_size, num_layers, num_heads, num_kv_heads, head_dim, ffn_size: D, L, N, K, H, F.
      max_position_embeddings: tokens the checkpoint declares it can handle, 2 .. 2**30.
      rope: rotary embedding; None adds a learned vector for each of the max_position_embeddings positions instead.
      norm_eps: added to the mean square (or the variance) inside a norm.
      tie_word_embeddings: whether the head's weights are those of the embedding.
      attention_bias, attention_out_bias, mlp_bias: whether the projections to query, key and value, the projection
        after attention and the feed-forward have a bias.
      qk_norm: how queries and keys are normalised before rotation: not at all ("none"), each head by itself ("head"),
        or all heads of a token together ("projection").
      windows: for each layer, how many tokens a query sees, itself included; None for all. () if every layer sees all.
      local_rope: rotary embedding of the layers with a window; None if they have the same as the others.
      attention_scale: factor on query times key; None is head_dim ** -0.5.
      attention_softcap, logit_softcap: attention scores and logits become cap * tanh(x / cap); None leaves them.
      embedding_scale: factor on the embedded tokens.
      activation: activation of the gate, or of the feed-forward without one, by its name in transformers.
      mlp_gate: whether the feed-forward has a gate.
      norm_kind: "rms" (root mean square, a weight) or "layer" (subtracts the mean, a weight and a bias).
      norm_places: whether norms stand "before" attention and feed-forward, "after" them (before the residual is
        added), or "both".
      norm_offset: added to the weights of every norm.
      num_experts, experts_per_token, expert_ffn_size: numbers of a mixture of experts; 0 for a model without experts.
      normalise_experts: whether the weights of a token's chosen experts are scaled to sum to 1.
      dense_layers: indices of the layers without experts in a model that has experts.

    Raises:
      ValueError: numbers that do not fit each other; the message names them.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    max_position_embeddings: int
    rope: RopeConfig | None
    norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = "none"
    windows: tuple[int | None, ...] = ()
    local_rope: RopeConfig | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    activation: str = "silu"
    mlp_gate: bool = True
    norm_kind: str = "rms"
    norm_places: str = "before"
    norm_offset: float = 0.0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_ffn_size: int = 0
    normalise_experts: bool = True
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_choice("activation", self.activation, ACTIVATIONS)
        require_choice("norm_places", self.norm_places, NORM_PLACES)
        require_choice("norm_kind", self.norm_kind, NORM_KINDS)
        require_choice("qk_norm", self.qk_norm, QK_NORMS)
        for name in ("attention_scale", "attention_softcap", "logit_softcap"):
            if getattr(self, name) is not None:
                require_float(name, getattr(self, name), "> 0", 0, math.inf, open_low=True)
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size"):
            require_int(name, getattr(self, name), 1)
        require_int("max_position_embeddings", self.max_position_embeddings, 2, MAX_WINDOW)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.rope is not None:
            self._check_rotation(self.rope)
        self._refuse_together()
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(f"windows must have one entry a layer, {self.num_layers}, got {len(self.windows)}")
        if self.num_experts:
            require_int("expert_ffn_size", self.expert_ffn_size, 1)
            require_int("experts_per_token", self.experts_per_token, 1, self.num_experts)
        for window in self.windows:
            if window is not None:
                require_int("window", window, 1)

    def _refuse_together(self) -> None:
        """Refuses combinations of numbers that no layer implements."""
        refused = {
            "norm_kind 'layer' has no norm_offset": self.norm_kind == "layer" and self.norm_offset != 0,
            "norm_kind 'layer' has no qk_norm": self.norm_kind == "layer" and self.qk_norm != "none",
            "local_rope needs rope": self.rope is None and self.local_rope is not None,
            "experts have a gate": self.num_experts > 0 and not self.mlp_gate,
            "experts have no bias (mlp_bias)": self.num_experts > 0 and self.mlp_bias,
        }
        for rule, is_broken in refused.items():
            if is_broken:
                raise ValueError(
                    f"{self.architecture}: {rule}, but the ModelConfig asks for it; write a module of its own"
                )

    def _check_rotation(self, rope: RopeConfig) -> None:
        rotated = rope.rotated_dims(self.head_dim)
        if rotated % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim} ({rotated} rotated)")
        if rope.kind == "dynamic" and rotated < 4:
            raise ValueError(f"rope kind 'dynamic' needs 4 rotated dims of a head or more, got {rotated}")
        for factors in (rope.short_factors, rope.long_factors):
            if rope.kind == "longrope" and len(factors) != rotated // 2:
                raise ValueError(f"longrope needs {rotated // 2} factors for {rotated} dims, got {len(factors)}")

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """Each layer's window, None for none."""
        return self.windows or (None,) * self.num_layers

    def widest_span(self, limit: AttentionSpan) -> AttentionSpan:
        """What the tokens of a text see of it in at least one layer.

        Args:
          limit: what the engine's settings let them see.
        """
        return widest(map(limit.within, self.layer_windows))

    def rope_for(self, window: int | None) -> RopeConfig:
        """The rotary embedding of a layer with this window.

        Raises:
          ValueError: the model has learned positions instead.
        """
        if self.rope is None:
            raise ValueError(f"{self.architecture} has learned positions, no rotary embedding")
        return self.rope if window is None or self.local_rope is None else self.local_rope

    @property
    def expert_layers(self) -> frozenset[int]:
        """Indices of the layers that are a mixture of experts."""
        return frozenset(range(self.num_layers)) - set(self.dense_layers) if self.num_experts else frozenset()

    @property
    def num_parameters(self) -> int:
        """How many parameters the model has, tied ones counted once."""
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        norm = (2 if self.norm_kind == "layer" else 1) * self.hidden_size
        inner = (2 if self.mlp_gate else 1) * self.ffn_size
        layer = self.hidden_size * (2 * q_size + 2 * kv_size)
        layer += (4 if self.norm_places == "both" else 2) * norm
        layer += self.attention_bias * (q_size + 2 * kv_size) + self.attention_out_bias * self.hidden_size
        layer += {"none": 0, "head": 2 * self.head_dim, "projection": q_size + kv_size}[self.qk_norm]
        tables = (1 if self.tie_word_embeddings else 2) * self.vocab_size
        tables += self.max_position_embeddings if self.rope is None else 0
        dense = self.hidden_size * (inner + self.ffn_size) + self.mlp_bias * (inner + self.hidden_size)
        experts = self.num_experts * self.hidden_size * (3 * self.expert_ffn_size + 1)
        num_sparse = len(self.expert_layers)
        blocks = (self.num_layers - num_sparse) * dense + num_sparse * experts
        return tables * self.hidden_size + self.num_layers * layer + blocks + norm
