"""An S3 in memory: moto's server, with conditional writes made one at a time, as a real store makes them.

moto checks the condition (If-Match, If-None-Match) first and writes later, with one thread for each request. Without this, two
writers that swap the same object at the same moment could both succeed.
"""

import argparse
import io
import threading
from collections.abc import Iterable
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import run_simple

CONDITIONS = {"HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"}
WRITES = {"PUT", "POST", "DELETE"}


def one_conditional_write_at_a_time(application: WSGIApplication) -> WSGIApplication:
    """Wrap a WSGI application so that it handles one conditional write at a time.

    The body is read before the lock is taken, so that a slow client delays nobody else.
    """
    lock = threading.Lock()

    def guarded(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] not in WRITES or CONDITIONS.isdisjoint(environ):
            return application(environ, start_response)
        environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)))
        with lock:
            return application(environ, start_response)

    return guarded


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(
        prog="python -m infra.local.s3", description="Serve an S3 that keeps everything in memory."
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    application = one_conditional_write_at_a_time(DomainDispatcherApplication(create_backend_app))
    run_simple(arguments.host, arguments.port, application, threaded=True, request_handler=MotoRequestHandler)


if __name__ == "__main__":
    main()
