"""Adapting a latent diffusion model to the unlabelled images, and drawing from it."""
