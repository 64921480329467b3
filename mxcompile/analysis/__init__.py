"""Data-flow analysis of a graph: its matmuls by a weight, layers and segments, and what can absorb a scale."""
