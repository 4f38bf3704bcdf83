"""A stand-in for vLLM: a process that answers /health and has children, to be hurt in tests.

    python stand_in.py [--fail TEXT] [--late SECONDS] [--stubborn] [--flood] [--alpha HOW] ...
        --host H --port P

Prints `pid N` for itself, its child and its grandchild; both ignore SIGTERM, hold the output open,
and end only when killed. SIGTERM lets a request in flight finish, as vLLM's drain does.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CHILD = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) > 2:
    subprocess.Popen([*sys.orig_argv[:-1]])
    if sys.argv[2] == "own-session":
        os.setsid()
os.write(1, f"pid {os.getpid()}\\n".encode())
time.sleep(600)
"""


def say(line: str) -> None:
    """Print a line in one write: `print` makes several where Python's output is unbuffered.

    The children print into the same pipe, and half a line of theirs would stand in this one.
    """
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


class Handler(BaseHTTPRequestHandler):
    """Answers /health, /slow a second later, and a change of alpha."""

    how = "change"

    def do_GET(self) -> None:
        """Answer 200."""
        if self.path == "/slow":
            say("slow request begins")
            time.sleep(1)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def do_PUT(self) -> None:
        """Change alpha, in the way that the command line says."""
        wish = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.headers["Authorization"] == f"Bearer {os.environ['VLLM_API_KEY']}"
        if self.path != "/v1/rvec/alpha" or self.how == "hang":
            say("changing")
            time.sleep(600)
        status = {"refuse": 409, "break": 500}.get(self.how, 200)
        done = {"old_alpha": 1.0, "alpha": wish["alpha"], "drain_seconds": 0.0}
        done |= {"reload_seconds": 0.5, "ranks": 2, "copies": 7}
        error = {"error": {"message": f"the engine would {self.how}"}}
        body = json.dumps(done if status == 200 else error).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


def main() -> None:
    """Be an engine until told to stop."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--fail", help="print this and end with status 3 before being ready")
    parser.add_argument("--fail-if", help="the same, but only while this file exists")
    parser.add_argument("--late", type=float, default=0.0, help="seconds before being ready")
    parser.add_argument("--stubborn", action="store_true", help="ignore SIGTERM")
    parser.add_argument("--flood", action="store_true", help="print awkward bytes")
    parser.add_argument("--child", default="same-session", help="or own-session, or none")
    parser.add_argument("--alpha", default="change", help="or refuse, break, hang")
    parser.add_argument("--model-loader-extra-config", default="{}", help="printed, as all of it")
    options = parser.parse_args()
    Handler.how = options.alpha
    say(f"options {options.model_loader_extra_config}")
    say(f"pid {os.getpid()}")
    if options.child != "none":
        # The words after -c: a number that marks the process, then what to do.
        subprocess.Popen([sys.executable, "-c", CHILD, str(options.port), options.child])
    if options.fail and (options.fail_if is None or Path(options.fail_if).exists()):
        print(options.fail, file=sys.stderr, flush=True)  # noqa: T201
        sys.exit(3)
    if options.flood:
        sys.stdout.buffer.write(
            b"a" * 300_000 + b"\n\xff\xfe broken\x1b[2J\nstep 1\rstep 2\r\nlast\n"
        )
        sys.stdout.flush()
    if options.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(options.late)
    server = ThreadingHTTPServer((options.host, options.port), Handler)
    server.daemon_threads = False  # server_close() then waits for requests in flight
    if not options.stubborn:
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    say(f"key is {os.environ.get('VLLM_API_KEY', 'none')}")
    server.serve_forever()
    server.server_close()
    say("drained")


if __name__ == "__main__":
    main()
