"""Statistics of values: batches in, observers on chosen values, one run of the graph over them."""
