"""Attention of one token or a few over a key/value cache, and what a decode step writes to one."""
