"""Which tokens may come next: grammars, choices, bad words, each as a packed mask over the vocabulary."""
