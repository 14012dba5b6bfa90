"""Data sets, latents and the procedurally rendered faces."""
