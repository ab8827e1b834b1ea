"""Steps that the leader launches are launched by all processes, in its order, and what differs ends the run."""

import dataclasses
import time
import zlib

import numpy as np
import pytest
from group_tools import Group, wait_until

from jaxinfer import EngineConfig
from jaxinfer.communication.connection import Message
from jaxinfer.communication.model_key import ModelKey
from jaxinfer.communication.process_group import Kind
from jaxinfer.communication.progress import ModelProgress, Progress
from jaxinfer.config.attention_span import WHOLE_TEXT
from jaxinfer.errors import EngineClosedError, ProcessLostError
from jaxinfer.wrappers.abstract_model_inference_wrapper import AbstractModelInferenceWrapper
from jaxinfer.wrappers.array_frame import FrameError
from jaxinfer.wrappers.following import FollowingSteps
from jaxinfer.wrappers.leading import LeadingSteps
from jaxinfer.wrappers.remote_model import RemoteModel, pack_remote
from jaxinfer.wrappers.result_frame import pack_result, unpack_result
from jaxinfer.wrappers.step_batch import StepBatch
from jaxinfer.wrappers.step_frame import pack_step
from jaxinfer.wrappers.step_result import LogprobArrays, RowUsage, StepResult
from jaxinfer.wrappers.step_shapes import StepShapes

VOCAB_SIZE = 97
NUM_SLOTS = 4
ALL = (0, 1, 2)


class Echo(AbstractModelInferenceWrapper):
    """Its tokens are a checksum of the step, so that they tell which step it was.

    Args:
      log: gets what is done, in order.
      name: of the model, for the log.
      num_stages: of the pipeline.
    """

    def __init__(self, log, name, num_stages=1):
        config = EngineConfig(max_num_seqs=NUM_SLOTS, pipeline_parallel_size=num_stages, max_num_batched_tokens=16)
        self._shapes = StepShapes(config, max_model_len=32)
        self.log, self.name = log, name
        self.num_launched = 0
        self.wrong_at = None

    shapes = property(lambda self: self._shapes)
    num_pages = property(lambda self: 9)
    row_usage = property(lambda self: RowUsage(live=0, launched=0))
    num_compilations = property(lambda self: 0)

    def launch(self, batch):
        self.log.append((self.name, zlib.crc32(pack_step(batch))))
        self.num_launched += 1
        return self.num_launched - 1, batch

    def collect(self, handle):
        number, batch = handle
        if not batch.has_logits:
            return StepResult(token_ids=np.zeros(0, np.int32))
        token = zlib.crc32(pack_step(batch)) % VOCAB_SIZE + (number == self.wrong_at)
        return StepResult(token_ids=np.full(batch.shape.num_logits, token, np.int32))

    def warmup(self, *, background=False):
        self.log.append((self.name, "warmup"))

    def close(self):
        self.log.append((self.name, "close"))


class Run(Group):
    """A run of three processes with an engine and its draft model; `logs` has what each process has done."""

    def __init__(self, num_processes=3, num_stages=1, **patience):
        self.logs = [[] for _ in range(num_processes)]
        self.models = [[Echo(log, name, num_stages) for name in ("model", "draft")] for log in self.logs]
        self.closed = []
        self.steps = {}

        def prepare(process):
            number = process.process_id
            if process.is_leader:
                self.steps[number] = LeadingSteps(process)
            else:
                self.steps[number] = FollowingSteps(process, on_opened=print, on_closed=self.closed.append)

        super().__init__(num_processes, prepare=prepare, **patience)
        for number in range(1, num_processes):
            for index, wrapper in enumerate(self.models[number]):
                self.steps[number].join(wrapper, ModelKey(0, 0, index), ALL, vocab_size=VOCAB_SIZE)
        self.model, self.draft = [self.steps[0].join(w, ModelKey(0, 0, i), ALL) for i, w in enumerate(self.models[0])]


def step(number):
    """A step that decodes one row."""
    shapes = Echo([], "").shapes
    idle = StepBatch.idle(shapes)
    slots = np.full(idle.shape.num_decode, number % NUM_SLOTS, np.int32)
    return dataclasses.replace(
        idle,
        decode_slots=slots,
        logit_slots=np.full(idle.shape.num_logits, number % NUM_SLOTS, np.int32),
        decode_page_id=np.full(idle.shape.num_decode, number % 9, np.int32),
    )


