"""The only jitted room: a StepBatch in, sampled tokens out."""
