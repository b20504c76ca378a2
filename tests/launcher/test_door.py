"""access.js: only programs of its own user can reach a search, and no web page can."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nni_node
import psutil
import pytest
from conftest import ENDLESS, ROOT, UPGRADE, ask, nobody, outside_address, writable
from experiment import MANAGER, UNCHECKED, Experiment, free_port, kill_at, processes_at

from nnisearch.shared.processes import is_tuner, lives
from nnisearch.start.launch import is_free, prepare_environment

API = "/api/v1/nni"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A search whose one trial does not end, for all that only asks."""
    home = tmp_path_factory.mktemp("guarded")
    environment = {key: value for key, value in os.environ.items() if "CIFAR10" not in key}
    changes = {"maxTrialNumber": 1, "searchSpace": ENDLESS, "trialCommand": "sleep 3600"}
    changes |= {"trialConcurrency": 1, "trialGpuNumber": 0, "tuner": {"name": "Random"}}
    search = Experiment(ROOT / "config.yml", home, environment, UNCHECKED, **changes)
    yield search
    kill_at(home)


def loopback6():
    """Return this machine's own address in IPv6."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    return "::1"


STRANGERS = {
    "outside": lambda port: {"address": outside_address()},
    "another user": lambda port: {"user": nobody()},
    "another user, by IPv6": lambda port: {"user": nobody(), "address": loopback6()},
    "an image of a page": lambda port: {"headers": ["Sec-Fetch-Site: cross-site"]},
    "an image of a page of another port": lambda port: {"headers": ["Sec-Fetch-Site: same-site"]},
    "a page": lambda port: {"headers": ["Origin: http://example.com"]},
    "a page of another port": lambda port: {"headers": ["Origin: http://localhost:3000"]},
    "a page by TLS": lambda port: {"headers": [f"Origin: https://localhost:{port}"]},
    "a file": lambda port: {"headers": ["Origin: null"]},
    "a rebound name": lambda port: {"headers": [f"Host: example.com:{port}"]},
    "a rebound name and its page": lambda port: {
        "headers": [f"Host: example.com:{port}", f"Origin: http://example.com:{port}"]
    },
    "no Host": lambda port: {"headers": ["Host: "]},
}


def importing(value):
    """Return a request that tells the tuner a result."""
    body = json.dumps([{"parameter": {"x": 1}, "value": value}])
    return {"path": f"{API}/experiment/import-data", "method": "POST", "body": body}


@pytest.mark.parametrize("who", STRANGERS)
def test_a_stranger_is_refused(guarded, who):
    stranger = STRANGERS[who](guarded.port)
    headers = stranger.pop("headers", [])
    assert ask(guarded.port, *headers, **stranger) in (None, 403)
    assert ask(guarded.port, *headers, **importing(1), **stranger) in (None, 403)
    assert guarded.get("check-status")["status"] == "NO_MORE_TRIAL"


OWN = {
    "a program": lambda port: {},
    "a page": lambda port: {"headers": [f"Origin: http://localhost:{port}"]},
    "a page by the number": lambda port: {
        "headers": [f"Host: 127.0.0.1:{port}", f"Origin: http://127.0.0.1:{port}"]
    },
    "a page by a tunnel": lambda port: {
        "headers": ["Host: localhost:5000", "Origin: http://localhost:5000"]
    },
    "the page itself": lambda port: {"headers": ["Sec-Fetch-Site: same-origin"]},
    "the address bar": lambda port: {"headers": ["Sec-Fetch-Site: none"]},
    "a process that has set its user": lambda port: {"user": os.getuid()},
    "IPv4 in an IPv6 socket": lambda port: {"address": loopback6().replace("1", "ffff:127.0.0.1")},
    "IPv6": lambda port: {"headers": [f"Host: [::1]:{port}"], "address": loopback6()},
}


@pytest.mark.parametrize("who", OWN)
def test_this_users_process_is_accepted(guarded, who):
    own = OWN[who](guarded.port)
    headers = own.pop("headers", [])
    assert ask(guarded.port, *headers, **own) == 200
    assert ask(guarded.port, *headers, path="/oview", **own) == 200
    assert ask(guarded.port, *headers, **importing(1), **own) == 200


def test_nnictl_and_nothing_else_sees_the_search(guarded):
    (trial,) = guarded.get("trial-jobs")
    assert trial["trialJobId"] in guarded.nnictl("trial", "ls", guarded.id)
    assert f"http://127.0.0.1:{guarded.port}" in guarded.nnictl("webui", "url", guarded.id)
    folder = guarded.home / "nni-experiments" / guarded.id
    assert folder.stat().st_mode & 0o777 == 0o700
    assert writable(folder) == []


@pytest.mark.parametrize("path", ["/tuner", "/ws", "/tuner/.websocket"])
def test_nobody_poses_as_the_tuner(guarded, path):
    assert ask(guarded.port, *UPGRADE, path=path) == 403
    assert guarded.get("check-status")["status"] == "NO_MORE_TRIAL"


@pytest.mark.parametrize("key", ["__symbol__", "__nni_type__", "__nni_obj__", "__enum__"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/experiment/import-data"),
        ("POST", "/trial-jobs"),
        ("PUT", "/experiment?update_type=SEARCH_SPACE"),
    ],
)
def test_a_request_with_code_is_refused_whoever_asks(guarded, method, path, key):
    body = json.dumps([{"x": [{key: "path:os.system", "__args__": ["true"]}]}])
    assert ask(guarded.port, path=f"{API}{path}", method=method, body=body) == 400
    escaped = body.replace("__", r"\u005f_")
    assert ask(guarded.port, path=f"{API}{path}", method=method, body=escaped) == 400


def answers(port, *requests):
    """Return what the port answers to requests sent at once, until it hangs up."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall("".join(requests).encode())
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


