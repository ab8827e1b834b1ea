"""Text to token ids and back: a checkpoint's tokenizer, the bytes of its tokens, text that grows token by token."""
