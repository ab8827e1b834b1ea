"""jaxinfer on a Ray cluster: batches over Ray Data, and a deployment for Ray Serve. Needs the extra [ray]."""

try:
    import ray  # noqa: F401
except ImportError as error:
    raise ImportError("jaxinfer.ray needs Ray: pip install 'jaxinfer[ray]'") from error

from jaxinfer.ray.batch import answer_lines, run_batch
from jaxinfer.ray.deployment import LLMServer, build_server

__all__ = ["LLMServer", "answer_lines", "build_server", "run_batch"]
