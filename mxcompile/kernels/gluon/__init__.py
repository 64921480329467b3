"""Gluon kernels for Hopper: warp-specialized wgmma pipelines."""
