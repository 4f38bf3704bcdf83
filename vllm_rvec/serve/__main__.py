"""`python -m vllm_rvec.serve`: the same as `vllm-rvec serve`."""

from vllm_rvec.cli.main import run_serve

if __name__ == "__main__":
    run_serve()
