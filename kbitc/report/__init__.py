"""Pages: of an artifact, of a model, of a run of passes, in one frame.

They are made of files and programs, and decide nothing.
"""
