"""generate(), which loads a model and generates in one call.

Owns: the one LLM that generate() keeps loaded between calls; sorting keywords into sampling fields and engine settings.
Does not know: anything of generation beyond the methods of LLM.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxinfer.api.llm import LLM
from jaxinfer.api.settings import split_settings
from jaxinfer.checkpoint.directory import DEMO
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.text.preparation import Prompt
from jaxinfer.tokenizer.tokenizer import Tokenizer


class _KeptLLM:
    """The one LLM that generate() keeps between calls."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._key: tuple[Any, ...] | None = None
        self._llm: LLM | None = None
        self._num_users = 0

    @contextmanager
    def using(self, model: str | Path, tokenizer: Any, config: EngineConfig) -> Iterator[LLM]:
        """The kept LLM if it has these settings and still runs; otherwise a new one, once nobody uses the old one."""
        key = (str(model), tokenizer, config)
        with self._changed:
            while self._key != key or self._llm is None or not self._llm.is_running:
                if self._num_users:
                    self._changed.wait()
                else:
                    self._load(key, model, tokenizer, config)
            llm = self._llm
            self._num_users += 1
        try:
            yield llm
        finally:
            with self._changed:
                self._num_users -= 1
                self._changed.notify_all()

    def _load(self, key: tuple[Any, ...], model: str | Path, tokenizer: Any, config: EngineConfig) -> None:
        if self._llm is not None:
            self._llm.close()
        self._key, self._llm = None, None
        self._llm = LLM(model, tokenizer=tokenizer, **dataclasses.asdict(config))
        self._key = key


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

    A call with others waits until no thread uses that LLM, closes it and loads its own.

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
