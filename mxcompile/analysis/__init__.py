"""Facts read from data flow: which nodes are matmuls with weights, and what can absorb a scale."""
