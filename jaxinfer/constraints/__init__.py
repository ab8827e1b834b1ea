"""Constraints on the token to be sampled next: grammars, choices, bad words, each as a packed vocabulary mask."""
