"""What tests and benchmarks share: real checkpoints, real vLLM models."""
