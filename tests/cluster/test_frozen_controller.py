"""A controller that was stopped and goes on (safety S24): what reached its sockets meanwhile is closed unread."""

import os
import signal
import socket
import time
from pathlib import Path
from urllib import parse

from tests.cluster import conftest

FROZEN_S = 3.0


def _request(method: str, path: str, body: bytes) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _answer(sock: socket.socket) -> bytes:
    """What comes until the connection ends; nothing at all when it was closed unread."""
    sock.settimeout(60)
    try:
        return sock.recv(65536)
    except ConnectionResetError:
        return b""


def test_what_waited_in_the_sockets_of_a_frozen_controller_is_never_done(tmp_path: Path) -> None:
    with conftest.running_cloud(tmp_path / "data", "up", "--nodes", 1) as cloud:
        template = cloud.push(tmp_path)
        id = cloud.start(template)
        conftest.eventually(lambda: cloud.state(id) == "Started")
        address = ("127.0.0.1", parse.urlsplit(cloud.controller).port or 0)
        controller = cloud.child("controller")

        with socket.create_connection(address) as kept:
            kept.sendall(_request("GET", "/livez", b""))
            assert b"200 OK" in _answer(kept)
            os.kill(controller, signal.SIGSTOP)
            try:
                kept.sendall(_request("DELETE", "/api/v1/vm", f'{{"id":"{id}"}}'.encode()))
                late = socket.create_connection(address)
                late.sendall(_request("POST", "/api/v1/vm", f'{{"vmid":"{template}"}}'.encode()))
                time.sleep(FROZEN_S)  # the length of the freeze is what is tested
            finally:
                os.kill(controller, signal.SIGCONT)
            with late:
                assert (_answer(kept), _answer(late)) == (b"", b"")

        conftest.eventually(lambda: conftest.ask(cloud.controller + "/readyz")[0] == 200)
        listed = cloud.ask("GET", "/api/v1/vm")["body"]
        assert [(one["instance_id"], one["vm"]["instance_state"]) for one in listed] == [(id, "Started")]
