"""Expert-parallel dispatch and combine for Megatron-core."""
