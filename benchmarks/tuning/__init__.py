"""Measures which kernel and tile config are fastest on a GPU; README.md has the two commands."""