def test_all_processes_do_what_the_leader_does_in_its_order():
    with Run() as run:
        run.model.warmup()
        for number in range(40):
            handles = [run.model.launch(step(number))]
            if number % 3 == 0:
                handles.append(run.draft.launch(step(number + 1)))
            for wrapper, handle in zip((run.model, run.draft), handles, strict=False):
                wrapper.collect(handle)
        run.draft.close()
        run.model.close()
        wait_until(lambda: run.closed == [0, 0])
        assert run.logs[1] == run.logs[2] == run.logs[0] and len(run.logs[0]) == 1 + 40 + 14 + 2
        wait_until(lambda: not run.model._own and not run.model._theirs)
        assert not run.lost


def test_steps_that_the_engine_does_not_read_leave_no_digests_behind():
    with Run() as run:
        for number in range(30):
            handle = run.model.launch(step(number))
            run.model.launch(StepBatch.idle(run.model.shapes))
            if number % 2:
                run.model.collect(handle)
        wait_until(lambda: not run.model._own and not run.model._theirs)


def test_steps_in_a_pipeline_are_read_once_they_have_left_it():
    with Run(num_stages=3) as run:
        handles = []
        for number in range(20):
            handles.append(run.model.launch(step(number)))
            if number >= 2:
                run.model.collect(handles[number - 2])
        wait_until(lambda: not run.model._theirs)
        assert not run.lost


def run_steps(model, count=10_000):
    for number in range(count):
        model.collect(model.launch(step(number)))


def test_process_that_samples_other_tokens_ends_the_run_with_its_name_and_the_step():
    with Run() as run:
        run.models[2][0].wrong_at = 5
        with pytest.raises(ProcessLostError, match="process 2 has sampled other tokens than process 0 in step 5"):
            run_steps(run.model)
        wait_until(lambda: len(run.lost) == 3)
        assert len(set(run.lost.values())) == 1


@pytest.mark.parametrize("what", ["launch", "collect"])
def test_follower_whose_step_fails_ends_the_run_with_its_error(what):
    def fail(_):
        raise ArithmeticError("a broken device")

    with Run() as run:
        setattr(run.models[1][0], what, fail)
        with pytest.raises(ProcessLostError, match="process 1 of 3 failed: ArithmeticError: a broken device"):
            run_steps(run.model)


def test_leader_whose_step_fails_ends_the_run_with_its_error():
    def fail(_):
        raise ArithmeticError("a broken device")

    with Run() as run:
        run.models[0][0].collect = fail
        with pytest.raises(ProcessLostError, match="process 0 of 3 failed: ArithmeticError: a broken device"):
            run_steps(run.model)
        wait_until(lambda: len(run.lost) == 3)


def test_step_that_waits_for_one_program_after_the_other_is_not_stuck(monkeypatch):
    with Run(step=0.6) as run:
        process, find_stuck = run.processes[0], run.steps[0]._find_stuck
        process.watch(tuple)  # this test asks itself
        waiting = Progress(models={ModelKey(0, 0, 0): ModelProgress(waiting_seconds=9)})
        for is_compiling in (True, False, True, False):
            seen = dataclasses.replace(waiting, is_compiling=is_compiling)
            monkeypatch.setattr(process, "progress_of", lambda _, seen=seen: seen)
            assert find_stuck() == []
        time.sleep(0.7)
        assert find_stuck() == [1, 2]


def test_step_that_is_none_of_the_model_ends_the_run_before_it_is_launched():
    wrong = dataclasses.replace(step(1), decode_slots=np.full(step(1).shape.num_decode, 10**6, np.int32))
    with Run() as run:
        run.processes[0].send(Message(Kind.STEP, 0, ModelKey(0, 0, 0).pack() + pack_step(wrong)))
        wait_until(lambda: len(run.lost) == 3)
        assert "failed: FrameError: " in run.lost[0]
        assert not run.logs[1] and not run.logs[2]


