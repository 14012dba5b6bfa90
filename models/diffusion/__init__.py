"""The conditional UNet that predicts the noise."""
