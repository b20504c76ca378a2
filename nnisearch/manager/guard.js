// Who may talk to NNI's manager. As shipped, whoever reaches its port makes it run any command, and so
// does any web page in its user's browser. Loaded by manager.js, this promises:
// - the Web UI's port takes connections from this machine only, and of this user's processes only;
// - no page of another site gets an answer, or a frame around the Web UI;
// - the tuner's process talks to its manager alone;
// - the port after it, where trials report, takes this user's processes and the machines of the
//   configuration, and there only whoever has read the secret in the experiment's private folder;
// - what NNI writes is this user's alone, on each machine, and no password is in a process's arguments.
// --listen gives up the first for the address that it names.
"use strict";
const { spawn } = require("child_process");
const crypto = require("crypto");
const fs = require("fs");
const net = require("net");
const os = require("os");
const { listen: bind } = net.Server.prototype;
const SYN_SENT = "02"; // a state in /proc/net/tcp: it wants a connection, and has none yet
const DISPATCHER = `${__dirname}/dispatcher.py`;
const USER = process.getuid();
// In WSL a process of root hands on the connections of Windows' browser.
const WELCOME = /microsoft/i.test(os.release()) ? [USER, 0] : [USER];

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

// The number of the user on this machine whose process is at the other end, or undefined.
function ownerOf(socket) {
    const { remoteAddress, remotePort, localAddress, localPort } = socket;
    if (!remoteAddress || !localAddress) return undefined; // it has hung up
    const tables = ["/proc/net/tcp", "/proc/net/tcp6"].filter((file) => fs.existsSync(file));
    const isLocal = ipv4(remoteAddress).startsWith("127.") || remoteAddress === "::1";
    if (tables.length === 0) return isLocal ? USER : undefined; // nothing tells users apart
    const [peer, here] = [entries(remoteAddress, remotePort), entries(localAddress, localPort)];
    const lines = tables.flatMap((file) => fs.readFileSync(file, "latin1").trim().split("\n"));
    for (const line of lines) {
        const [, local, remote, state, , , , uid, , inode] = line.trim().split(/\s+/);
        const isPeer = peer.includes(local) && here.includes(remote) && state !== SYN_SENT;
        if (!isPeer || Number(inode) === 0) continue; // 0: closed, its uid is no more
        // Had another user hung up meanwhile, a process of this user might have got the same port.
        return socket._handle?.getpeername({}) === 0 ? Number(uid) : undefined;
    }
}

const isOwn = (socket) => WELCOME.includes(ownerOf(socket));

// Why a request is refused, or undefined. Browsers say in Origin and Sec-Fetch-Site whose page asks,
// not both for every request. Host too: DNS may call any name 127.0.0.1. What --listen has opened
// may be behind a proxy, which speaks TLS to the browser and may change Host.
function refusal(headers, isOpen) {
    const { host, origin, "sec-fetch-site": site = "none" } = headers;
    if (!isOpen && !/^(localhost|127\.0\.0\.1|\[::1\])(:\d+)?$/i.test(host))
        return "Call this machine localhost or 127.0.0.1 in the address.";
    const name = isOpen && origin?.replace(/^https:/, "http:");
    const isByProxy = isOpen && (site === "same-origin" || name === `http://${host}`
        || name === `http://${headers["x-forwarded-host"] ?? host}`);
    const isHere = isByProxy || [undefined, `http://${host}`].includes(origin);
    if (!["none", "same-origin"].includes(site) || !isHere)
        return "A page of another site has asked. To come here, type the address into the browser.";
}

const forbid = (text) => "HTTP/1.1 403 Forbidden\r\nConnection: close\r\n"
    + `Content-Length: ${Buffer.byteLength(text)}\r\n\r\n${text}`;

// Hang up, and tell another user of this machine why: it may be the user's own relay.
function turnAway(socket) {
    const owner = ownerOf(socket);
    if (owner === undefined) return socket.destroy();
    const way = "--listen 127.0.0.1 lets in all users of this machine, and so a proxy or a relay, "
        + "such as kubectl port-forward's";
    socket.on("error", () => {}).end(forbid(`A process of user ${owner} has asked, and this Web UI is `
        + `user ${USER}'s alone. ${way}.\n`));
    socket.resume();
    setTimeout(() => socket.destroy(), 1000).unref();
}

function guard(server, isWelcome, isOpen, refuse = (socket) => socket.destroy()) {
    const { emit } = server;
    server.emit = function (event, subject, answer, ...rest) {
        if (event === "connection" && !isWelcome(subject)) return refuse(subject);
        if (event === "request" || event === "upgrade") {
            const why = refusal(subject.headers, isOpen);
            if (event === "request") answer.setHeader("X-Frame-Options", "DENY");
            if (why && event === "request") // in its turn, after the answers that are still due
                return answer.writeHead(403, { Connection: "close" }).end(`${why}\n`);
            if (why)
                return answer.on("error", () => {}).end(forbid("")); // an upgrade's answer is its socket
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
            guard(this, isWelcome, Boolean(listen), turnAway);
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
    // Runner and manager prove to each other that they know it, and never send it (runner.py).
    const proof = (who, nonce) =>
        crypto.createHmac("sha256", secret).update(`${who} ${nonce}`).digest("hex");
    const reusable = "training_service/reusable";
    const remote = "training_service/remote_machine";
    return {
        // A proxy to netron.app. Any page's GET goes there, and a name that is not found ends NNI.
        "node_modules/http-proxy/index.js": (proxy) => {
            proxy.createProxyServer = () => ({ web: (_, answer) => answer.status(403).end() });
        },
        // The tuner's process gets its connection by a socket that nobody else has: the port may be
        // another's by then. And its configuration, since ps shows arguments to everybody.
        "common/utils.js": (utils) => {
            const { getTunerProc } = utils;
            let config;
            utils.getMsgDispatcherCommand = ({ searchSpace, ...needed }) => {
                config = needed;
                return [settings.python, DISPATCHER, "3"];
            };
            utils.getTunerProc = (command, stdio, cwd, env, ...rest) => {
                if (command[1] !== DISPATCHER) { // it is TensorBoard, which NNI opens to everybody
                    const host = `--host=${settings.listen ?? "127.0.0.1"}`;
                    const closed = command.map((part) => part.replace("--bind_all", host));
                    return getTunerProc(closed, stdio, cwd, env, ...rest);
                }
                const [python, ...args] = command;
                const tuner = spawn(python, args, { stdio: [...stdio, "pipe"], cwd, env });
                tuner.on("error", ({ message }) => console.error(message)); // there is no such Python
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
                const nonceOf = ({ url }) => url.split("/")[1];
                this.webSocketServer.shouldHandle = (request) =>
                    request.url === `/${nonceOf(request)}/${proof("runner", nonceOf(request))}`;
                this.webSocketServer.on("headers", (headers, request) =>
                    headers.push(`X-Proof: ${proof("manager", nonceOf(request))}`));
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
                if (exitCode !== 0) {
                    this.close();
                    throw new Error(`${this.name}: ${folder} is not a folder of this user's alone`);
                }
                this.tempPath = folder;
            };
        },
    };
};
