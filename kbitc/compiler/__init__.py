"""From a request to an artifact or a packed module: one path for all sources."""
