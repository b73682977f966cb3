"""What an encoder is worth: nearest neighbours and probes, fine-tuning, segmentation and detection."""
