"""access.js: only programs of its own user can reach a search, and no web page can."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import nni_node
import psutil
import pytest
import yaml
from conftest import ENDLESS, ROOT, UPGRADE, ask, nobody, outside_address, writable
from experiment import MANAGER, UNCHECKED, Experiment, free_port, kill_at, processes_at
from machines import SSHD, Machine, make_key
from projects import CONFIG
from stand_ins import stand_in_nvidia_smi
from waiting import wait_for
from websockets.sync.server import serve

from nnisearch.shared.processes import is_tuner, lives
from nnisearch.start.launch import prepare_environment


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A search whose one trial does not end, for all that only asks."""
    home = tmp_path_factory.mktemp("guarded")
    stand_in_nvidia_smi(home, busy=[False])
    environment = {key: value for key, value in os.environ.items() if "CIFAR10" not in key}
    changes = {"maxTrialNumber": 1, "searchSpace": ENDLESS, "trialCommand": "sleep 3600"}
    changes |= {"trialConcurrency": 1, "trialGpuNumber": 1, "tuner": {"name": "Random"}}
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
    "a file": lambda port: {"headers": ["Origin: null"]},
    "a rebound name": lambda port: {"headers": [f"Host: example.com:{port}"]},
    "a rebound name and its page": lambda port: {
        "headers": [f"Host: example.com:{port}", f"Origin: http://example.com:{port}"]
    },
}


def command(file):
    """Return a request that makes NNI's tuner run a command."""
    call = {"__symbol__": "path:os.system", "__args__": [f"touch {file}"]}
    path = "/api/v1/nni/experiment/import-data"
    return {"path": path, "method": "POST", "body": json.dumps([{"value": call}])}


@pytest.mark.parametrize("who", STRANGERS)
def test_a_stranger_is_refused(guarded, tmp_path, who):
    port = guarded.port
    stranger = STRANGERS[who](port)
    headers = stranger.pop("headers", [])
    assert ask(port, *headers, **stranger) in (None, 403)
    assert ask(port, *headers, *UPGRADE, path="/tuner", **stranger) in (None, 403)
    assert ask(port, *headers, **command(tmp_path / "stranger's"), **stranger) in (None, 403)
    # The tuner takes one request after the other, and does run a command of this user's.
    assert ask(port, **command(tmp_path / "own")) == 200
    wait_for((tmp_path / "own").exists)
    assert not (tmp_path / "stranger's").exists()
    assert guarded.get("check-status")["status"] == "NO_MORE_TRIAL"


def test_this_users_process_is_accepted(guarded):
    port = guarded.port
    assert ask(port) == 200
    assert ask(port, f"Origin: http://localhost:{port}") == 200
    assert ask(port, f"Host: 127.0.0.1:{port}", f"Origin: http://127.0.0.1:{port}") == 200
    assert ask(port, path="/oview") == 200
    (trial,) = guarded.get("trial-jobs")
    assert trial["trialJobId"] in guarded.nnictl("trial", "ls", guarded.id)
    assert f"http://127.0.0.1:{port}" in guarded.nnictl("webui", "url", guarded.id)
    assert ask(port, user=os.getuid()) == 200
    assert ask(port, "Sec-Fetch-Site: same-origin") == 200
    assert ask(port, "Sec-Fetch-Site: none") == 200  # the address bar


def test_this_users_process_is_accepted_by_ipv6(guarded):
    assert ask(guarded.port, address=loopback6()) == 200
    assert ask(guarded.port, f"Host: [::1]:{guarded.port}", address=loopback6()) == 200


