"""Building blocks of decoder-only models: per-shard forward passes over parameters stacked by pipeline stage."""
