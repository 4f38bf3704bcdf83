"""Object stores on the loopback for the real clients: moto for S3, Google's API by an emulator."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["BUCKET", "SECRET", "run_gs", "run_s3"]

BUCKET = "vectors"
SECRET = "stand-in-secret"


@contextmanager
def run_s3() -> Iterator[Any]:
    """Run an S3 server with one bucket; give a client for it.

    The environment of this process, and so of its children, names the server.
    """
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    environment = {
        "AWS_ACCESS_KEY_ID": "stand-in",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        with mock.patch.dict(os.environ, environment):
            files = fsspec.filesystem("s3", skip_instance_cache=True)
            files.mkdir(BUCKET)
            yield files
    finally:
        server.stop()


@contextmanager
def run_gs() -> Iterator[Any]:
    """As `run_s3`, for Google's store."""
    import fsspec
    from gcp_storage_emulator.server import create_server

    # gcsfs asks by gRPC what kind of bucket it is, which no emulator answers: a minute each time.
    with mock.patch.dict(os.environ, {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}):
        import gcsfs  # noqa: F401 - reads the variable when it is imported
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    server.start()
    port = server._api._httpd.server_port
    try:
        with mock.patch.dict(os.environ, {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}"}):
            yield fsspec.filesystem("gs", skip_instance_cache=True)
    finally:
        server.stop()