def get(port, *headers, path=f"{API}/check-status"):
    lines = [f"GET {path} HTTP/1.1", f"Host: localhost:{port}", *headers, "", ""]
    return "\r\n".join(lines)


def test_a_foreign_request_after_an_own_one_is_refused_in_its_turn(guarded):
    port = guarded.port
    printed = answers(port, get(port), get(port), get(port, "Origin: http://example.com"))
    assert re.findall(r"HTTP/1.1 (\d+)", printed) == ["200", "200", "403"]


@pytest.mark.parametrize("path", ["/oview", f"{API}/check-status", "/nothing"])
def test_no_page_puts_a_frame_around_the_web_ui(guarded, path):
    printed = answers(guarded.port, get(guarded.port, "Connection: close", path=path))
    assert "\r\nX-Frame-Options: DENY\r\n" in printed


def test_the_proxy_to_the_internet_is_closed(guarded):
    for path in ("/netron/x.png", "/netron", "/NETRON/"):
        assert ask(guarded.port, path=path) == 403
    for path in ("//netron/", "/%6eetron/"):
        assert ask(guarded.port, path=path) in (200, 403, 404)  # 200: the Web UI's page
    time.sleep(1)  # the proxy ends the manager once it has not found netron.app
    assert ask(guarded.port) == 200


def test_no_signal_opens_a_debugger(guarded):
    (manager,) = processes_at(guarded.home, MANAGER)
    assert os.readlink(f"/proc/{manager.pid}/fd/0") == "/dev/null"  # a terminal would not close
    for _ in range(2):
        manager.send_signal(signal.SIGUSR1)
        time.sleep(0.5)
    assert guarded.get("check-status")["status"] == "NO_MORE_TRIAL"
    listening = [c for c in manager.net_connections("tcp") if c.status == "LISTEN"]
    assert {c.laddr.port for c in listening} == {guarded.port}


@pytest.mark.parametrize("options", ["--inspect", "--inspect-brk=0.0.0.0:9229 --no-warnings"])
def test_the_users_node_options_open_no_debugger(monkeypatch, capsys, options):
    monkeypatch.setenv("NODE_OPTIONS", options)
    monkeypatch.setenv("NNI_GUARD", "")
    prepare_environment(None, [], None)
    assert "--inspect" not in os.environ["NODE_OPTIONS"]
    assert ("--no-warnings" in os.environ["NODE_OPTIONS"]) == ("--no-warnings" in options)
    assert json.loads(os.environ["NNI_GUARD"])["nodeOptions"] == options  # which trials get
    assert "NODE_OPTIONS has --inspect" in capsys.readouterr().out


