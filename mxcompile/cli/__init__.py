"""The command `mxcompile`: its commands, what they print, and a demo on a real model."""
