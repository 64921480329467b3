"""Gluon kernels for Hopper: warp-specialized WGMMA pipelines."""
