"""Runs of several processes, on one machine or many, which hold one model together.

Owns: initialize(), and the run that this process takes part in.
Does not know: requests, text.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxinfer.communication.calls import FollowingCalls, LeadingCalls
from jaxinfer.communication.connection import Connection
from jaxinfer.communication.ending import EXIT_LOST, ProcessEnd, end_later
from jaxinfer.communication.follower import Follower
from jaxinfer.communication.leader import Leader
from jaxinfer.communication.membership import Membership, find_membership
from jaxinfer.communication.progress import Patience
from jaxinfer.communication.rendezvous import await_followers, find_leader
from jaxinfer.wrappers.following import FollowingSteps
from jaxinfer.wrappers.jax_start import num_nvidia_gpus, start_jax
from jaxinfer.wrappers.leading import LeadingSteps

_INITIALIZATION_SECONDS = 300
_HEARTBEAT_SECONDS = 60
_SHUTDOWN_SECONDS = 30
"""What jax.distributed may take. The run's own limits (Patience) are shorter and come first."""
_MAX_BOOT_BYTES = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaderRun:
    """A run as process 0 sees it: the processes, the steps it leads, the calls it carries out, and how it ends."""

    group: Leader
    steps: LeadingSteps
    calls: LeadingCalls
    end: ProcessEnd


@dataclass(frozen=True, kw_only=True, slots=True)
class FollowerRun:
    """A run as another process sees it: the processes, the steps and calls in which it follows, and how it ends."""

    group: Follower
    steps: FollowingSteps
    calls: FollowingCalls
    end: ProcessEnd


Run = LeaderRun | FollowerRun
_run: Run | None = None


def initialize(
    address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    secret: str | None = None,
    local_device_ids: Sequence[int] | None = None,
    bind_host: str | None = None,
    gpu_memory_utilization: float = 0.9,
    patience: Patience | None = None,
) -> None:
    """Joins the other processes of a run; call it before anything else uses JAX.

    Afterwards an LLM is spread over the devices of all processes. Either every process runs the same script: process 0
    computes, and all get the same outputs. Or process 0 serves, and the others call `llm.follow()` once their LLM is
    made. What is not given is found in the environment, as `jaxinfer launch`, Slurm, Open MPI or a Kubernetes Indexed
    Job set it. A run of one process needs no others and does nothing here.

    Args:
      address: "host:port" at which process 0 can be reached.
      num_processes: processes of the run.
      process_id: number of this process, from 0.
      secret: a text that all processes of the run know; None takes the environment variable JAXINFER_SECRET.
      local_device_ids: the GPUs of this machine that this process takes; None takes all of them, or an equal share
        where several processes of the run are on this machine.
      bind_host: the address on which process 0 listens; None is that of `address`. Nothing listens on all interfaces
        unless this is "0.0.0.0" or "::".
      gpu_memory_utilization: the share of every GPU's memory that JAX takes, since it starts here, and not with the
        first LLM.
      patience: how long to wait for others; None is Patience().

    Raises:
      ValueError: something could not be found, or is wrong.
      RuntimeError: this process takes part in a run already, or is refused by it: another secret, other versions, ...
      TimeoutError, OSError: the others could not be reached.
    """
    if _run is not None or jax.distributed.is_initialized():
        raise RuntimeError("this process takes part in a run already; call initialize once, before the first LLM")
    membership = find_membership(
        os.environ, address=address, num_processes=num_processes, process_id=process_id, secret=secret
    )
    if membership.num_processes == 1:
        return
    if local_device_ids is None:
        local_device_ids = _share_of_gpus(membership)
    run, facts = _meet(membership, patience or Patience(), bind_host)
    run.group.start()
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    try:
        jax.distributed.initialize(
            facts["coordinator"],
            membership.num_processes,
            membership.process_id,
            local_device_ids=local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=_INITIALIZATION_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
            coordinator_bind_address=facts["coordinator"],
        )
        # All processes have to start JAX's backend at the same time: it waits for all of them, and meanwhile no other
        # thread of this process runs.
        start_jax(gpu_memory_utilization=gpu_memory_utilization)
    except Exception as error:
        raise run.group.fail(error) from error
    _begin(run)


