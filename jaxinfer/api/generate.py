"""generate(), which loads a model and generates in one call.

Owns: the one LLM that generate() keeps loaded between calls; sorting keywords into sampling fields and engine settings.
Does not know: anything of generation beyond the methods of LLM.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxinfer.api.llm import LLM
from jaxinfer.api.settings import split_settings
from jaxinfer.checkpoint.directory import DEMO
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.text.preparation import Prompt
from jaxinfer.tokenizer.tokenizer import Tokenizer


@dataclass(eq=False)
class _Loaded:
    """A loaded LLM, what it was loaded with, and how many calls use it."""

    llm: LLM
    key: tuple[Any, ...]
    num_users: int = 0


class _KeptLLM:
    """The one LLM that generate() keeps between calls."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: _Loaded | None = None

    @contextmanager
    def using(self, model: str | Path, tokenizer: Any, config: EngineConfig) -> Iterator[LLM]:
        """The kept LLM if it has these settings and still runs; otherwise a new one in its place.

        The old one is closed first, or by the last call that uses it.
        """
        key = (str(model), tokenizer, config)
        with self._lock:
            loaded = self._kept
            if loaded is None or loaded.key != key or not loaded.llm.is_running:
                self._kept = None
                self._close_unused(loaded)
                loaded = self._kept = _Loaded(LLM(model, tokenizer=tokenizer, **dataclasses.asdict(config)), key)
            loaded.num_users += 1
        try:
            yield loaded.llm
        finally:
            with self._lock:
                loaded.num_users -= 1
                self._close_unused(loaded)

    def _close_unused(self, loaded: _Loaded | None) -> None:
        if loaded is not None and loaded is not self._kept and not loaded.num_users:
            loaded.llm.close()


_kept = _KeptLLM()


def generate(
    prompts: Prompt | Sequence[Prompt],
    sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    model: str | Path = DEMO,
    tokenizer: str | Path | Tokenizer | None = None,
    use_tqdm: bool = True,
    **fields: Any,
) -> Any:
    """Generates in one call; the LLM stays loaded for the next call with the same model and engine settings.

    A call with others closes that LLM and loads its own; while another thread uses the old one, both are in memory.

    Args:
      prompts: a string, a list of token ids, or a list of either.
      sampling_params: one SamplingParams for all prompts, or a list with one for each. None takes the checkpoint's own
        sampling settings, with those fields replaced that are given as keywords (temperature=0.5).
      model, tokenizer: as LLM's.
      use_tqdm: show a progress bar if prompts is a list of prompts.
      **fields: fields of SamplingParams and EngineConfig by name. Both classes have a `seed`; here it is the sampling
        seed.

    Returns:
      A RequestOutput if prompts is one prompt; a list of them, in the order of the prompts, if it is a list.

    Raises:
      TypeError: a keyword is unknown (the message names the nearest), or sampling_params and keywords for it are both
        given.
      As LLM and LLM.generate.

    Example:
      generate("In the beginning", max_tokens=32, temperature=0.8, max_num_seqs=16).text
    """
    sampling, config = split_settings(fields, also_known=("model", "tokenizer", "use_tqdm"))
    if sampling_params is not None and sampling:
        raise TypeError(f"pass sampling_params or {', '.join(sorted(sampling))}, not both")
    with _kept.using(model, tokenizer, config) as llm:
        if sampling_params is None:
            sampling_params = dataclasses.replace(llm.default_params, **sampling)
        return llm.generate(prompts, sampling_params, use_tqdm=use_tqdm)
