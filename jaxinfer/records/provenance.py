"""Provenance: the part of a record that says which model, settings and machine made it.

Owns: what is written down of these, and in which words two provenances differ.
Does not know: jax, requests, how the provenance is collected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.records.codec import JsonRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance(JsonRecord):
    """Where the outputs of an LLM come from: model, settings, versions and devices, the same for all its outputs.

    Args:
      model: the model as the user named it; None for weights that were in memory.
      fingerprint: hash of the checkpoint's files (checkpoint.directory.fingerprint); None for weights in memory.
      tokenizer: the tokenizer as the user named it, or "<ClassName>" for an object; None for the checkpoint's own.
      engine: the engine's settings.
      versions: version of Python (under "python") and of packages, by name.
      platform: "cpu", "gpu" or "tpu".
      device_kind: kind of the first device, as JAX names it.
      mesh: numbers of pipeline stages and of tensor shards.
    """

    model: str | None
    fingerprint: str | None
    tokenizer: str | None
    engine: EngineConfig
    versions: Mapping[str, str]
    platform: str
    device_kind: str
    mesh: tuple[int, int]

    def changes(self, now: Provenance) -> tuple[str, ...]:
        """Compares with the provenance of now: one phrase for each version, device or model file that has changed.

        Such a change may explain why a replay gives other tokens. What was not recorded is not compared.
        """
        before, after = self._circumstances(), now._circumstances()
        return tuple(
            f"{name} was {before[name]}, is now {value}"
            for name, value in after.items()
            if before.get(name) not in (None, value)
        )

    def _circumstances(self) -> dict[str, str | None]:
        devices = {"platform": self.platform, "device kind": self.device_kind}
        return {**self.versions, **devices, "model fingerprint": self.fingerprint}
