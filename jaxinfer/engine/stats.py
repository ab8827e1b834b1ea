"""EngineStats: the engine's load and counts.

Owns: the numbers, and how they are shown in a notebook.
Does not know: how they are counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxinfer.records.bars import Bar, render_bars


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """The engine's present load, and counts since it began; the dump page is not among the pages.

    Args:
      num_requests_running, num_requests_waiting, num_requests_finished: requests by state; aborted and failed ones are
        finished. Every beam of a running or waiting beam search counts.
      kv_pages_total: pages of the pool.
      kv_pages_used: pages that sequences hold.
      kv_pages_cached: pages that no sequence holds, but whose content the prefix cache can still find.
      prefix_cache_queries, prefix_cache_hits: prompt tokens looked up in the prefix cache, and those found; a prompt
        counts once, however many samples share it.
      num_preemptions: how often a sequence was sent back to the queue.
      prompt_tokens, generation_tokens: tokens of accepted prompts, and output tokens read.
      num_steps: steps launched with work; the idle steps that move a pipeline on are not counted.
      num_rows_live, num_rows_launched: rows that had work, and all rows of the programs that ran, padding included;
        both summed over stages and steps. A row is a decoding sequence or a block of a prompt.
      draft_tokens, accepted_draft_tokens: drafts that were verified, and those of them that were right.
      num_compilations: programs compiled.
    """

    num_requests_running: int
    num_requests_waiting: int
    num_requests_finished: int
    kv_pages_total: int
    kv_pages_used: int
    kv_pages_cached: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_preemptions: int
    prompt_tokens: int
    generation_tokens: int
    num_steps: int
    num_rows_live: int
    num_rows_launched: int
    draft_tokens: int
    accepted_draft_tokens: int
    num_compilations: int

    @property
    def draft_acceptance_rate(self) -> float:
        """Share of the drafts that were right; 0 without any."""
        return self.accepted_draft_tokens / max(self.draft_tokens, 1)

    def _repr_html_(self) -> str:
        """Bars for notebooks: where the KV pages are, how full the steps were, what caches and drafts have saved."""
        free = self.kv_pages_total - self.kv_pages_used - self.kv_pages_cached
        bars = [
            ("KV pages", (("used", self.kv_pages_used), ("cached", self.kv_pages_cached), ("free", free))),
            ("rows", (("with work", self.num_rows_live), ("padding", self.num_rows_launched - self.num_rows_live))),
            (
                "prompt tokens looked up",
                (("cached", self.prefix_cache_hits), ("computed", self.prefix_cache_queries - self.prefix_cache_hits)),
            ),
            (
                "drafts",
                (
                    ("right", self.accepted_draft_tokens),
                    ("wrong", self.draft_tokens - self.accepted_draft_tokens),
                ),
            ),
            (
                "requests",
                (
                    ("running", self.num_requests_running),
                    ("waiting", self.num_requests_waiting),
                    ("finished", self.num_requests_finished),
                ),
            ),
        ]
        caption = (
            f"{self.prompt_tokens:,} prompt and {self.generation_tokens:,} output tokens in {self.num_steps:,} steps, "
            f"{self.num_preemptions:,} preemptions, {self.num_compilations:,} programs compiled"
        )
        return render_bars([Bar(name=name, parts=parts) for name, parts in bars], caption)
