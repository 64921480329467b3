"""`python -m mxcompile`."""

from mxcompile.cli import main

main()
