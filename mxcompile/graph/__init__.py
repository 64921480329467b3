"""A model as a graph: trace it, look at it, edit it, print it, verify it, and record what passes did to it."""
