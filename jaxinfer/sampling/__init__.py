"""From logits to tokens on the device: edits, thresholds and noise, on a vocabulary that is sharded over the mesh."""
