"""Alpha sweeps: which alpha, and is the gain real? Problems, arms, answers, statistics, report.

Knows neither vLLM nor torch nor our router: it asks any OpenAI-compatible endpoint. What starts an
engine for a sweep is the command (`cli/sweep`).
"""
