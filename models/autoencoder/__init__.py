"""VQ-f4 autoencoder: images in [-1, 1] to latents of a quarter of the side, and back."""
