"""Every process finds out which one it is from what its launcher sets."""

import pytest

from jaxinfer.communication.membership import DEFAULT_PORT, Membership, find_membership, first_host, split_address

SECRET = {"JAXINFER_SECRET": "s3cret-s3cret"}
SLURM = {
    "SLURM_JOB_ID": "1000003",
    "SLURM_STEP_NODELIST": "gpu[007-008],big1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
KUBERNETES = {"JOB_COMPLETION_INDEX": "1", "JAXINFER_NUM_PROCESSES": "2", "JAXINFER_ADDRESS": "run-0.run"}


def numbers(found):
    return found.process_id, found.num_processes, found.local_process_id, found.num_local_processes


def test_membership_slurm_first_node_leads_and_the_job_chooses_the_port():
    found = find_membership(SLURM | SECRET)
    assert numbers(found) == (3, 5, 1, 2) and not found.is_leader
    assert found.address == f"gpu007:{51_000 + 1_000_003 % 10_000}"
    assert find_membership(SLURM | SECRET | {"SLURM_JOB_ID": "1000004"}).address != found.address


def test_membership_open_mpi_needs_an_address():
    with pytest.raises(ValueError, match=r"address \(JAXINFER_ADDRESS\) of this process"):
        find_membership(OPEN_MPI | SECRET)
    found = find_membership(OPEN_MPI | SECRET, address="node1:4000")
    assert numbers(found) == (2, 4, 0, 2) and found.address == "node1:4000"


def test_membership_kubernetes_indexed_job_address_without_port_gets_the_default():
    found = find_membership(KUBERNETES | SECRET)
    assert numbers(found) == (1, 2, 0, 1) and found.address == f"run-0.run:{DEFAULT_PORT}"


def test_membership_arguments_win_over_own_variables_and_those_over_the_launchers():
    own = {"JAXINFER_ADDRESS": "a:1", "JAXINFER_NUM_PROCESSES": "7", "JAXINFER_PROCESS_ID": "6"}
    assert numbers(find_membership(SLURM | own | SECRET))[:2] == (6, 7)
    found = find_membership(SLURM | own | SECRET, process_id=0, secret="another one")
    assert numbers(found)[:2] == (0, 7) and found.is_leader and found.secret == "another one"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, r"address .*, num_processes .*, process_id .* of this process; start it with `jaxinfer launch`"),
        (SLURM, "JAXINFER_SECRET to the same random text"),
        (SLURM | {"JAXINFER_SECRET": "short"}, "at least 8 characters, got 5"),
        (SLURM | SECRET | {"SLURM_PROCID": "x"}, "SLURM_PROCID must be a number, got 'x'"),
        (SLURM | SECRET | {"SLURM_PROCID": "5"}, r"process_id must be in 0\.\.4, got 5"),
        (SLURM | SECRET | {"SLURM_NODEID": "3"}, "SLURM_NODEID is 3"),
        (SLURM | SECRET | {"JAXINFER_ADDRESS": "a:b:c"}, "an address must be"),
    ],
)
def test_membership_what_is_missing_or_wrong_is_named(variables, message):
    with pytest.raises(ValueError, match=message):
        find_membership(variables)


def test_membership_single_process_needs_neither_address_nor_secret():
    assert numbers(find_membership({"SLURM_STEP_NUM_TASKS": "1"})) == (0, 1, 0, 1)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[003-005,9],x", "gpu003"), ("a[1,3]-ib,b", "a1-ib"), ("c[12]", "c12")],
)
def test_first_host_lists_as_slurm_writes_them(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("address", "parts"), [("host:80", ("host", 80)), ("10.0.0.1:65535", ("10.0.0.1", 65535)), ("[::1]:9", ("::1", 9))]
)
def test_split_address_takes_names_and_both_kinds_of_addresses(address, parts):
    assert split_address(address) == parts


@pytest.mark.parametrize("address", ["host", "host:", "host:0", "host:65536", "::1:9", ":9", "h ost:x"])
def test_split_address_other_forms_are_refused(address):
    with pytest.raises(ValueError, match="an address must be"):
        split_address(address)


def test_membership_repr_does_not_show_the_secret():
    assert "hidden-secret" not in repr(Membership(address="a:1", num_processes=2, process_id=0, secret="hidden-secret"))
