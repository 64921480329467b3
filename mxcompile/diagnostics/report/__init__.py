"""The page of a dump: one HTML file, made from the dump's other files, that needs nothing but a browser."""
