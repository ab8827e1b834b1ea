"""Processes that belong together find each other; what is wrong at the start is one line on all of them."""

import contextlib
import functools
import socket

import pytest
from group_tools import SECRET, at_once, free_address, meet, wait_until

from jaxinfer.communication.connection import Connection, ConnectionLostError, Message, RefusedError


@pytest.fixture(autouse=True)
def no_late_processes(monkeypatch):
    monkeypatch.setattr("jaxinfer.communication.rendezvous._LATE_SECONDS", 0.2)


def refused(*processes):
    """The line with which each process ends, of which all have to be the same."""
    errors = at_once(*processes)
    for error in errors:
        assert isinstance(error, (RefusedError, TimeoutError)), error
    assert len({str(error) for error in errors}) == 1, errors
    assert "\n" not in str(errors[0])
    return str(errors[0])


def processes(num_processes, **of_one):
    """The processes of a run, one of which has other arguments: index -> arguments."""
    address = free_address()
    return [
        functools.partial(meet, i, address, **{"num_processes": num_processes, **of_one.get(f"process_{i}", {})})
        for i in range(num_processes)
    ]


def test_rendezvous_all_get_the_leaders_facts_and_connections_in_order():
    leader, *followers = at_once(*processes(4))
    connections, facts = leader
    assert list(connections) == [1, 2, 3]
    assert [found for _, found in followers] == [facts] * 3
    host, port = facts["coordinator"].split(":")
    assert host == "127.0.0.1" and 0 < int(port) < 65536
    for number, (connection, _) in enumerate(followers, start=1):
        connection.send(Message(7, number, b"hello"))
        assert connections[number].receive() == Message(7, number, b"hello")
    for connection in [*connections.values(), *(connection for connection, _ in followers)]:
        connection.close()


def test_rendezvous_follower_that_starts_first_waits_for_the_leader():
    leader, follower = processes(2)
    found = []

    def late_leader():
        wait_until(lambda: not found, 1)
        return leader()

    (connections, _), (connection, _) = at_once(late_leader, follower)
    connection.close()
    connections[1].close()


def test_rendezvous_wrong_secret_ends_all():
    line = refused(*processes(3, process_2={"secret": "not the secret"}))
    assert line == "process 2 (127.0.0.1) has another secret than process 0"


def test_rendezvous_other_version_ends_all():
    line = refused(*processes(3, process_1={"versions": {"jax": "1.1"}}))
    assert line == "process 1 has jax 1.1, process 0 has 1.0; install the same version everywhere"


def test_rendezvous_other_number_of_processes_ends_all():
    assert "process 1 was started as one of 3 processes, process 0 as one of 2" in refused(
        *processes(2, process_1={"num_processes": 3})
    )


def test_rendezvous_two_processes_with_one_number_end_all():
    address = free_address()
    same = functools.partial(meet, 1, address, num_processes=3)
    assert "two processes of the run say that they are process 1" in refused(
        functools.partial(meet, 0, address, num_processes=3), same, same
    )


def test_rendezvous_missing_process_is_named_on_all():
    leader, follower, _ = processes(3, process_0={"seconds": 0.5})
    assert "process 2 did not connect to process 0 at 127.0.0.1" in refused(leader, follower)


def test_rendezvous_missing_leader_is_an_error_with_its_address():
    address = free_address()
    with pytest.raises(TimeoutError, match=f"process 0 could not be reached at {address} within 0.5 s"):
        meet(1, address, seconds=0.5)


def test_rendezvous_address_in_use_says_so():
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(OSError, match=f"process 0 cannot listen on {address} .*a free port"):
            meet(0, address)


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 4, b"\x00" * 100])
def test_rendezvous_strangers_are_dropped_and_the_run_begins(sent):
    leader, follower = processes(2)
    address = leader.args[1].split(":")

    def stranger_then_follower():
        def connected():
            try:
                stream = socket.create_connection(address)
            except OSError:
                return False
            stream.sendall(sent)
            stream.close()
            return True

        wait_until(connected)
        return follower()

    (connections, _), (connection, _) = at_once(leader, stranger_then_follower)
    connection.close()
    connections[1].close()


def test_find_leader_something_else_that_answers_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            stream, _ = listener.accept()
            stream.sendall(b"SSH-2.0-OpenSSH_9.6 and so on\r\n")
            stream.close()

        _, error = at_once(answer, lambda: meet(1, f"127.0.0.1:{listener.getsockname()[1]}"))
    assert isinstance(error, ConnectionLostError)
    assert "did not answer as it should: received what is no message of jaxinfer" in str(error)


def test_find_leader_does_not_trust_a_leader_without_the_secret():
    leader, follower = processes(2, process_0={"secret": "stolen address"})
    assert all(isinstance(error, RefusedError) for error in at_once(leader, follower))
    assert SECRET not in repr(leader)


def test_connection_payload_beyond_the_limit_is_refused_on_both_sides():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = Connection(socket.create_connection(listener.getsockname()))
        far = Connection(listener.accept()[0])
    with contextlib.closing(near), contextlib.closing(far):
        near.send(Message(1, payload=bytes(100)))
        with pytest.raises(ConnectionLostError, match="no message of jaxinfer"):
            far.receive(max_payload=99)
