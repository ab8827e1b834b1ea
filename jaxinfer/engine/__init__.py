"""The host's loop that runs requests: queues, KV pages, batches. It sees token ids, never text."""
