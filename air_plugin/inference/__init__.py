"""What a trained classifier is outside of training."""
