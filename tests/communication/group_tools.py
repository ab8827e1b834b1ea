"""Several processes of a run as threads of one, with real sockets between them."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

from jaxinfer.communication import process_group
from jaxinfer.communication.follower import Follower
from jaxinfer.communication.leader import Leader
from jaxinfer.communication.membership import Membership
from jaxinfer.communication.progress import Patience
from jaxinfer.communication.rendezvous import await_followers, find_leader

SECRET = "a secret of the tests"
VERSIONS = {"jax": "1.0"}


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


def meet(process_id, address, *, num_processes=2, secret=SECRET, versions=VERSIONS, seconds=20.0):
    """What a process of a run does first: its connections."""
    membership = Membership(address=address, num_processes=num_processes, process_id=process_id, secret=secret)
    if process_id == 0:
        return await_followers(membership, versions=versions, seconds=seconds)
    return find_leader(membership, versions=versions, seconds=seconds)


def at_once(*functions):
    """Calls functions in a thread each; returns their results, or the exceptions that they raised."""

    def outcome(function):
        try:
            return function()
        except BaseException as error:
            return error

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(outcome, functions))


process_group._BLAME_SECONDS = 0.5  # here nothing else takes long enough to be the reason later


class Group:
    """The processes of a run; `lost` collects what would end them.

    Args:
      num_processes: how many.
      prepare: called with each process before it listens.
    """

    def __init__(self, num_processes=2, *, prepare=lambda process: None, **patience):
        address, patience = free_address(), Patience(**patience)
        self.lost = {}
        found = at_once(*(lambda i=i: meet(i, address, num_processes=num_processes) for i in range(num_processes)))
        self.processes = [
            Leader(found[0][0], patience=patience, on_lost=lambda error: self.lost.setdefault(0, str(error)))
        ]
        for i in range(1, num_processes):
            self.processes.append(
                Follower(
                    i,
                    num_processes,
                    found[i][0],
                    patience=patience,
                    on_lost=lambda error, i=i: self.lost.setdefault(i, str(error)),
                )
            )
        for process in self.processes:
            prepare(process)
            process.start()
        assert self.each(lambda process: process.settle()) == [None] * num_processes

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            for peer in process._peers:
                peer.has_left = True
        for process in self.processes:
            process._close()

    def each(self, work, processes=None):
        """Calls work(process) for all processes, or for some, at once; returns their results or exceptions."""
        return at_once(*(lambda process=process: work(process) for process in processes or self.processes))


def wait_until(condition, seconds=20.0):
    """Waits for a condition and fails if it does not come true."""
    event = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        event.wait(0.01)
    raise AssertionError("the condition did not come true in time")
