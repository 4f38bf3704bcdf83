"""`python -m vllm_rvec` is the `vllm-rvec` command."""

from vllm_rvec.cli.main import run

if __name__ == "__main__":
    run()
