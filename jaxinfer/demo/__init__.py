"""The bundled model (weights, tokenizer and card, in files that are found by path) and the scripts that made it."""
