"""What heartbeats say, and which process is stuck."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.communication.progress import Patience, Progress, stuck


@given(st.integers(0, 2**63), st.floats(0, 1e6), st.booleans())
def test_progress_comes_out_of_its_message_as_it_was(num_launched, waiting_seconds, is_compiling):
    progress = Progress(num_launched=num_launched, waiting_seconds=waiting_seconds, is_compiling=is_compiling)
    assert Progress.unpack(progress.pack()) == progress


@pytest.mark.parametrize(
    ("launched", "waiting", "compiling", "found"),
    [
        ([9, 9, 9], [0, 0, 0], [], []),
        ([9, 9, 9], [1, 4, 1], [], []),
        ([9, 8, 9], [6, 0, 6], [], [1]),  # process 1 has not launched what the others wait for
        ([8, 9, 9], [0, 6, 6], [], [0]),
        ([8, 8, 9], [0, 0, 6], [], [0, 1]),
        ([9, 9, 9], [6, 6, 1], [], [0, 1]),  # all have launched it: those that wait are named
        ([9, 8, 9], [6, 0, 6], [1], []),
    ],
)
def test_stuck_names_those_for_which_the_others_wait(launched, waiting, compiling, found):
    progress = {
        i: Progress(num_launched=launched[i], waiting_seconds=waiting[i], is_compiling=i in compiling) for i in range(3)
    }
    assert stuck(progress, num_sent=dict.fromkeys(range(3), 9), waiting_seconds=0, limit=5) == found


def test_stuck_names_the_holders_if_only_the_leader_waits():
    idle = {1: Progress(num_launched=9), 2: Progress(num_launched=9)}
    assert stuck(idle, num_sent={1: 9, 2: 9}, waiting_seconds=6, limit=5) == [1, 2]
    assert stuck(idle, num_sent={1: 9, 2: 10}, waiting_seconds=6, limit=5) == [2]
    assert stuck(idle, num_sent={1: 9, 2: 10}, waiting_seconds=4, limit=5) == []


def test_patience_zero_is_refused():
    with pytest.raises(ValueError, match="silence must be > 0 seconds, got 0"):
        Patience(silence=0)