# access.js alone, in NNI's Node


@pytest.fixture
def node(tmp_path):
    """Start NNI's Node with a script that has access.js; return the process."""
    started = []

    def node(script, prelude="", before=(), **settings):
        settings = {"port": free_port(), "python": sys.executable} | settings
        access = json.dumps(str(ROOT / "nnisearch" / "manager" / "access.js"))
        code = f"{prelude}; const settings = {json.dumps(settings)};"
        code += f"const changes = require({access})(settings); {script}"
        command = [*before, Path(nni_node.__path__[0], "node"), "-e", code]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, text=True, cwd=tmp_path, **pipes))
        return started[-1]

    yield node
    for process in started:
        with process:  # closes its pipes
            process.kill()


SERVER = """
require("http").createServer((_, answer) => answer.end("here")).listen(
    settings.port, () => console.log(settings.port));
"""
LOCAL = "Host: 127.0.0.1:8090"
NAMED = {"listen": "127.0.0.1", "host": ["Lab.example"]}


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (200, ["Host: lab.example", "Origin: https://lab.example"]),
        (200, ["Host: LAB.example", "Sec-Fetch-Site: same-origin"]),
        (200, ["Host: lab.example", "Origin: https://lab.example", "Sec-Fetch-Site: same-origin"]),
        (200, ["Origin: https://lab.example", "Sec-Fetch-Site: same-origin"]),
        (200, [LOCAL, "Origin: https://lab.example", "X-Forwarded-Host: lab.example"]),
        (200, ["Host: 192.0.2.1:8090", "Origin: http://192.0.2.1:8090"]),
        (200, ["Host: [2001:db8::1]:8090"]),
        (403, ["Host: lab.example", "Origin: https://evil.example"]),
        (403, ["Host: lab.example", "Origin: https://lab.example:3000"]),
        (403, ["Origin: https://lab.example", "Sec-Fetch-Site: cross-site"]),
        (403, ["Origin: https://lab.example"]),
        (403, ["Host: evil.example", "Origin: http://evil.example"]),
        (403, ["Host: evil.example", "Sec-Fetch-Site: same-origin"]),
        (403, ["Host: 127.0.0.1.evil.example"]),
    ],
)
def test_with_listen_a_proxy_may_be_in_front(node, status, headers):
    """It speaks TLS to the browser, and may change Host; mostly it is another user's process."""
    port = int(node(SERVER, **NAMED).stdout.readline())
    assert ask(port, *headers, user=nobody()) == status


def test_listen_opens_one_address(node):
    outside = outside_address()
    port = int(node(SERVER, listen=outside).stdout.readline())
    assert ask(port, address=outside, user=nobody()) == 200
    assert ask(port) == 200
    assert ask(port, user=nobody()) == 403
    assert ask(port, address="127.0.0.2") is None


def test_a_stop_does_not_wait_for_a_browser(node):
    """It opens connections before it needs them."""
    stop = 'server.on("connection", () => server.close(() => console.log("stopped")));'
    server = node(f"const server = {SERVER.strip()} server.headersTimeout = 0; {stop}")
    port = int(server.stdout.readline())
    with socket.create_connection(("127.0.0.1", port), timeout=60):
        assert server.stdout.readline() == "stopped\n"


def test_a_proxy_of_another_user_is_told_of_listen(node):
    port = int(node(SERVER).stdout.readline())
    bash = f"exec 3<>/dev/tcp/127.0.0.1/{port}; cat <&3"
    command = ["bash", "-c", bash]
    answer = subprocess.run(command, capture_output=True, text=True, user=nobody(), cwd="/").stdout
    assert answer.startswith("HTTP/1.1 403 Forbidden\n")
    assert "--listen 127.0.0.1 admits all users of this machine" in answer


