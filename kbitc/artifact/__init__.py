"""What is written and read back: the folder of a compiled model, and models loaded from it.

Everything that stands in such a folder has its one definition here, and is there completely or not at all.
"""