def answers(port, *requests):
    """Return what the port answers to requests sent at once, until it hangs up."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall("".join(requests).encode())
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


def get(port, *headers, path="/api/v1/nni/check-status"):
    lines = [f"GET {path} HTTP/1.1", f"Host: localhost:{port}", *headers, "", ""]
    return "\r\n".join(lines)


def test_a_foreign_request_after_an_own_one_is_refused_in_its_turn(guarded):
    port = guarded.port
    printed = answers(port, get(port), get(port), get(port, "Origin: http://example.com"))
    assert re.findall(r"HTTP/1.1 (\d+)", printed) == ["200", "200", "403"]
    assert guarded.get("check-status")["status"] == "NO_MORE_TRIAL"


@pytest.mark.parametrize("path", ["/oview", "/api/v1/nni/check-status", "/nothing"])
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


@pytest.mark.skipif(
    not (SSHD and shutil.which("ssh")),
    reason="needs sshd and ssh, Debian's openssh-server and openssh-client",
)
def test_a_tunnel_of_this_user_is_accepted(guarded, tmp_path):
    key = tmp_path / "key"
    make_key(key)
    server = Machine("127.0.0.2", tmp_path / "server", key, {"HOME": tmp_path})
    port = free_port()
    command = ["ssh", "-N", "-L", f"{port}:localhost:{guarded.port}", "-p", server.settings["port"]]
    command += ["-i", key, "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    tunnel = subprocess.Popen([*map(str, command), server.settings["host"]])
    try:
        wait_for(lambda: ask(port) == 200)
        assert ask(port, f"Origin: http://localhost:{port}") == 200
        assert ask(port, "Origin: http://example.com") == 403
    finally:
        tunnel.kill()
        tunnel.wait()
        server.die()


def test_the_folder_is_the_users_alone(guarded):
    folder = guarded.home / "nni-experiments" / guarded.id
    wait_for(lambda: list(folder.rglob("gpu_metrics")))
    assert folder.stat().st_mode & 0o777 == 0o700
    # The collector writes its list for everybody, in a folder that nobody else can enter.
    assert [path for path in writable(folder) if not path.endswith("/gpu_metrics")] == []


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
    prepare_environment(SimpleNamespace(training_service=None), None)
    assert "--inspect" not in os.environ["NODE_OPTIONS"]
    assert ("--no-warnings" in os.environ["NODE_OPTIONS"]) == ("--no-warnings" in options)
    assert json.loads(os.environ["NNI_GUARD"])["nodeOptions"] == options  # which trials get
    assert "NODE_OPTIONS has --inspect" in capsys.readouterr().out


# access.js alone, in NNI's Node


@pytest.fixture
def node(tmp_path):
    """Start NNI's Node with a script that has access.js; return the process."""
    started = []

    def node(script, prelude="", **settings):
        given = {"port": free_port(), "machines": [], "python": sys.executable} | settings
        guard = json.dumps(str(ROOT / "nnisearch" / "manager" / "access.js"))
        code = f"{prelude}; const settings = {json.dumps(given)};"
        code += f"const changes = require({guard})(settings); {script}"
        command = [Path(nni_node.__path__[0], "node"), "-e", code]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path))
        return started[-1]

    yield node
    for process in started:
        process.kill()
        process.wait()


SERVER = """
require("http").createServer((_, answer) => answer.end("here")).listen(
    settings.port, () => console.log(settings.port));
"""


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (200, ["Host: lab.example", "Origin: https://lab.example"]),
        (200, ["Host: lab.example", "Origin: https://lab.example", "Sec-Fetch-Site: same-origin"]),
        (200, ["Origin: https://lab.example", "Sec-Fetch-Site: same-origin"]),
        (200, ["Origin: https://lab.example", "X-Forwarded-Host: lab.example"]),
        (403, ["Host: lab.example", "Origin: https://evil.example"]),
        (403, ["Origin: https://lab.example", "Sec-Fetch-Site: cross-site"]),
        (403, ["Origin: https://lab.example"]),
    ],
)
def test_with_listen_a_proxy_may_be_in_front(node, status, headers):
    """It speaks TLS to the browser, and may change Host; mostly it is another user's process."""
    port = int(node(SERVER, listen="127.0.0.1").stdout.readline())
    assert ask(port, *headers, user=nobody()) == status


def test_a_stop_does_not_wait_for_a_browser(node):
    """It opens connections before it needs them."""
    stop = 'server.on("connection", () => server.close(() => console.log("stopped")));'
    server = node(f"const server = {SERVER.strip()} server.headersTimeout = 0; {stop}")
    port = int(server.stdout.readline())
    with socket.create_connection(("127.0.0.1", port), timeout=60) as browser:
        assert browser.recv(1) == b""
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


@pytest.mark.parametrize("kernel", ["6.1.0-18-amd64", "5.15.90.1-microsoft-standard-WSL2"])
def test_in_wsl_a_process_of_root_is_accepted(node, kernel):
    nobody()  # only root can pose as the user whose search another's is
    prelude = f"process.getuid = () => 1000; require('os').release = () => '{kernel}'"
    port = int(node(SERVER, prelude=prelude).stdout.readline())
    assert ask(port) == (200 if "microsoft" in kernel else 403)


def test_tensorboard_is_not_open_to_the_network(node):
    started = node("""
        const utils = { getTunerProc: (command) => console.log(JSON.stringify(command)) };
        changes["common/utils.js"](utils);
        utils.getTunerProc(["tensorboard", "--bind_all --logdir_spec=1:/x", "--port=6006"]);
    """)
    command = ["tensorboard", "--host=127.0.0.1 --logdir_spec=1:/x", "--port=6006"]
    assert json.loads(started.stdout.readline()) == command


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
        tuner = psutil.Process(int(manager.stdout.readline()))
        assert manager.stdout.readline() == "thinking\n"
        if not closes:
            manager.kill()
        psutil.wait_procs([tuner], timeout=60)
        assert not lives(tuner)
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


