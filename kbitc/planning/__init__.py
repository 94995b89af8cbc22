"""How a budget is spent: the knapsack, the allocation, the trade-off.

It looks at score tables alone, never at a weight.
"""
