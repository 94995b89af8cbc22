"""Studies of many models at many formats: the grid's jobs, their results, scaling laws and advice.

Jobs quantize in memory and write no artifact; what they measured is one table, which everything else reads.
"""
