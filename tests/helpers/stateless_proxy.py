"""A relay between ranks and their store, which can swallow or alter what passes."""

import contextlib
import socket
import threading


class Proxy:
    """Relays connections to a port; set `swallow`, or `alter`, a function of (to_store, data)."""

    def __init__(self, port):
        self.swallow = False
        self.alter = None
        self._target = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._sockets = []
        self._resume = threading.Event()

    def __enter__(self):
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self._server.close()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _address = self._server.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [near, far]
                for source, sink, to_store in ((near, far, True), (far, near, False)):
                    threading.Thread(
                        target=self._relay, args=(source, sink, to_store), daemon=True
                    ).start()

    def _relay(self, source, sink, to_store):
        with contextlib.suppress(OSError):
            while True:
                while self.swallow:
                    self._resume.wait(0.02)
                data = source.recv(65536)
                while self.swallow:
                    self._resume.wait(0.02)
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                if self.alter is not None:
                    data = self.alter(to_store, data)
                sink.sendall(data)
