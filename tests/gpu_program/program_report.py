"""What XLA made of a program for a GPU, read from the files that it dumps.

XLA's GPU backend ends with a sequence of thunks, each of which starts one thing on the device: a kernel, a copy, a
command buffer (a CUDA graph), which holds thunks itself, or a loop or conditional, whose parts are sequences of thunks.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

_THUNK = re.compile(r"^\s*\d+: k(\w+)\s+(?:\[[^\]]*\])?\s*(\S*)")
_PART = re.compile(r"(\w*(?:branch|body|condition)\w*):")
_COLLECTIVE_THUNK = re.compile("AllReduce|AllGather|AllToAll|ReduceScatter|Collective|Permute")
_NO_LAUNCH = {"CommandBuffer", "While", "Conditional", "Sequential", "WaitForStreams"}
_NO_LAUNCH |= {"AsyncStart", "AsyncDone", "DynamicSliceFusion"}
_COLLECTIVE = re.compile(
    r" = (\(.*?\)|\S+) (all-reduce|all-gather|collective-permute|all-to-all|reduce-scatter)(-start)?\("
)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")


@dataclass
class Thunk:
    """One thunk.

    Args:
      kind: XLA's name of its kind, without the "k".
      name: the kernel's name; empty for kinds without one.
      parts: the thunks inside it, by part: "true_branch", "body" and so on; "" for a command buffer's.
    """

    kind: str
    name: str
    parts: dict[str, list[Thunk]] = field(default_factory=dict)

    @property
    def is_launch(self) -> bool:
        """Whether it starts one kernel or copy."""
        return self.kind not in _NO_LAUNCH and not self.is_collective

    @property
    def is_collective(self) -> bool:
        return bool(_COLLECTIVE_THUNK.search(self.kind))

    def everything(self) -> Iterable[Thunk]:
        """This thunk and all inside it."""
        yield self
        for part in self.parts.values():
            for thunk in part:
                yield from thunk.everything()


def parse_thunks(text: str) -> list[Thunk]:
    """The thunks of a program, from XLA's file *thunk_sequence*.txt."""
    root = Thunk("Sequential", "")
    open_thunks, part = [(-1, root)], {id(root): ""}
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        found = _THUNK.match(line)
        labels = [] if found else _PART.findall(line)
        if not found and not labels:
            continue
        # A loop's "condition:" stands as far left as the loop itself.
        while open_thunks[-1][0] >= indent + bool(labels):
            open_thunks.pop()
        owner = open_thunks[-1][1]
        if labels:
            part[id(owner)] = labels[-1]
            for label in labels:
                owner.parts.setdefault(label, [])
            continue
        thunk = Thunk(found[1], found[2])
        owner.parts.setdefault(part[id(owner)], []).append(thunk)
        part[id(thunk)] = ""
        open_thunks.append((indent, thunk))
    return root.parts.get("", [])


def num_launches(thunks: Iterable[Thunk], branch: Callable[[Iterable[int]], int]) -> int:
    """Kernels and copies on one way through a program without loops; branch (min or max) picks a conditional's way."""
    total = 0
    for thunk in thunks:
        inside = [num_launches(part, branch) for part in thunk.parts.values()]
        total += thunk.is_launch + (branch(inside) if thunk.kind == "Conditional" else sum(inside))
    return total


@dataclass(frozen=True, kw_only=True)
class Collectives:
    """Collectives of one kind with equal results.

    Args:
      kind: such as "all-reduce".
      arrays: what each returns, such as "bf16[32,4096]".
      count: how many the program has.
      num_bytes: of one result.
    """

    kind: str
    arrays: str
    count: int
    num_bytes: int


def find_collectives(hlo: str) -> list[Collectives]:
    """The collectives in the text of a compiled program."""
    found: Counter[tuple[str, str]] = Counter()
    for result, kind, start in _COLLECTIVE.findall(hlo):
        arrays = _ARRAY.findall(result)
        if start and len(arrays) > 1:  # the operands come first
            arrays = arrays[len(arrays) // 2 :]
        found[kind, " ".join(f"{dtype}[{dims}]" for dtype, dims in arrays)] += 1
    return [
        Collectives(kind=kind, arrays=arrays, count=count, num_bytes=num_bytes(arrays))
        for (kind, arrays), count in sorted(found.items())
    ]


def num_bytes(arrays: str) -> int:
    """Bytes of arrays as HLO writes them, such as "bf16[32,4096]"."""
    total = 0
    for dtype, dims in _ARRAY.findall(arrays):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        total += math.prod(int(extent) for extent in dims.split(",") if extent) * bits // 8
    return total


def array_shapes(hlo: str) -> set[tuple[int, ...]]:
    """The shapes of all arrays in the text of a compiled program."""
    return {tuple(int(extent) for extent in dims.split(",") if extent) for _, dims in _ARRAY.findall(hlo)}
