"""What learning costs in time and memory, and on which device."""
