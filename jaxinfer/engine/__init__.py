"""The host loop: queues, pages, batches. Speaks token ids only."""
