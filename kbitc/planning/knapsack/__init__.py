"""Multiple-choice knapsack, solved exactly: one item of each group, least cost, within a number of bytes."""
