"""The processes that hold one replica of a model in a run of several processes.

Owns: what they agree on while they load it.
Does not know: what is loaded, how steps run.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from jaxinfer.communication.process_group import Members, ProcessGroup


@dataclass(frozen=True, slots=True)
class Holders:
    """The processes that hold a replica. The leader of the run may be none of them; it then learns what they agree on.

    Args:
      group: all processes of the run.
      members: those that hold the replica.
    """

    group: ProcessGroup
    members: Members

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Their numbers, ascending."""
        return self.members.ids

    @property
    def are_several(self) -> bool:
        """Whether it takes more than one process to run a step."""
        return len(self.members.ids) > 1

    @property
    def are_here(self) -> bool:
        """Whether this process is one of them."""
        return self.group.process_id in self.members.ids

    def fewest_pages(self, num_pages: int | None = None) -> int:
        """The number of KV pages that all of them have room for.

        Args:
          num_pages: that this process has room for; None if it holds nothing.

        Raises:
          GatherError: one of them could not load its part.
          ProcessLostError: the run has failed.
        """
        return min(map(int, self.group.gather("KV pages", str(num_pages), among=self.members)))

    def loading(self, what: str) -> contextlib.AbstractContextManager[None]:
        """A block in which all of them load their parts; if it raises on one, it raises on all and on the leader."""
        return self.group.together(what, among=self.members)
