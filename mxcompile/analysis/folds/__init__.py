"""Folds: discover from data flow which channel factors can be folded where, and fold them."""
