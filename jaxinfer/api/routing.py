"""Which replica of a model gets a request.

Owns: the rule, and what it remembers of the prompts that it has sent where.
Does not know: engines, threads.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingRule:
    """When a request follows its prompt's beginning, and when it goes where there is less to do.

    Args:
      max_difference, max_ratio: if the busiest replica has more than max_difference requests more than the least busy
        one, and more than max_ratio times as many, the least busy one gets the request.
      min_match: otherwise the replica that knows the longest beginning of the prompt gets it, if that is at least this
        share of the prompt's pages; else the least busy one.

    Source: the cache-aware policy of SGLang's router. Deviation: there, a tree of the prompts that were sent stands for
    what a replica knows; here the replica's prefix cache is asked, and recent prompts are remembered.
    """

    max_difference: int = 32
    max_ratio: float = 1.5
    min_match: float = 0.3


class Router:
    """Chooses a replica for one prompt after the other.

    Args:
      num_replicas: how many there are.
      num_remembered: prompts to remember for each, whose pages may not be in its cache yet.
      rule: how to choose.
      seed: of the choice among replicas that are equally good.
    """

    def __init__(self, num_replicas: int, *, num_remembered: int, rule: RoutingRule | None = None, seed: int = 0):
        self._rule = rule or RoutingRule()
        self._random = random.Random(seed)
        self._num_remembered = num_remembered
        self._prompts: list[deque[Sequence[bytes]]] = [deque() for _ in range(num_replicas)]
        self._pages: list[Counter[bytes]] = [Counter() for _ in range(num_replicas)]

    def choose(self, page_hashes: Sequence[bytes], *, loads: Sequence[int | None], cached: Sequence[int]) -> int:
        """Chooses a replica, and remembers that it gets this prompt.

        Args:
          page_hashes: of the prompt's full pages.
          loads: requests of each replica; None for one that takes no more.
          cached: how many of these pages, from the first on, are in each replica's prefix cache.

        Raises:
          ValueError: no replica takes requests.
        """
        able = [replica for replica, load in enumerate(loads) if load is not None]
        if not able:
            raise ValueError("no replica takes requests any more")
        busy = {replica: load for replica, load in enumerate(loads) if load is not None}
        known = {replica: max(cached[replica], self._num_remembered_pages(replica, page_hashes)) for replica in able}
        most, least, rule = max(busy.values()), min(busy.values()), self._rule
        best = max(known.values())
        if most - least > rule.max_difference and most > rule.max_ratio * least:
            candidates = able
        elif best and best >= rule.min_match * len(page_hashes):
            candidates = [replica for replica in able if known[replica] == best]
        else:
            candidates = able
        least = min(busy[replica] for replica in candidates)
        chosen = self._random.choice([replica for replica in candidates if busy[replica] == least])
        self._remember(chosen, page_hashes)
        return chosen

    def _num_remembered_pages(self, replica: int, page_hashes: Sequence[bytes]) -> int:
        pages = self._pages[replica]
        return next((place for place, found in enumerate(page_hashes) if found not in pages), len(page_hashes))

    def _remember(self, replica: int, page_hashes: Sequence[bytes]) -> None:
        prompts, pages = self._prompts[replica], self._pages[replica]
        prompts.append(page_hashes)
        pages.update(page_hashes)
        if len(prompts) > self._num_remembered:
            pages.subtract(prompts[0])
            for page in prompts.popleft():
                if not pages[page]:
                    del pages[page]
