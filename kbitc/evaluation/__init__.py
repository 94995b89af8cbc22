"""What came out: perplexity, text, speed and memory of packed and dense models.

Exported folders are compared with PyTorch here.
"""
