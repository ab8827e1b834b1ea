"""`jaxinfer bench`: what the engine measures about itself, each figure from this machine and this run."""
