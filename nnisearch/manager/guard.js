// Who may talk to NNI's manager. As shipped, whoever reaches its port makes it run any command, and so
// does any web page in its user's browser. Loaded by manager.js, this promises:
// - the Web UI's port takes connections from this machine only, and of this user's processes only;
// - no page of another site gets an answer, or a frame around the Web UI;
// - the port after it, where trials report, takes this user's processes and the machines of the
//   configuration, and there only whoever has read the secret in the experiment's private folder;
// - what NNI writes is this user's alone, on each machine, and no password is in a process's arguments.
// --listen gives up the first for the address that it names.
"use strict";
const { spawn } = require("child_process");
const crypto = require("crypto");
const fs = require("fs");
const net = require("net");
const { listen: bind } = net.Server.prototype;
const SYN_SENT = "02"; // a state in /proc/net/tcp: it wants a connection, and has none yet

const ipv4 = (address) => address.replace(/^::ffff:/, "");

// An address and port as Linux writes them in /proc/net/tcp and tcp6: words of 4 bytes, reversed.
function entries(address, port) {
    const hex = (number, digits) => number.toString(16).toUpperCase().padStart(digits, "0");
    const word = (bytes) => [...bytes].reverse().map((byte) => hex(byte, 2)).join("");
    const end = `:${hex(port, 4)}`;
    if (net.isIPv4(ipv4(address))) {
        const four = word(ipv4(address).split(".").map(Number)) + end;
        return [four, `0000000000000000FFFF0000${four}`]; // the latter of sockets that take both
    }
    const [head, tail] = address.split("%")[0].split("::").map((part) => part.split(":"));
    const zeros = tail ? Array(8 - head.length - tail.length).fill("0") : [];
    const groups = [...head, ...zeros, ...(tail ?? [])].map((group) => parseInt(group || "0", 16));
    const bytes = groups.flatMap((group) => [group >> 8, group & 255]);
    return [[0, 4, 8, 12].map((at) => word(bytes.slice(at, at + 4))).join("") + end];
}

// Whether a process of this user, on this machine, is at the other end.
function isOwn(socket) {
    const { remoteAddress, remotePort, localAddress, localPort } = socket;
    if (!remoteAddress || !localAddress) return false; // it has hung up
    const tables = ["/proc/net/tcp", "/proc/net/tcp6"].filter((file) => fs.existsSync(file));
    if (tables.length === 0) return ipv4(remoteAddress).startsWith("127.") || remoteAddress === "::1";
    const [peer, here] = [entries(remoteAddress, remotePort), entries(localAddress, localPort)];
    const lines = tables.flatMap((file) => fs.readFileSync(file, "latin1").trim().split("\n"));
    const isListed = lines.some((line) => {
        const [, local, remote, state, , , , uid, , inode] = line.trim().split(/\s+/);
        const isPeer = peer.includes(local) && here.includes(remote) && state !== SYN_SENT;
        return isPeer && Number(uid) === process.getuid() && inode > 0; // 0: closed, its uid is no more
    });
    // Had another user hung up meanwhile, a process of this user might have got the same port.
    return isListed && socket._handle?.getpeername({}) === 0;
}

// Why a request is refused, or undefined. Browsers say in Origin and Sec-Fetch-Site whose page asks,
// not both for every request. Host too: DNS may call any name 127.0.0.1.
function refusal({ host, origin, "sec-fetch-site": site = "none" }, isOpen) {
    if (!isOpen && !/^(localhost|127\.0\.0\.1|\[::1\])(:\d+)?$/i.test(host))
        return "Call this machine localhost or 127.0.0.1 in the address.";
    if (!["none", "same-origin"].includes(site) || ![undefined, `http://${host}`].includes(origin))
        return "A page of another site has asked. To come here, type the address into the browser.";
}

