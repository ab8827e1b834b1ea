"""`jaxinfer bench`: measures the engine. Every figure comes from this machine and this run."""
