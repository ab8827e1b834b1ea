"""Which process of a run this one is, and where its leader can be reached.

Owns: Membership, and reading it from the environment that Slurm, Open MPI, Kubernetes or `jaxinfer launch` sets.
Does not know: sockets, jax.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

ADDRESS, NUM_PROCESSES, PROCESS_ID = "JAXINFER_ADDRESS", "JAXINFER_NUM_PROCESSES", "JAXINFER_PROCESS_ID"
NUM_LOCAL_PROCESSES, LOCAL_PROCESS_ID = "JAXINFER_NUM_LOCAL_PROCESSES", "JAXINFER_LOCAL_PROCESS_ID"
SECRET = "JAXINFER_SECRET"
DEFAULT_PORT = 12421
_SLURM_PORTS = range(51_000, 61_000)
"""Jobs that share a node listen on ports of their own, which their numbers choose."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Membership:
    """One process of a run.

    Args:
      address: "host:port" at which process 0, the leader, can be reached by all others.
      num_processes: processes of the run.
      process_id: number of this process, from 0.
      num_local_processes, local_process_id: the same among the processes on this machine, which share its devices.
      secret: what all processes of a run know and nobody else does.

    Raises:
      ValueError: a number is out of range, the address has no port, or the secret is too short.
    """

    address: str
    num_processes: int
    process_id: int
    num_local_processes: int = 1
    local_process_id: int = 0
    secret: str = field(repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(f"process_id must be in 0..{self.num_processes - 1}, got {self.process_id}")
        if not 0 <= self.local_process_id < self.num_local_processes <= self.num_processes:
            raise ValueError(
                f"expected local_process_id < num_local_processes <= num_processes, got {self.local_process_id}, "
                f"{self.num_local_processes}, {self.num_processes}"
            )
        split_address(self.address)
        if self.num_processes > 1 and len(self.secret) < 8:
            raise ValueError(
                f"the processes of a run recognise each other by a secret of at least 8 characters, got "
                f"{len(self.secret)}; set {SECRET} to the same random text on all of them, for example to that of "
                f"`openssl rand -hex 32`"
            )

    @property
    def is_leader(self) -> bool:
        """Whether this is process 0, which decides what all processes do."""
        return self.process_id == 0


def split_address(address: str) -> tuple[str, int]:
    """Splits "host:port" or "[IPv6 address]:port".

    Raises:
      ValueError: it has another form.
    """
    found = re.fullmatch(r"(?:\[([^\]]+)\]|([^:\[\]]+)):(\d{1,5})", address)
    if found is None or not 0 < int(found[3]) < 65536 or not _is_ipv6(found[1]):
        raise ValueError(f'an address must be "host:port" or "[IPv6 address]:port", got {address!r}')
    return found[1] or found[2], int(found[3])


def _is_ipv6(text: str | None) -> bool:
    """Whether a text, if there is one, is an IPv6 address."""
    try:
        return text is None or ipaddress.ip_address(text).version == 6
    except ValueError:
        return False


def join_address(host: str, port: int) -> str:
    """The opposite of split_address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def find_membership(
    environment: Mapping[str, str],
    *,
    address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    secret: str | None = None,
) -> Membership:
    """Finds out which process this is.

    Each value comes from the first of these that has it: the arguments, the JAXINFER_ variables (which `jaxinfer
    launch` sets), Slurm's, Open MPI's, those of a Kubernetes Indexed Job.

    Args:
      environment: variables, usually os.environ.
      address, num_processes, process_id, secret: as Membership's; None looks in the environment. An address without a
        port gets DEFAULT_PORT.

    Raises:
      ValueError: something is in none of them, or has a wrong value.
    """
    address = address or _first(environment, ADDRESS) or _slurm_address(environment)
    if num_processes is None:
        num_processes = _number(environment, NUM_PROCESSES, "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    if process_id is None:
        process_id = _number(environment, PROCESS_ID, "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "JOB_COMPLETION_INDEX")
    if num_processes == 1:
        address, process_id = address or f"localhost:{DEFAULT_PORT}", process_id or 0
    missing = [
        f"{name} ({variable})"
        for name, variable, value in (
            ("address", ADDRESS, address),
            ("num_processes", NUM_PROCESSES, num_processes),
            ("process_id", PROCESS_ID, process_id),
        )
        if value is None
    ]
    if address is None or num_processes is None or process_id is None:
        raise ValueError(
            f"cannot find out {', '.join(missing)} of this process; start it with `jaxinfer launch` or srun, or pass "
            "these as arguments or variables"
        )
    local_id = _number(environment, LOCAL_PROCESS_ID, "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")
    num_local = _number(environment, NUM_LOCAL_PROCESSES, "OMPI_COMM_WORLD_LOCAL_SIZE")
    if num_local is None:
        num_local = _slurm_tasks_of_node(environment)
    return Membership(
        address=address if re.search(r":\d+$", address) else join_address(address.strip("[]"), DEFAULT_PORT),
        num_processes=num_processes,
        process_id=process_id,
        num_local_processes=1 if num_local is None or local_id is None else num_local,
        local_process_id=0 if num_local is None or local_id is None else local_id,
        secret=secret if secret is not None else environment.get(SECRET, ""),
    )


def _first(environment: Mapping[str, str], *names: str) -> str | None:
    return next((environment[name] for name in names if environment.get(name)), None)


def _number(environment: Mapping[str, str], *names: str) -> int | None:
    for name in names:
        text = environment.get(name)
        if text:
            if not text.isdecimal():
                raise ValueError(f"the environment variable {name} must be a number, got {text!r}")
            return int(text)
    return None


def _slurm_address(environment: Mapping[str, str]) -> str | None:
    """The first node of the job step, and a port that the job's number chooses."""
    nodes, job = _first(environment, "SLURM_STEP_NODELIST"), _number(environment, "SLURM_JOB_ID")
    if nodes is None or job is None:
        return None
    return join_address(first_host(nodes), _SLURM_PORTS[job % len(_SLURM_PORTS)])


def first_host(nodes: str) -> str:
    """The first host of a list as Slurm writes it: "gpu[003-005,9],login" begins with gpu003.

    Raises:
      ValueError: the list has another form.
    """
    found = re.match(r"([^,\[\]]*)(?:\[(\w+)[^\]]*\])?([^,\[\]]*)", nodes)
    host = "".join(part or "" for part in found.groups()) if found else ""
    if not host:
        raise ValueError(f"cannot read the list of nodes {nodes!r}")
    return host


def _slurm_tasks_of_node(environment: Mapping[str, str]) -> int | None:
    """How many tasks of the job step run on this node; Slurm writes "2(x3),1" for 2, 2, 2 and 1."""
    text, node = _first(environment, "SLURM_STEP_TASKS_PER_NODE"), _number(environment, "SLURM_NODEID")
    if text is None or node is None:
        return None
    counts: list[int] = []
    for entry in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry)
        if found is None:
            raise ValueError(f"cannot read SLURM_STEP_TASKS_PER_NODE {text!r}")
        counts += [int(found[1])] * int(found[2] or 1)
    if node >= len(counts):
        raise ValueError(f"SLURM_NODEID is {node}, but SLURM_STEP_TASKS_PER_NODE {text!r} has {len(counts)} nodes")
    return counts[node]
