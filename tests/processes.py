"""Scripts in interpreters of their own: other environment variables, or several processes that run together."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parent


def simulating(num_devices: int) -> str:
    """XLA_FLAGS of the tests, with so many CPU devices: of a flag that stands twice, the last one counts."""
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={num_devices}"


def run_python(script: str, *arguments: object, **environment: str) -> str:
    """Standard output of a script that runs in an interpreter of its own, on the CPU."""
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


class Children:
    """Processes that run at the same time; leaving the block kills those that have not ended, by their ids.

    Args:
      *commands: the command of each.
      **environment: variables for all of them.
    """

    def __init__(self, *commands: list[object], **environment: str):
        self._commands = commands
        self._environment = os.environ | environment

    def __enter__(self) -> Children:
        self._folder = tempfile.TemporaryDirectory()
        self.started = time.monotonic()
        self.processes: list[subprocess.Popen] = []
        for number, command in enumerate(self._commands):
            with self._file(number, "out").open("w") as out, self._file(number, "err").open("w") as err:
                self.processes.append(
                    subprocess.Popen(list(map(str, command)), stdout=out, stderr=err, env=self._environment)
                )
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self._folder.cleanup()

    def _file(self, number: int, name: str) -> Path:
        return Path(self._folder.name) / f"{number}.{name}"

    def out(self, number: int) -> str:
        """What a process has printed so far."""
        return self._file(number, "out").read_text()

    def err(self, number: int) -> str:
        """Its standard error so far."""
        return self._file(number, "err").read_text()

    def wait_for(self, text: str, *, seconds: float) -> None:
        """Waits until all have printed a text."""
        deadline = time.monotonic() + seconds
        numbers = range(len(self.processes))
        while not all(text in self.out(number) for number in numbers):
            ended = [number for number in numbers if self.processes[number].poll() not in (None, 0)]
            assert not ended and time.monotonic() < deadline, [self.err(number)[-2000:] for number in numbers]
            time.sleep(0.02)

    def codes(self, *numbers: int, seconds: float) -> list[int]:
        """Exit codes of processes that have to end by themselves within so many seconds from now."""
        deadline = time.monotonic() + seconds
        for number in numbers:
            try:
                self.processes[number].wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                errors = {number: self.err(number)[-2000:] for number in range(len(self.processes))}
                raise AssertionError(f"process {number} did not end within {seconds} s: {errors}") from None
        return [self.processes[number].returncode for number in numbers]
