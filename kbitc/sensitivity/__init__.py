"""What an error in a weight costs: moments, outlier features, sampled errors, the score table.

Nothing is chosen here.
"""
