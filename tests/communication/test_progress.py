"""What heartbeats say, and which process is stuck."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.communication.connection import ConnectionLostError
from jaxinfer.communication.model_key import ModelKey
from jaxinfer.communication.progress import Awaited, ModelProgress, Patience, Progress, stuck

KEYS = st.builds(ModelKey, *[st.integers(0, 2**16 - 1)] * 3)
MODELS = st.builds(ModelProgress, num_launched=st.integers(0, 2**63), waiting_seconds=st.floats(0, 1e6))
FIRST, SECOND = ModelKey(0, 0, 0), ModelKey(0, 1, 0)


@given(st.builds(Progress, is_compiling=st.booleans(), models=st.dictionaries(KEYS, MODELS, max_size=5)))
def test_progress_comes_out_of_its_message_as_it_was(progress):
    assert Progress.unpack(progress.pack()) == progress
    with pytest.raises(ConnectionLostError):
        Progress.unpack(progress.pack() + b"00")


def progress_of(launched, waiting, *, key=FIRST, compiling=False):
    return Progress(is_compiling=compiling, models={key: ModelProgress(num_launched=launched, waiting_seconds=waiting)})


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
    progress = {i: progress_of(launched[i], waiting[i], compiling=i in compiling) for i in range(3)}
    models = {FIRST: Awaited(holders=(0, 1, 2), num_sent=9, waiting_seconds=waiting[0])}
    assert stuck(progress, models, limit=5) == found


def test_stuck_names_the_holders_if_only_the_leader_waits():
    progress = {0: Progress(), 1: progress_of(9, 0), 2: progress_of(9, 0)}
    for num_sent, waiting, found in ((9, 6, [1, 2]), (10, 6, [1, 2]), (10, 4, [])):
        models = {FIRST: Awaited(holders=(1, 2), num_sent=num_sent, waiting_seconds=waiting)}
        assert stuck(progress, models, limit=5) == found


def test_stuck_names_no_process_whose_other_model_waits_for_somebody_else():
    both = progress_of(9, 0).models | progress_of(4, 6, key=SECOND).models
    for num_sent in (9, 10):  # the first model's step waits on the devices of process 1, or for its thread
        progress = {0: progress_of(num_sent, 0), 1: Progress(models=both), 2: progress_of(3, 0, key=SECOND)}
        models = {
            FIRST: Awaited(holders=(0, 1), num_sent=num_sent, waiting_seconds=6),
            SECOND: Awaited(holders=(1, 2), num_sent=4, waiting_seconds=6),
        }
        assert stuck(progress, models, limit=5) == [2]
    hanging = progress | {2: progress_of(4, 6, key=SECOND)}  # all have launched the second model's step
    assert stuck(hanging, models, limit=5) == [1, 2]


def test_stuck_waits_only_for_compilations_that_a_step_could_wait_for():
    progress = {0: Progress(), 1: progress_of(3, 6), 2: progress_of(9, 0, key=SECOND, compiling=True)}
    models = {
        FIRST: Awaited(holders=(1,), num_sent=4, waiting_seconds=6),
        SECOND: Awaited(holders=(2,), num_sent=9, waiting_seconds=0),
    }
    assert stuck(progress, models, limit=5) == [1]
    models[ModelKey(1, 0, 0)] = Awaited(holders=(1, 2), num_sent=0, waiting_seconds=0)
    assert stuck(progress, models, limit=5) == []


def test_patience_zero_is_refused():
    with pytest.raises(ValueError, match="silence must be > 0 seconds, got 0"):
        Patience(silence=0)
