// search.py loads this into NNI's manager, by Node's --require. As shipped the manager lets in whoever
// reaches its port, and takes some 11 s from a trial's end to the next one's start. This promises: in
// come this user's programs and no web page of another site; the next trial starts within a second.
"use strict";
const [child_process, fs, Module, net, os, timers] =
    ["child_process", "fs", "module", "net", "os", "timers/promises"].map((name) => require(name));
const { listen, machines, nodeOptions } = JSON.parse(process.env.NNI_GUARD);
Object.assign(process.env, { NODE_OPTIONS: nodeOptions, NNI_GUARD: "" }); // which trials inherit
const [port, folder, id, mode, python] = ["port", "experiments-directory", "experiment-id", "mode",
    "python-interpreter"].map((name) => process.argv[process.argv.indexOf(`--${name}`) + 1]);

const ipv4 = (address) => (address || "").replace("::ffff:", "");
const hex = (number, digits) => Number(number).toString(16).toUpperCase().padStart(digits, "0");
const entry = (address, port) => // as /proc/net/tcp writes it: the bytes reversed
    ipv4(address).split(".").reverse().map((byte) => hex(byte, 2)).join("") + ":" + hex(port, 4);

// Whether a process of this user, on this machine, is at the other end.
function isOwn({ remoteAddress, remotePort, localAddress, localPort }) {
    const [peer, here] = [entry(remoteAddress, remotePort), entry(localAddress, localPort)];
    const tables = ["/proc/net/tcp", "/proc/net/tcp6"].filter((path) => fs.existsSync(path));
    const lines = tables.flatMap((path) => fs.readFileSync(path, "latin1").trim().split("\n"));
    return ipv4(remoteAddress).startsWith("127.") && (lines.length === 0 || lines.some((line) => {
        const [, local, remote, , , , , uid, , inode] = line.trim().split(/\s+/);
        const isPeer = local.endsWith(peer) && remote.endsWith(here);
        return isPeer && uid == process.getuid() && inode > 0; // inode 0: closed, its uid is no more
    }));
}

function guard(server, isWelcome, isOpen) {
    const { emit } = server;
    server.emit = function (event, subject, answer, ...rest) {
        if (event === "connection" && !isWelcome(subject)) return subject.destroy();
        if (event === "request" || event === "upgrade") {
            const { host, origin } = subject.headers; // Host too: DNS may call any name 127.0.0.1
            const isHere = isOpen || /^(localhost|127\.0\.0\.1|\[::1\])(:\d+)?$/i.test(host);
            if (!isHere || (origin !== undefined && origin !== `http://${host}`))
                return (event === "request" ? answer.socket : answer).on("error", () => {})
                    .end("HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
        }
        return emit.call(this, event, subject, answer, ...rest);
    };
}

const { listen: bind } = net.Server.prototype;
net.Server.prototype.listen = function (at, ...rest) {
    if (at == port) {
        const isAsked = ({ localAddress }) => [ipv4(localAddress), "0.0.0.0"].includes(listen);
        guard(this, (socket) => isOwn(socket) || isAsked(socket), Boolean(listen));
        return bind.call(this, at, listen ? "0.0.0.0" : "127.0.0.1", ...rest);
    }
    if (at == Number(port) + 1) // where the machines of platform remote report
        guard(this, (socket) => isOwn(socket) || machines.includes(ipv4(socket.remoteAddress)), true);
    return bind.call(this, at, ...rest);
};

// The loops that see a trial's end, start the next one and read the GPUs' state: ms, for NNI's 5,000.
// Not for other platforms than local, where NNI would note a trial before it knows its machine.
const PAUSES = mode === "local" ? { manageTrials: 50, runJobLoop: 50, "GPUScheduler.run": 500 } : {};
const { setTimeout: pause } = timers;
timers.setTimeout = (ms, ...rest) => {
    const caller = ms === 5000 ? new Error().stack.split("\n")[2] : "";
    return pause(PAUSES[Object.keys(PAUSES).find((name) => caller.includes(name))] ?? ms, ...rest);
};
const { setTimeout: wait } = global; // 10 s is how long NNI lets the tuner's process start
global.setTimeout = Object.assign((f, ms, ...rest) => wait(f, ms === 1e4 ? 12e4 : ms, ...rest), wait);

const unstored = {}; // trial: how many of its metrics are on their way to the database and the tuner
const patches = {
    "core/nnimanager": ({ NNIManager: { prototype } }) => {
        const { onTrialJobMetrics } = prototype;
        prototype.onTrialJobMetrics = function (metric) {
            unstored[metric.id] = (unstored[metric.id] ?? 0) + 1;
            return onTrialJobMetrics.call(this, metric).finally(() => unstored[metric.id]--);
        };
    },
    "../training_service/local/localTrainingService": ({ LocalTrainingService: { prototype } }) => {
        const { getTrialJob } = prototype;
        prototype.getTrialJob = async function (id) {
            const job = this.jobMap.get(id);
            if (job?.status !== "RUNNING") return getTrialJob.call(this, id);
            try {
                process.kill(job.pid, 0); // NNI starts a shell to ask
                return job;
            } catch { // It has ended. So has its last metric's way, or it is lost, and TPE with it.
                const stream = this.jobStreamMap.get(id);
                const written = fs.statSync(stream.path, { throwIfNoEntry: false })?.size ?? 0;
                if (stream.bytesRead >= written && !unstored[id]) return getTrialJob.call(this, id);
                stream.dataAvailable = true;
                stream.read(0);
                return job;
            }
        };
        os.tmpdir = () => `${folder}/${id}`; // searches that share the GPUs' state delete each other's
    },
    "./remoteEnvironmentService": ({ RemoteEnvironmentService: { prototype } }) => {
        const { getScript } = prototype;
        const name = "nni.tools.trial_tool.trial_runner"; // Python 3.14 makes it no event loop any more
        const runner = "import asyncio, runpy; asyncio.set_event_loop(asyncio.new_event_loop()); "
            + `runpy.run_module('${name}', run_name='__main__', alter_sys=True)`;
        prototype.getScript = async function (environment) {
            return (await getScript.call(this, environment)).replace(`-m ${name}`, `-c "${runner}"`);
        };
    },
    "../common/util": (util) => {
        const patience = "sleep = time.sleep; time.sleep = lambda _: sleep(2)"; // s, for NNI's 5
        const collector = `${python} -c "import time; ${patience}; `
            + 'from nni.tools.gpu_tool.gpu_metrics_collector import main; main([])"';
        util.runGpuMetricsCollector = (folder) => child_process.exec(
            util.getGpuMetricsCollectorBashScriptContent(folder).replace(/python3 \S+ \S+/, collector),
            { shell: "/bin/bash" });
    },
};
const { _load } = Module;
Module._load = function (request, ...rest) {
    const exports = _load.call(this, request, ...rest);
    patches[request]?.(exports);
    delete patches[request];
    return exports;
};