def test_strangers_who_connect_again_and_again_do_not_stall_the_manager(node):
    prelude = "const fs = require('fs'); const { readFileSync } = fs; let looks = 0;"
    prelude += "fs.readFileSync = (file, ...rest) => {"
    prelude += "looks += file === '/proc/net/tcp'; return readFileSync(file, ...rest); }"
    server = node(SERVER.replace('"here"', "String(looks)"), prelude=prelude)
    port = int(server.stdout.readline())
    assert ask(port) == 200
    server.send_signal(signal.SIGSTOP)
    bash = f"for _ in {{1..90}}; do exec {{each}}<>/dev/tcp/127.0.0.1/{port}; done; echo; sleep 600"
    command, how = ["bash", "-c", bash], {"user": nobody(), "cwd": "/", "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **how) as strangers:
        strangers.stdout.readline()
        server.send_signal(signal.SIGCONT)
        looks = int(answers(port, get(port, "Connection: close")).splitlines()[-1])
        strangers.kill()
    assert looks < 10


def test_a_stranger_who_has_hung_up_does_not_pass_for_another_process(node):
    """Its connection has the same port as one of this user's, and another address."""
    echo = SERVER.replace("(_, answer) =>", "({ url }, answer) => console.log(url) ??")
    server = node(echo)
    port = int(server.stdout.readline())
    with socket.create_connection(("127.0.0.1", port)) as own:
        server.send_signal(signal.SIGSTOP)
        code = f"import os, socket; os.setuid({nobody()}); stranger = socket.socket();"
        code += f"stranger.bind(('127.0.0.2', {own.getsockname()[1]}));"
        code += f"stranger.connect(('127.0.0.1', {port}));"
        code += f"stranger.sendall({get(port, path='/stranger').encode()!r})"
        subprocess.run([sys.executable, "-c", code], check=True)
        server.send_signal(signal.SIGCONT)
        assert ask(port, path="/own") == 200
    assert server.stdout.readline() == "/own\n"


@pytest.mark.parametrize("kernel", ["6.1.0-18-amd64", "5.15.90.1-microsoft-standard-WSL2"])
def test_in_wsl_a_process_of_root_is_accepted(node, kernel):
    nobody()  # only root can pose as the user whose search another's is
    prelude = f"process.getuid = () => 1000; require('os').release = () => '{kernel}'"
    port = int(node(SERVER, prelude=prelude).stdout.readline())
    assert ask(port) == (200 if "microsoft" in kernel else 403)


def ends(pid):
    psutil.wait_procs([process := psutil.Process(pid)], timeout=60)
    return not lives(process)


def test_tensorboard_is_not_open_to_the_network_and_ends_with_the_manager(node, tmp_path):
    (tmp_path / "tensorboard").mkdir()
    code = "import sys, time; print(*sys.argv[1:], sep='|', flush=True); time.sleep(600)"
    (tmp_path / "tensorboard" / "main.py").write_text(code)
    started = node("""
        const utils = {};
        changes["common/utils.js"](utils);
        const command = ["tensorboard", "--bind_all --logdir_spec=1:/a b", "--port=6006"];
        const { pid } = utils.getTunerProc(command, "inherit", process.cwd(), process.env);
        console.log(pid);
    """)
    lines = {started.stdout.readline().strip() for _ in range(2)}
    assert "--host=127.0.0.1|--logdir_spec=1:/a b|--port=6006" in lines
    (pid,) = filter(str.isdigit, lines)
    started.kill()
    assert ends(int(pid))


TUNER = """
import threading, time
from nni.tuner import Tuner

class Thinking(Tuner):
    def update_search_space(self, space):
        threading.Thread(target=time.sleep, args=[600]).start()  # it holds up the end of Python
        print("thinking", flush=True)
        time.sleep(600)
"""
# The manager's part, as access.js plays it. It is killed, or closes the socket.
THINK = """
const utils = {};
changes["common/utils.js"](utils);
const { Server } = require(process.execPath + "/../node_modules/ws");
const server = require("http").createServer();
new Server({ server }).on("connection", (tuner) => {
    tuner.send("IN{}");
    setTimeout(() => settings.closes && tuner.terminate(), 1000);
});
server.listen(settings.port, () => {
    const tuner = { className: "thinking.Thinking", codeDirectory: process.cwd() };
    const command = utils.getMsgDispatcherCommand({ tuner });
    const env = { ...process.env, SDK_PROCESS: "dispatcher", NNI_LOG_DIRECTORY: process.cwd(),
        NNI_TUNER_COMMAND_CHANNEL: `ws://localhost:${settings.stranger}/tuner` };
    const stdio = ["ignore", "inherit", "inherit"];
    console.log(utils.getTunerProc(command, stdio, process.cwd(), env).pid);
});
"""


@pytest.mark.parametrize("closes", [False, True], ids=["manager killed", "connection closed"])
def test_a_computing_tuner_ends_with_its_manager(node, tmp_path, closes):
    """It never connects to the port, which by then may be another user's."""
    (tmp_path / "thinking.py").write_text(TUNER)
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        stranger.setblocking(False)
        manager = node(THINK, closes=closes, stranger=stranger.getsockname()[1])
        tuner = int(manager.stdout.readline())
        assert manager.stdout.readline() == "thinking\n"
        if not closes:
            manager.kill()
        assert ends(tuner)
        with pytest.raises(BlockingIOError):
            stranger.accept()


@pytest.mark.parametrize(
    "command",
    [
        ["python", "/nnisearch/manager/dispatcher.py", "3"],
        ["python", "-m", "nni", "--exp_params", "e30="],
    ],
)
def test_a_tuner_is_found_after_nnisearch_and_after_nnictl(command):
    assert is_tuner(SimpleNamespace(cmdline=lambda: command))
    assert not is_tuner(SimpleNamespace(cmdline=lambda: ["/bin/sh", "-c", " ".join(command)]))


# Other addresses of localhost


@contextlib.contextmanager
def another_user_listens(port):
    """Let another user listen on ::1, and yield the process; what it is sent is in its output."""
    code = f"""
import os, socket
os.setuid({nobody()})
server = socket.create_server(("::1", {port}), family=socket.AF_INET6)
print("listening", flush=True)
while True:
    print(server.accept()[0].recv(9999), flush=True)
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "listening\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_port_that_another_has_taken_in_ipv6_ends_the_manager(node):
    loopback6()
    port = free_port()
    with another_user_listens(port) as other:
        assert not is_free(port)  # so a start takes the next one
        server = node(SERVER, port=port)  # the other was faster
        assert server.wait(60) == 1
        other.kill()
        assert other.stdout.read() == ""
    assert f"EADDRINUSE: address already in use ::1:{port}" in server.stderr.read()


@pytest.mark.parametrize(
    ("hosts", "commands"),
    [
        ("::1 localhost\n", []),
        ("::1 localhost\n127.0.0.1 localhost\n", []),
        ("127.0.0.1 localhost\n", ["sysctl -qw net.ipv6.conf.all.disable_ipv6=1"]),
    ],
    ids=["::1 alone", "::1 first", "no IPv6"],
)
def test_localhost_may_be_ipv4_or_ipv6(node, tmp_path, hosts, commands):
    """In a network of its own, with /etc/hosts as given, NNI's clients reach the manager."""
    (tmp_path / "hosts").write_text(hosts)
    steps = ["ip link set lo up", f"mount --bind {tmp_path / 'hosts'} /etc/hosts", *commands]
    enter = ["unshare", "--net", "--mount", "bash", "-ec"]
    if subprocess.run([*enter, " && ".join(steps)], capture_output=True).returncode != 0:
        pytest.skip("needs the right to make namespaces, and iproute2")
    client = "import sys, requests; print(requests.get(sys.argv[1]).text)"
    script = (
        SERVER.replace("console.log", "client")
        + f"""
        function client(port) {{
            const command = ["-c", {json.dumps(client)}, `http://localhost:${{port}}`];
            require("child_process").spawn(settings.python, command, {{ stdio: "inherit" }});
        }}"""
    )
    before = [*enter, " && ".join([*steps, '"$@"']), "bash"]
    assert node(script, before=before).stdout.readline() == "here\n"
