"""`MXWeight`, and what is done with all tensors of a module."""
