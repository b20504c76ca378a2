"""manager.js: nobody gets at a search but programs of its own user, and no web page."""

import json
import os
import shutil
import subprocess
import time

import pytest
from conftest import ENDLESS, ROOT, ask, nobody, outside_address
from experiment import UNCHECKED, Experiment, free_port, processes_at
from test_remote import SSHD, Machine, make_key

SOCKET = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
SOCKET.append("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A search whose one trial does not end, for all that only asks."""
    home = tmp_path_factory.mktemp("guarded")
    environment = {key: value for key, value in os.environ.items() if "CIFAR10" not in key}
    changes = {"maxTrialNumber": 1, "searchSpace": ENDLESS}
    search = Experiment(ROOT / "configs" / "demo.yml", home, environment, UNCHECKED, **changes)
    yield search
    for process in processes_at(home):
        process.kill()


STRANGERS = {
    "outside": lambda port: {"address": outside_address()},
    "another user": lambda port: {"user": nobody()},
    "a page": lambda port: {"headers": ["Origin: http://example.com"]},
    "a page of another port": lambda port: {"headers": ["Origin: http://localhost:3000"]},
    "a file": lambda port: {"headers": ["Origin: null"]},
    "a rebound name": lambda port: {"headers": [f"Host: example.com:{port}"]},
    "a rebound name and its page": lambda port: {
        "headers": [f"Host: example.com:{port}", f"Origin: http://example.com:{port}"]
    },
}


@pytest.mark.parametrize("what", ["status", "socket", "command"])
@pytest.mark.parametrize("who", STRANGERS)
def test_a_stranger_is_refused(guarded, tmp_path, who, what):
    file = tmp_path / "stranger"
    request = {
        "status": {},
        "socket": {"path": "/tuner", "headers": SOCKET},
        "command": command(guarded, file),
    }[what]
    stranger = STRANGERS[who](guarded.port)
    headers = [*request.pop("headers", []), *stranger.pop("headers", [])]
    assert ask(guarded.port, *headers, **request, **stranger) in (None, 403)
    time.sleep(0.5)
    assert not file.exists()
    assert guarded.get("check-status")["status"] == "NO_MORE_TRIAL"


def command(search, file):
    """Return a request that makes NNI's tuner run a command."""
    call = {"__symbol__": "path:os.system", "__args__": [f"touch {file}"]}
    profile = search.get("experiment")
    profile["params"]["searchSpace"] = call
    path = "/api/v1/nni/experiment?update_type=SEARCH_SPACE"
    return {"path": path, "method": "PUT", "body": json.dumps(profile)}


def test_the_user_gets_in(guarded):
    port = guarded.port
    assert ask(port) == 200
    assert ask(port, f"Origin: http://localhost:{port}") == 200
    assert ask(port, f"Host: 127.0.0.1:{port}", f"Origin: http://127.0.0.1:{port}") == 200
    assert ask(port, path="/oview") == 200
    assert "RUNNING" in guarded.nnictl("trial", "ls", guarded.id)
    assert ask(port, user=os.getuid()) == 200


@pytest.mark.skipif(
    not (SSHD and shutil.which("ssh")),
    reason="needs sshd and ssh, Debian's openssh-server and openssh-client",
)
def test_a_tunnel_gets_in(guarded, tmp_path):
    key = tmp_path / "key"
    make_key(key)
    server = Machine("127.0.0.2", tmp_path / "server", key, {"HOME": tmp_path})
    port = free_port()
    command = ["ssh", "-N", "-L", f"{port}:localhost:{guarded.port}", "-p", server.port]
    command += ["-i", key, "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    tunnel = subprocess.Popen([*map(str, command), server.settings["host"]])
    try:
        end = time.monotonic() + 60
        while (status := ask(port)) is None and time.monotonic() < end:
            time.sleep(0.5)
        assert status == 200
        assert ask(port, f"Origin: http://localhost:{port}") == 200
        assert ask(port, "Origin: http://example.com") == 403
    finally:
        tunnel.kill()
        tunnel.wait()
        server.die()


def test_the_request_of_the_strangers_is_one_that_runs_a_command(experiment, tmp_path):
    search = experiment("configs/demo.yml", maxTrialNumber=1, searchSpace=ENDLESS)
    file = tmp_path / "own"
    assert ask(search.port, **command(search, file)) == 200
    end = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < end
        time.sleep(0.1)
