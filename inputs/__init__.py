"""What a method sees: image sets, their cache, the built-in set, downloads, batched augmentations."""
