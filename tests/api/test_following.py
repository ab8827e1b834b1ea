"""A process without a script refuses what it cannot load, and the leader learns why."""

import json

from group_tools import Group, at_once

from jaxinfer.api.following import follow_run
from jaxinfer.api.shared_engine import OPENING
from jaxinfer.communication.calls import FollowingCalls, LeadingCalls
from jaxinfer.communication.ending import ProcessEnd
from jaxinfer.communication.process_group import GatherError
from jaxinfer.distributed import FollowerRun
from jaxinfer.wrappers.following import FollowingSteps


class Run(Group):
    """A run of two processes, of which the second one follows."""

    def __init__(self):
        def prepare(process):
            if process.is_leader:
                self.calls = LeadingCalls(process)
            else:
                calls = FollowingCalls(process)
                steps = FollowingSteps(process, on_opened=calls.open, on_closed=calls.close)
                self.follower = FollowerRun(group=process, steps=steps, calls=calls, end=ProcessEnd(process))

        super().__init__(2, prepare=prepare)


def test_follower_refuses_weights_in_memory_and_unknown_settings_and_goes_on():
    with Run() as run:
        leader = run.processes[0]

        def lead():
            errors = []
            for model, engine in ((None, {}), ("demo", {"pagesize": 8})):
                run.calls.open(json.dumps({"model": model, "tokenizer": None, "engine": engine}))
                try:
                    with leader.together(OPENING):
                        pass
                except GatherError as error:
                    errors.append(str(error))
            leader.leave()
            return errors

        def follow():
            all_loaded = follow_run(run.follower)
            run.follower.group.leave()
            return all_loaded

        errors, all_loaded = at_once(lead, follow)
        assert not all_loaded
        assert "process 1 failed" in errors[0] and "weights in memory" in errors[0]
        assert errors[1].endswith("TypeError: unknown argument 'pagesize'; did you mean 'page_size'?")