def current_run() -> Run | None:
    """The run that this process takes part in; None if it runs alone."""
    return _run


def find_run(*, gpu_memory_utilization: float) -> Run | None:
    """The run that this process takes part in; None if it runs alone.

    If the program has called jax.distributed.initialize itself, the processes find each other through JAX now.

    Args:
      gpu_memory_utilization: as EngineConfig's, since this may start JAX.
    """
    if _run is None and jax.distributed.is_initialized():
        start_jax(gpu_memory_utilization=gpu_memory_utilization)
        if jax.process_count() > 1:
            run, _ = _meet(_membership_through_jax(), Patience(), None)
            run.group.start()
            _begin(run)
    return _run


def _meet(membership: Membership, patience: Patience, bind_host: str | None) -> tuple[Run, Mapping[str, str]]:
    versions = {name: importlib.metadata.version(name) for name in ("jaxinfer", "jax", "jaxlib")}
    if membership.is_leader:
        connections, facts = await_followers(
            membership, versions=versions, seconds=patience.rendezvous, bind_host=bind_host
        )
        return _leader_run(connections, patience), facts
    connection, facts = find_leader(membership, versions=versions, seconds=patience.rendezvous)
    return _follower_run(membership, connection, patience), facts


def _leader_run(connections: Mapping[int, Connection], patience: Patience) -> LeaderRun:
    group = Leader(connections, patience=patience, on_lost=lambda _: end_later(patience.grace, EXIT_LOST))
    return LeaderRun(group=group, steps=LeadingSteps(group), calls=LeadingCalls(group), end=ProcessEnd(group))


def _follower_run(membership: Membership, connection: Connection, patience: Patience) -> FollowerRun:
    group = Follower(
        membership.process_id,
        membership.num_processes,
        connection,
        patience=patience,
        on_lost=lambda _: end_later(patience.grace, EXIT_LOST),
    )
    calls = FollowingCalls(group)
    steps = FollowingSteps(group, on_opened=calls.open, on_closed=calls.close)
    return FollowerRun(group=group, steps=steps, calls=calls, end=ProcessEnd(group))


def _begin(run: Run) -> None:
    global _run
    run.group.settle()
    run.end.install()
    _run = run


def _membership_through_jax() -> Membership:
    """Which process this is of a run in which only jax.distributed was initialised; process 0 makes up the secret."""
    host = socket.gethostname()
    ours = np.frombuffer(hashlib.sha256(host.encode()).digest(), np.uint8)
    is_one_host = bool((multihost_utils.process_allgather(ours) == ours).all())
    text = ""
    if jax.process_index() == 0:
        ip = "127.0.0.1" if is_one_host else socket.gethostbyname(host)
        with socket.create_server((ip, 0)) as probe:
            text = json.dumps({"address": f"{ip}:{probe.getsockname()[1]}", "secret": secrets.token_hex(16)})
    words = np.zeros(_MAX_BOOT_BYTES, np.uint8)
    words[: len(text)] = np.frombuffer(text.encode(), np.uint8)
    found = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(words))).rstrip(b"\0"))
    return Membership(
        **found,
        num_processes=jax.process_count(),
        process_id=jax.process_index(),
    )


def _share_of_gpus(membership: Membership) -> list[int] | None:
    """The GPUs of this machine that this process takes; None for all, and where there is no GPU."""
    if membership.num_local_processes == 1:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = num_nvidia_gpus() if visible is None else len([name for name in visible.split(",") if name.strip()])
    share = count // membership.num_local_processes
    if count and not share:
        raise ValueError(
            f"{membership.num_local_processes} processes on this machine share {count} GPUs; start fewer processes"
        )
    first = membership.local_process_id * share
    return list(range(first, first + share)) or None
