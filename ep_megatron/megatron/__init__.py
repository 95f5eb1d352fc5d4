"""The only rooms that import megatron."""
