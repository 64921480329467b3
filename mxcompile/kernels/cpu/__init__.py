"""C++ kernels for the CPU, compiled on the user's machine."""
