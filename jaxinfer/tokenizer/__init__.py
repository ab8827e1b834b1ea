"""Tokenizers: text to token ids and back, the bytes of each token, and decoding token by token."""
