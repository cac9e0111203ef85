"""CLIP: backbones, the text tower, learned prompts, feature tables."""
