"""From a request to an artifact, a packed module or an inspection.

Every source goes one path: calibrate, capture, passes, pack.
"""
