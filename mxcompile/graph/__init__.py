"""A model as an fx graph: trace, match, edit, print and verify it, and record what passes did to it."""