class RemoteRun(Group):
    """A run of three processes of which 1 and 2 hold a replica, and process 0, which leads, holds none of it."""

    def __init__(self):
        self.logs = [[], []]
        self.models = [Echo(log, "model") for log in self.logs]
        self.closed, steps = [], {}

        def prepare(process):
            number = process.process_id
            if process.is_leader:
                steps[number] = LeadingSteps(process)
            else:
                steps[number] = FollowingSteps(process, on_opened=print, on_closed=self.closed.append)

        super().__init__(3, prepare=prepare)
        for number, wrapper in enumerate(self.models, start=1):
            steps[number].join(wrapper, ModelKey(0, 1, 0), (1, 2), vocab_size=VOCAB_SIZE)
        self.remote = RemoteModel(
            self.processes[0], self.models[0].shapes, num_pages=9, span=WHOLE_TEXT, vocab_size=VOCAB_SIZE
        )
        self.model = steps[0].join(self.remote, ModelKey(0, 1, 0), (1, 2))


def test_leader_without_devices_gets_the_tokens_of_the_others():
    alone = Echo([], "model")
    with RemoteRun() as run:
        run.model.warmup()
        assert run.logs[0] == [("model", "warmup")]  # it has waited for process 1
        waiting = []
        for number in range(40):
            waiting.append((run.model.launch(step(number)), alone.launch(step(number))))
            if len(waiting) > 2:
                handle, expected = waiting.pop(0)
                if number % 5:  # an engine need not read a step
                    found, expected = run.model.collect(handle), alone.collect(expected)
                    np.testing.assert_array_equal(found.token_ids, expected.token_ids)
        handle = run.model.launch(StepBatch.idle(run.model.shapes))
        assert not len(run.model.collect(handle).token_ids)
        run.model.close()
        wait_until(lambda: run.closed == [0, 0])
        assert run.logs[0] == run.logs[1] and len(run.logs[0]) == 1 + 41 + 1
        assert run.model.row_usage.live > 0
        del handle, waiting, found
        assert not run.remote._steps and not run.remote._early
        with pytest.raises(EngineClosedError):
            run.model.warmup()
        assert not run.lost


def test_results_that_come_before_launch_has_returned_are_kept():
    with RemoteRun() as run:
        tokens = StepResult(token_ids=np.array([5], np.int32))
        run.remote.hear(0, pack_remote(tokens, num_compilations=3))
        np.testing.assert_array_equal(run.remote.collect(run.remote.launch(step(1))).token_ids, [5])
        assert run.remote.num_compilations == 3


def test_holder_that_samples_other_tokens_ends_the_run_of_a_leader_without_devices():
    with RemoteRun() as run:
        run.models[1].wrong_at = 5
        with pytest.raises(ProcessLostError, match="process 2 has sampled other tokens than process 1 in step 5"):
            run_steps(run.model)
        wait_until(lambda: len(run.lost) == 3)


def test_holder_whose_step_fails_ends_the_wait_of_a_leader_without_devices():
    def fail(_):
        raise ArithmeticError("a broken device")

    with RemoteRun() as run:
        run.models[0].collect = fail
        with pytest.raises(ProcessLostError, match="process 1 of 3 failed: ArithmeticError: a broken device"):
            run.model.collect(run.model.launch(step(1)))


def logprobs_of(generator, count, num_top):
    return LogprobArrays(
        logprob=generator.random(count, np.float32),
        rank=generator.integers(1, 9, count, np.int32),
        top_ids=generator.integers(0, VOCAB_SIZE, (count, num_top), np.int32),
        top_logprobs=generator.random((count, num_top), np.float32),
    )


@pytest.mark.parametrize(("count", "num_top", "num_scores"), [(0, None, None), (3, None, 4), (2, 5, None), (7, 0, 2)])
def test_results_come_out_of_their_frames_as_they_were(count, num_top, num_scores):
    generator = np.random.default_rng(count)
    result = StepResult(
        token_ids=generator.integers(0, VOCAB_SIZE, count, np.int32),
        logprobs=None if num_top is None else logprobs_of(generator, count, num_top),
        scores=None if num_scores is None else logprobs_of(generator, num_scores, 3),
    )
    frame = pack_result(result)
    found = unpack_result(frame, vocab_size=VOCAB_SIZE)
    np.testing.assert_equal(dataclasses.asdict(found), dataclasses.asdict(result))
    for broken in (frame[:-1], frame[: len(frame) // 2], frame + b"0000", b""):
        with pytest.raises(FrameError):
            unpack_result(broken, vocab_size=VOCAB_SIZE)
    if count:
        with pytest.raises(FrameError, match=r"token_ids must be in 0\.\.0"):
            unpack_result(frame, vocab_size=1)