def test_a_runner_leaves_a_manager_without_the_secret():
    """What comes from the port of a manager that has ended could run any command."""
    runner = (ROOT / "nnisearch" / "manager" / "runner.py").read_text()
    paths = []

    def pose(channel):
        paths.append(channel.request.path)
        channel.send("a command")

    with serve(pose, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.socket.getsockname()[1]
        code = f"import runpy; runpy.run_module = lambda *_, **__: None; exec({runner!r})\n"
        place = (
            f"nnimanager_ip='127.0.0.1', nnimanager_port='{port}/secret', node_count=1, node_id=0"
        )
        code += f"Channel(types.SimpleNamespace({place}))._inner_open()"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        server.shutdown()
    assert result.returncode == 1
    assert f"ws://127.0.0.1:{port} is not the manager" in result.stderr
    assert len(paths) == 1
    assert "secret" not in paths[0]


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


TINY = CONFIG | {
    "trialCommand": f"python3 {ROOT / 'tests/support/other_project.py'}",
    "trialConcurrency": 1,
    "maxTrialNumber": 1,
}
# Takes the port after the search has found it free.
RACE = [
    "-c",
    "import sys; from nnisearch import cli; from nnisearch.before import checks;"
    "from nnisearch.start import launch as start; checks.check = lambda _: [];"
    "start.is_free = lambda port: True; sys.exit(cli.main())",
]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (UNCHECKED, "--port is {port}; allowed: a free one"),
        (RACE, "EADDRINUSE: address already in use ::1:{port}"),
    ],
    ids=["before", "meanwhile"],
)
def test_a_port_that_another_has_taken_in_ipv6_fails_the_start(run_search, how, said):
    loopback6()
    port = free_port()
    with another_user_listens(port) as other:
        result = run_search("-p", port, "--detach", "--no-rehearsal", config=TINY, how=how)
        other.kill()
        assert other.stdout.read() == ""
    assert result.returncode == 1
    assert said.format(port=port) in result.stderr


def namespace(tmp_path, hosts, *commands):
    """Return a command that runs another in a network of its own, with /etc/hosts as given."""
    file = tmp_path / "hosts"
    file.write_text(hosts)
    steps = ["ip link set lo up", f"mount --bind {file} /etc/hosts", *commands]
    enter = ["unshare", "--net", "--mount", "bash", "-ec"]
    probe = [*enter, " && ".join(steps)]
    if os.getuid() != 0 or subprocess.run(probe, capture_output=True).returncode != 0:
        pytest.skip("needs the right to make namespaces, and iproute2")
    return [*enter, " && ".join([*steps, '"$@"']), "bash"]


@pytest.mark.parametrize(
    ("hosts", "commands"),
    [
        ("::1 localhost\n", []),
        ("::1 localhost\n127.0.0.1 localhost\n", []),
        ("127.0.0.1 localhost\n", ["sysctl -qw net.ipv6.conf.all.disable_ipv6=1"]),
    ],
    ids=["::1 alone", "::1 first", "no IPv6"],
)
def test_localhost_may_be_ipv4_or_ipv6(run_search, tmp_path, hosts, commands):
    before = namespace(tmp_path, hosts, *commands)
    result = run_search("-p", free_port(), config=TINY, how=UNCHECKED, before=before)
    assert result.returncode == 0, result.stderr
    assert "1 of 1 trials have a result" in result.stdout


def test_in_reuse_mode_the_runners_on_this_machine_report_and_nobody_else(experiment, tmp_path):
    """They come from its outside address, to the port after the Web UI's."""
    config = TINY | {"trainingService": {"platform": "local", "reuseMode": True}}
    (tmp_path / "reuse.yml").write_text(yaml.safe_dump(config))
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "empty").touch()  # NNI sends the folder along, and fails for want of files
    folders = {"trialCodeDirectory": str(tmp_path / "code")}
    folders |= {"experimentWorkingDirectory": str(tmp_path / "home" / "it's\n$HOME")}
    search = experiment(tmp_path / "reuse.yml", **folders)
    outside = {"address": outside_address(), "path": "/"}
    wait_for(lambda: ask(search.port + 1, **outside))  # its second server starts last
    assert ask(search.port + 1, **outside, user=nobody()) is None
    assert ask(search.port + 1, *UPGRADE, **outside) == 400  # without the secret
    (trial,) = search.wait(120)
    assert trial["status"] == "SUCCEEDED"
    assert search.stop() == []
