"""See the recogniser at work: a page in your browser, served to this machine alone, that compares two photos."""

import argparse
import re
import sys
import webbrowser
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from vitface.commands.parser import CommandParser, add_shared, number
from vitface.config import Bounds
from vitface.errors import ConfigError
from vitface.extras import require

EXAMPLES = """examples:
  vitface demo                             the newest run in runs/; Ctrl-C stops it
  vitface demo runs/a
  vitface demo lvface_b                    a recogniser as it is
  vitface demo --port 8000 --no-browser    on another machine; here: ssh -L 8000:localhost:8000 MACHINE

The photos stay in the browser, which finds, aligns and compares the faces itself. The first call fetches ONNX Runtime
Web, 33 MB. `vitface export RUN --format web` writes the same page as a folder, for any static host.
"""
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css",
    ".js": "text/javascript",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".wasm": "application/wasm",
    ".txt": "text/plain; charset=utf-8",
}


def add_flags(parser: CommandParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="RUN", nargs="?", help="run (its best), checkpoint or recogniser; newest run")
    add(
        "--port",
        type=number(int, Bounds(least=0, most=65535)),
        default=0,
        help="of this machine (default: any that is free)",
    )
    add("--no-browser", action="store_true", help="print the address only")
    add_shared(parser, "--weights")


def run(arguments: argparse.Namespace) -> None:
    require("vitface demo", "onnx", "onnxscript", "onnxruntime")
    from vitface.commands.inputs import newest_run
    from vitface.exchange.site import site_files
    from vitface.store.faces import open_checkpoint

    checkpoint = open_checkpoint(arguments.checkpoint or newest_run(), arguments.weights)
    print(f"preparing {checkpoint.path} for the browser ...", file=sys.stderr)
    try:
        server = DemoServer(site_files(checkpoint, "fp32"), arguments.port)
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"port {arguments.port} cannot be used ({why}); without --port, a free one is") from None
    with server:
        print(f"{server.address} shows it, on this machine only; Ctrl-C stops it", flush=True)
        if not arguments.no_browser:
            webbrowser.open(server.address)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
    print("stopped", file=sys.stderr)


class DemoServer(ThreadingHTTPServer):
    """Serves {path: contents} on the loopback; `port` 0 is any that is free. OSError if it is taken.

    It answers requests for this machine's own name only, so no web page elsewhere can read the model through a name of
    its own that points here.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], port: int = 0):
        self.files = files
        super().__init__(("127.0.0.1", port), _Handler)
        self.address = f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that stops reading is no error."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    server: DemoServer
    timeout = 60

    def do_GET(self) -> None:
        name = unquote(urlsplit(self.path).path)[1:] or "index.html"
        if not re.fullmatch(r"(localhost|127\.0\.0\.1)(:\d+)?", self.headers.get("Host", "")):
            return self.send_error(421)
        if (data := self.server.files.get(name)) is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Type", TYPES.get(PurePosixPath(name).suffix, "application/octet-stream"))
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", "frame-ancestors 'none'")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal is for the user."""
