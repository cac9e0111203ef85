"""Latent diffusion: adaptation to the unlabelled images by LoRA, and image generation."""
