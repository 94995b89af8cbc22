"""What is written and read back: the folder of a compiled model, written completely or not at all, and loaded."""
