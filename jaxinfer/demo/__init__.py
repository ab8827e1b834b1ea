"""The bundled model: weights, tokenizer and card, read by path; and the scripts that made them."""
