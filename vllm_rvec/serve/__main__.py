"""`python -m vllm_rvec.serve`: the same as `vllm-rvec serve`."""

import sys

try:
    from vllm_rvec.cli.main import run_serve

    if __name__ == "__main__":
        run_serve()
except KeyboardInterrupt:  # while importing: there is nothing to stop yet
    sys.exit(130)
