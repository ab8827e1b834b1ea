"""EngineConfig: all settings of the engine.

Owns: every knob of the engine with its default and its range.
Does not know: jax, models, requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxinfer.config.attention_span import MAX_WINDOW, AttentionSpan
from jaxinfer.config.keywords import names_nearest_field
from jaxinfer.config.validation import require_bool, require_choice, require_float, require_int

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("int8",)
ATTENTION_BACKENDS = ("auto", "reference", "xla", "pallas")
REGISTERED_ATTENTION: list[str] = []
"""Names of attention functions of users; only kernels/paged_attention.py's register_attention adds to it."""


@names_nearest_field
@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """All settings of the engine; one instance per LLM, never changed.

    Args:
      dtype: dtype of weights, activations and KV cache: "auto" is float32 on CPU and bfloat16 elsewhere.
      quantization: "int8" keeps the matrices of the model, embedding and head included, as int8 with one float32 scale
        for each output feature, in a quarter of the memory of float32; they are rounded while the model is loaded. Not
        quantised are norms, biases, learned positions, a mixture's router, and all activations. None for none.
      tensor_parallel_size: devices that share each layer.
      pipeline_parallel_size: stages that share the layers.
      data_parallel_size: replicas of the model, each on a mesh of its own; requests are shared out among them.
      max_model_len: limit on the tokens of prompt and output together; None takes the model's own limit.
      max_num_seqs: sequences that can run at once (decode slots).
      max_num_batched_tokens: tokens that one step may process. Prefill rows are padded to 16 tokens each; padding
        included, they are bounded by the same number, rounded up to whole rows.
      page_size: tokens in one KV page; a power of two, at least 8.
      num_kv_pages: KV pages without the dump page; None derives it from free memory, on CPUs up to 4 GiB.
      gpu_memory_utilization: share of a GPU's memory for weights, KV cache and activations. JAX reserves this share
        when it starts, unless XLA_PYTHON_CLIENT_MEM_FRACTION or a related variable is set.
      enable_prefix_caching: whether requests with equal beginnings share the full KV pages of these.
      enable_chunked_prefill: whether prompts may be split to fit the token budget of a step.
      run_ahead: whether the next step is launched before the last one's tokens are read.
      steps_per_launch: decode steps that one launch computes, while no request waits; their tokens arrive together.
        None chooses 8 on GPUs where launching takes longer than computing (up to 32 rows and 6 GB of weights on a
        device), else 1.
      attention_backend: "auto" picks by platform: "pallas" (GPU kernels of attention and of what stands around it) on
        CUDA devices from Ampere on, else "xla"; "reference" is the slow oracle. Or a name that was given to
        register_attention.
      sliding_window: every token sees only so many of the last ones, itself included, in layers whose own window is not
        shorter. KV pages that no layer sees any more are given back. None leaves the model as it is.
      sink_tokens: how many of a text's first tokens stay in sight beside sliding_window (4 in the paper; most models
        lose their way without any).
      draft_model: what proposes tokens for speculative decoding, which verifies several in one step and gives the same
        output in fewer steps. Either the directory or hub id of a checkpoint with the same vocabulary, or
        "prompt-lookup", which proposes what followed the last tokens where they occurred before in the text. None
        decodes one token at a time.
      num_draft_tokens: how many tokens to propose at a time, at most, 1 .. 15.
      seed: the seeds of requests without a seed are derived from it.
      xla_options: options of the XLA compiler by name, such as {"xla_gpu_graph_min_graph_size": 2}, beside the engine's
        own, which they override. None for no others.
      max_research_bytes: limit of what captures and interventions take: the captures of all requests of one call on the
        host, those of one step on the devices, and the parameters of one intervention there.

    Raises:
      TypeError, ValueError: a field is outside its range; the message names field, value and range.

    Source: sink_tokens as in Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", but with
      positions in the text, not in the cache.
    """

    dtype: str = "auto"
    quantization: str | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    page_size: int = 64
    num_kv_pages: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    run_ahead: bool = True
    steps_per_launch: int | None = None
    attention_backend: str = "auto"
    sliding_window: int | None = None
    sink_tokens: int = 0
    draft_model: str | None = None
    num_draft_tokens: int = 4
    seed: int = 0
    xla_options: Mapping[str, bool | int | float | str] | None = field(default=None, hash=False)
    max_research_bytes: int = 2**30

    def __post_init__(self) -> None:
        require_choice("dtype", self.dtype, DTYPES)
        if self.quantization not in (None, *QUANTIZATIONS):
            raise ValueError(f"quantization must be None or {', '.join(QUANTIZATIONS)}, got {self.quantization!r}")
        require_choice("attention_backend", self.attention_backend, (*ATTENTION_BACKENDS, *REGISTERED_ATTENTION))
        lowest = {"max_num_batched_tokens": 16, "page_size": 8, "max_num_seqs": 1}
        lowest |= {
            "max_research_bytes": 0,
            "tensor_parallel_size": 1,
            "pipeline_parallel_size": 1,
            "data_parallel_size": 1,
        }
        for name, low in lowest.items():
            object.__setattr__(self, name, require_int(name, getattr(self, name), low))
        for name, low in {"max_model_len": 2, "num_kv_pages": 1, "steps_per_launch": 1}.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, name, require_int(name, getattr(self, name), low))
        if self.sliding_window is not None:
            window = require_int("sliding_window", self.sliding_window, 1, MAX_WINDOW)
            object.__setattr__(self, "sliding_window", window)
        object.__setattr__(self, "sink_tokens", require_int("sink_tokens", self.sink_tokens, 0, MAX_WINDOW))
        if self.sink_tokens and self.sliding_window is None:
            raise ValueError(f"sink_tokens needs a sliding_window beside it, got sink_tokens {self.sink_tokens} alone")
        if self.draft_model is not None and (not isinstance(self.draft_model, str) or not self.draft_model):
            raise TypeError(
                f'draft_model must be a checkpoint\'s directory or hub id, "prompt-lookup" or None, got '
                f"{self.draft_model!r}"
            )
        object.__setattr__(self, "num_draft_tokens", require_int("num_draft_tokens", self.num_draft_tokens, 1, 15))
        if self.page_size & (self.page_size - 1):
            raise ValueError(f"page_size must be a power of two, got {self.page_size}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens must be >= max_num_seqs, so that every running request can decode, "
                f"got {self.max_num_batched_tokens} < {self.max_num_seqs}"
            )
        share = require_float("gpu_memory_utilization", self.gpu_memory_utilization, "in (0, 1]", 0, 1, open_low=True)
        object.__setattr__(self, "gpu_memory_utilization", share)
        for name in ("enable_prefix_caching", "enable_chunked_prefill", "run_ahead"):
            require_bool(name, getattr(self, name))
        object.__setattr__(self, "seed", require_int("seed", self.seed, 0, 2**63 - 1))
        if self.xla_options is not None:
            object.__setattr__(self, "xla_options", _require_options("xla_options", self.xla_options))

    @property
    def span(self) -> AttentionSpan:
        """What these settings let a token see of its text."""
        return AttentionSpan(self.sliding_window, self.sink_tokens)


def _require_options(name: str, value: object) -> dict[str, bool | int | float | str]:
    """A copy of a mapping from names to simple values.

    Raises:
      TypeError: it is something else; the message names the field.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping of option names to values, got {value!r}")
    for option, setting in value.items():
        if not isinstance(option, str) or not isinstance(setting, (bool, int, float, str)):
            raise TypeError(f"{name} must be a mapping of names to bools, numbers or strings, got {value!r}")
    return dict(value)
