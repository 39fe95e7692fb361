"""python -m analysis.dashboard experiment=STUDY [outputs=FOLDER] [port=8501]: the latents of a study in the browser.

Filter latents, read their documents, correct labels by hand (kept in human.jsonl beside the annotator's), compare two
crosscoders. Serves this machine alone; elsewhere: ssh -L 8501:localhost:8501 MACHINE.
"""

from __future__ import annotations

import importlib.util
import socket
from dataclasses import dataclass
from pathlib import Path

from extract.interrupts import one_line_interrupts

with one_line_interrupts():
    from analysis.config import AnalysisSettings
    from analysis.dashboard.crosscoders import folders_in, load
    from analysis.taxonomy.step import DEFAULT, load_taxonomy
    from extract.command import run
    from extract.errors import BadInput

HOST = "127.0.0.1"


@dataclass
class DashboardSettings(AnalysisSettings):
    """The settings of `python -m analysis.dashboard`."""

    # Port on this machine; 0 takes any that is free.
    port: int = 8501


def main(settings: DashboardSettings) -> None:
    """Serves until it is interrupted."""
    if importlib.util.find_spec("dash") is None:
        raise BadInput("The dashboard needs Dash: pip install -e '.[app]'.")
    outputs = Path(settings.outputs)
    for folder in folders_in(outputs):
        load(folder)  # a file that cannot be read is said here, not in the browser
    categories = load_taxonomy(Path(settings.analysis.taxonomy.path or DEFAULT))
    from werkzeug.serving import WSGIRequestHandler, make_server  # after the check that they are installed

    from analysis.dashboard.app import Study, make_app

    class Quiet(WSGIRequestHandler):
        """Without a line for each request."""

        def log_request(self, *arguments: object) -> None:
            pass

    with listening(settings.port) as listener:
        app = make_app(Study(settings.study, outputs, categories))
        port = listener.getsockname()[1]
        server = make_server(HOST, port, app.server, threaded=True, request_handler=Quiet, fd=listener.fileno())
        print(f"dashboard of {settings.study}: http://localhost:{port} (stop it with Ctrl-C)", flush=True)
        server.serve_forever()


def listening(port: int) -> socket.socket:
    """A socket on a port of this machine that nothing outside can reach. BadInput for a port that cannot be had."""
    if not 0 <= port <= 65535:
        raise BadInput(f"port ({port}) must lie between 0 (any that is free) and 65535.")
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        raise BadInput(f"port={port} cannot be used: {error.strerror}. Choose another, or port=0.") from error
    listener.listen(128)
    return listener


if __name__ == "__main__":
    run(DashboardSettings, main)
