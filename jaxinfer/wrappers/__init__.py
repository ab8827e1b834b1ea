"""Runs steps on the devices: takes a StepBatch, compiles and launches its programs, returns sampled tokens."""
