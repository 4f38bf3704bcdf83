"""What a router costs: ours, vllm-router and LiteLLM beside the straight way, in one run."""
