"""What runs the recursions: plain torch, code compiled for the CPU, Triton kernels.

The folder is not called backends: torch.compile skips every file whose path has `triton/backends` in it, which it takes
for one of Triton's own.
"""
