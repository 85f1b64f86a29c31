"""Code compiled for the CPU: C++ sources, and what builds and calls them."""
