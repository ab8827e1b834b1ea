"""Array kernels, each one contract with a plain oracle beside its fast backends."""
