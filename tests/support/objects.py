"""An S3 server on loopback for tests: real HTTP, real signatures, buckets in memory. Ends with the test process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


class Server:
    """The server itself: it can be away for a while, and comes back on the same port with what it had."""

    def __init__(self) -> None:
        self.host, self.port = "127.0.0.1", 0
        self._server: Any = None
        self.start()

    def start(self) -> None:
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer(ip_address=self.host, port=self.port, verbose=False)
        self._server.start()
        self.host, self.port = self._server.get_host_and_port()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server._server.server_close()  # or whoever connects would wait for an answer
            self._server = None


@contextmanager
def s3_server(patch: pytest.MonkeyPatch, bucket: str = "lab") -> Iterator[str]:
    """A server with one bucket, named to every S3 client of this process and its children; gives s3://bucket."""
    with restarting_s3_server(patch, bucket) as (url, _):
        yield url


@contextmanager
def restarting_s3_server(patch: pytest.MonkeyPatch, bucket: str = "lab") -> Iterator[tuple[str, Server]]:
    """`s3_server`, and the server itself."""
    import boto3
    import s3fs

    server = Server()
    host, port = server.host, server.port
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        patch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    boto3.client("s3").create_bucket(Bucket=bucket)
    try:
        yield f"s3://{bucket}", server
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()
