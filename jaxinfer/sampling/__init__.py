"""From logits to tokens on the device: logit edits, filters and noise, for a vocabulary sharded over the mesh."""
