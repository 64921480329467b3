"""The decode loop of a compiled model's `generate`: it never waits for the token that it has just asked for."""
