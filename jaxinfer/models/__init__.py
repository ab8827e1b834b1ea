"""Model families: one file each, found by the checkpoint's architecture name."""
