"""Networks: the diffusion UNet and the VQ autoencoder."""