function guard(server, isWelcome, isOpen) {
    const { emit } = server;
    server.emit = function (event, subject, answer, ...rest) {
        if (event === "connection" && !isWelcome(subject)) return subject.destroy();
        if (event === "request" || event === "upgrade") {
            const why = refusal(subject.headers, isOpen);
            if (event === "request") answer.setHeader("X-Frame-Options", "DENY");
            if (why && event === "request") // in its turn, after the answers that are still due
                return answer.writeHead(403, { Connection: "close" }).end(`${why}\n`);
            if (why)
                return answer.on("error", () => {}) // an upgrade's answer is its socket
                    .end("HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
        }
        return emit.call(this, event, subject, answer, ...rest);
    };
}

// Listen on ::1, which localhost may mean first, and hand what comes there to the server; then call
// back. Nobody else can have it afterwards; if somebody has it already, the manager ends.
function listenOnIPv6(server, port, then) {
    const six = net.createServer({ allowHalfOpen: true }, (s) => server.emit("connection", s));
    six.once("listening", then);
    six.once("error", (error) => {
        if (["EADDRNOTAVAIL", "EAFNOSUPPORT"].includes(error.code)) return then(); // no IPv6 here
        console.error(error.message);
        process.exit(1);
    });
    bind.call(six, port, "::1").unref();
}

// Returns a function that hands a connection to the server of the Web UI's port.
function guardPorts({ port, listen, machines }) {
    let webUI;
    const adopted = new Set();
    net.Server.prototype.listen = function (at, ...rest) {
        if (at === port) {
            const isAsked = ({ localAddress }) =>
                Boolean(listen) && ["0.0.0.0", ipv4(localAddress ?? "")].includes(listen);
            const isWelcome = (s) => adopted.has(s) || isOwn(s) || isAsked(s);
            guard(this, isWelcome, Boolean(listen));
            webUI = this;
            const address = listen ? "0.0.0.0" : "127.0.0.1";
            listenOnIPv6(this, port, () => bind.call(this, at, address, ...rest));
            return this;
        }
        if (at === port + 1) { // where the trials of other machines, or in NNI's reuse mode, report
            const isMachine = ({ remoteAddress }) => machines.includes(ipv4(remoteAddress ?? ""));
            guard(this, (socket) => isOwn(socket) || isMachine(socket), true);
        }
        return bind.call(this, at, ...rest);
    };
    return (connection) => {
        adopted.add(connection);
        webUI.emit("connection", connection);
    };
}

module.exports = function (settings) {
    const adopt = guardPorts(settings);
    // Whoever knows a runner's ID could report in its name, and ps on its machine shows that ID.
    const secret = crypto.randomBytes(16).toString("hex");
    const reusable = "training_service/reusable";
    const remote = "training_service/remote_machine";
    return {
        // A proxy to netron.app. Any page's GET goes there, and a name that is not found ends NNI.
        "node_modules/http-proxy/index.js": (proxy) => {
            proxy.createProxyServer = () => ({ web: (_, answer) => answer.status(403).end() });
        },
        // The tuner's process, by a socket that nobody else has: its port may be lost to others, and
        // ps shows its arguments to everybody. And without the shell that NNI starts it by.
        "common/utils.js": (utils) => {
            let config;
            utils.getMsgDispatcherCommand = ({ searchSpace, ...needed }) => {
                config = needed;
                return [settings.python, `${__dirname}/dispatcher.py`, "3"];
            };
            utils.getTunerProc = ([python, ...args], stdio, cwd, env) => {
                const tuner = spawn(python, args, { stdio: [...stdio, "pipe"], cwd, env });
                tuner.on("error", ({ message }) => console.error(message)); // Python is not there
                const connection = tuner.stdio[3];
                connection.writable = true; // which Node 16 has false, although it is
                connection.on("error", () => {}); // it has ended
                connection.write(`${JSON.stringify(config)}\n`);
                adopt(connection);
                return tuner;
            };
        },
        "training_service/common/util.js": (util) => {
            const { execMkdir } = util;
            util.execMkdir = (folder) => execMkdir(folder); // never with NNI's umask 0
        },
        [`${reusable}/environment.js`]: ({ RunnerSettings: { prototype } }) => {
            prototype.toJSON = function () { // the runner connects to ws://IP:PORT
                return { ...this, nniManagerPort: `${this.nniManagerPort}/${secret}` };
            };
        },
        [`${reusable}/channels/webCommandChannel.js`]: ({ WebCommandChannel: { prototype } }) => {
            const { start } = prototype;
            prototype.start = function () {
                const started = start.call(this);
                this.webSocketServer.shouldHandle = ({ url }) => url === `/${secret}`;
                return started;
            };
        },
        [`${remote}/extends/linuxCommands.js`]: ({ LinuxCommands: { prototype } }) => {
            const { createFolder } = prototype;
            prototype.createFolder = (folder) => createFolder(folder); // never with NNI's umask 0
            prototype.allowPermission = () => "true"; // NNI opens the folder to everybody
        },
        // All that NNI writes on a machine goes below one folder. It stands in /tmp itself, where
        // nobody can move it away, and one look tells that it is ours, a folder, and closed.
        [`${remote}/shellExecutor.js`]: ({ ShellExecutor: { prototype } }) => {
            const { initialize } = prototype;
            prototype.initialize = async function (machine) {
                await initialize.call(this, machine);
                if (this.isWindows) return;
                const folder = `/tmp/nni-${settings.id}`;
                const { exitCode } = await this.execute(`mkdir -m 700 ${folder} 2>/dev/null; `
                    + `[ "$(stat -c '%u %f' ${folder})" = "$(id -u) 41c0" ]`); // 41c0: drwx------
                if (exitCode !== 0)
                    throw new Error(`${this.name}: ${folder} is not a folder of this user's alone`);
                this.tempPath = folder;
            };
        },
    };
};
