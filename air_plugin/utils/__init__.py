"""What every room uses: errors, files, images, tensors, the store, seeds, class names."""
