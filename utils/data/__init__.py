"""Data sets and their formats, latents and the procedurally rendered faces."""
