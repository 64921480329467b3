"""The report page: one self-contained HTML file, made from the other files of a dump."""
