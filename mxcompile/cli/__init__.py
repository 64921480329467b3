"""The command line `mxcompile`: its commands, their output, and a demo on a real model."""
