"""Noise schedules, training loss, samplers and the training loop."""
