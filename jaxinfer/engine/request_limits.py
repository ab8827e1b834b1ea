"""What a request may need at most.

Owns: the limits on length and pages, and their errors.
Does not know: queues, what else runs. Never imports jax.
"""

from __future__ import annotations

from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.engine.pages_in_sight import PagesInSight
from jaxinfer.request import Request, RequestTooLongError


class RequestLimits:
    """Refuses requests that could not run even if nothing else did.

    Args:
      config: the engine's settings.
      in_sight: which pages sequences see.
      num_pages: pages of the KV pool, without the dump page.
      max_model_len: limit on the tokens of prompt and output together.
    """

    def __init__(self, config: EngineConfig, *, in_sight: PagesInSight, num_pages: int, max_model_len: int):
        self._in_sight = in_sight
        self._num_pages = num_pages
        self._max_model_len = max_model_len
        self._is_models_own = config.max_model_len is None

    def lower_pages(self, num_pages: int) -> None:
        """Refuses from now on what needs more pages, although the pool may have them: not every replica's has."""
        self._num_pages = min(num_pages, self._num_pages)

    @property
    def longest(self) -> int:
        """Tokens of prompt and output that one request can have."""
        if self._in_sight.most(self._max_model_len) <= self._num_pages:
            return self._max_model_len
        return self._num_pages * self._in_sight.page_size

    def max_total_len(self, request: Request) -> int:
        """The length at which a request ends, in tokens of prompt and output together."""
        return min(len(request.known_token_ids) + request.max_tokens, self._max_model_len)

    def check(self, request: Request, *, num_sequences: int = 1) -> None:
        """Refuses a request that does not fit.

        Args:
          request: the request.
          num_sequences: how many sequences of its length have to run at the same time (the width of a beam search).

        Raises:
          RequestTooLongError: the prompt leaves no room for a new token, or the request needs more pages than the
            pool has.
        """
        num_prompt = len(request.known_token_ids)
        if num_prompt >= self._max_model_len:
            context, ways_out = "the model's context of", "shorten it or set truncate_prompt_tokens"
            if not self._is_models_own:
                context = "max_model_len"
                ways_out = "shorten it, set truncate_prompt_tokens or raise max_model_len, up to the model's context"
            raise RequestTooLongError(
                f"prompt has {num_prompt} tokens, the limit is {self._max_model_len - 1} ({context} "
                f"{self._max_model_len} less one for the output); {ways_out}"
            )
        length = self.max_total_len(request)
        needed = self._in_sight.most(length) * num_sequences
        if needed > self._num_pages:
            lower = "max_tokens" if self._in_sight.span.window is None else "max_tokens or max_num_batched_tokens"
            times = "" if num_sequences == 1 else f"{num_sequences} x "
            raise RequestTooLongError(
                f"request needs {needed} KV pages for {times}{length} tokens, the pool has {self._num_pages}; lower "
                f"{lower}, shorten the prompt or raise num_kv_pages"
            )
