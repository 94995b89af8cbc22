"""What is learned after packing: scales, zero points, codebooks, norm gains and single codes of an artifact.

Nothing here changes a format.
"""
