"""What runs the recursions: plain torch, code compiled for the CPU, Triton kernels."""
