"""What came out: perplexity, text, speed, and exported folders compared with PyTorch."""
