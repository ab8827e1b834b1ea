"""Array kernels. Each has one contract, a plain oracle that is easy to check, and fast backends tested against it."""
