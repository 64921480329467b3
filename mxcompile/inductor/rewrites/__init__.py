"""Rewrites of the graphs that Inductor compiles: fuse, join and decompose `mx::` operators and attention."""
