"""What kbitc asks of the operating system: files, JSON and checksums, locks, private folders, signals.

Nothing here knows what a model is; every room may import it.
"""
