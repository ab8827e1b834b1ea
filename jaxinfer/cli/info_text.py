"""How `jaxinfer info` shows its facts: lines of text.

Owns: the lines.
Does not know: where the facts come from (info.py); JAX, which takes a second to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxinfer.config.sizes import size_text

if TYPE_CHECKING:
    from jaxinfer.cli.info import DraftFacts, MeshFacts, ModelFacts, SystemFacts


def system_lines(system: SystemFacts) -> list[str]:
    """The lines about this machine."""
    versions = ", ".join(f"{name} {version}" for name, version in system.versions.items())
    kinds = sorted(set(system.devices))
    devices = ", ".join(f"{system.devices.count(kind)} x {kind}" for kind in kinds)
    return [
        f"versions       Python {system.python}, {versions}",
        f"devices        {devices} ({system.platform})",
        f"memory         {size_text(system.free_bytes)} for weights, KV pages and activations on the first device",
        f"architectures  {', '.join(system.architectures)}",
    ]


def model_lines(model: ModelFacts) -> list[str]:
    """The lines about a model, its draft model and its mesh, after an empty one."""
    heads = f"{model.num_heads} heads, {model.num_kv_heads} kv heads of {model.head_dim}"
    fits = f"{model.kv_tokens:,} tokens, {model.full_requests:,} requests of {model.max_model_len:,}"
    return [
        "",
        f"model          {model.architecture}, {model.num_parameters / 1e6:,.1f} million parameters",
        f"shape          {model.num_layers} layers of {model.hidden_size}, {heads}, {model.vocab_size} tokens",
        f"weights        {size_text(model.weight_bytes)} in {model.dtypes}",
        f"KV cache       {model.kv_bytes_per_token / 2**10:,.1f} KiB a token",
        f"fits           {fits if model.kv_tokens > 0 else 'no: the weights alone take more than the memory'}",
        *([] if model.draft is None else [_draft_line(model.draft)]),
        *([] if model.mesh is None else _mesh_lines(model.mesh)),
    ]


def _draft_line(draft: DraftFacts) -> str:
    sizes = f"{draft.num_parameters / 1e6:,.1f} million parameters, weights {size_text(draft.held_bytes)}"
    pages = f"KV cache {draft.kv_bytes_per_token / 2**10:,.1f} KiB a token"
    return f"draft model    {draft.architecture}, {sizes}, {pages}; counted in what fits"


def _mesh_lines(mesh: MeshFacts) -> list[str]:
    volumes = [
        f"  {volume.name:<22} {volume.count:>4} x over {volume.num_devices:>3}   {size_text(volume.sent_bytes):>10}"
        for volume in mesh.volumes
    ]
    return [
        "",
        f"mesh           {mesh.num_stages} pipeline stages x {mesh.num_shards} tensor shards; of these, a device holds",
        f"weights        {size_text(mesh.weight_bytes)}",
        f"KV cache       {mesh.kv_bytes_per_token / 2**10:,.1f} KiB a token",
        f"and sends, in a decode step of {mesh.rows} rows",
        *volumes,
        f"  {'in all':<22} {sum(volume.count for volume in mesh.volumes):>4}"
        f"              {size_text(sum(volume.sent_bytes for volume in mesh.volumes)):>10}",
    ]
