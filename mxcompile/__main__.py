"""`python -m mxcompile`."""

from mxcompile.cli.app import main

main()
