// Restricts access to NNI's manager. As shipped, everybody who reaches its port can make it run any
// command, and so can any web page in the user's browser. With this file:
// - the Web UI's port only accepts this user's processes on this machine;
// - web pages of other sites get no answer, and cannot show the Web UI in a frame;
// - the tuner's process only talks to its manager;
// - the next port, where runners report, only accepts this user's processes and the configured
//   machines, and only runners that know the secret in the experiment's private folder;
// - other users cannot read NNI's files on any machine, nor find passwords in arguments of processes.
// --listen lifts the first restriction for one address.
"use strict";
const { spawn } = require("child_process");
const crypto = require("crypto");
const fs = require("fs");
const net = require("net");
const os = require("os");
const { listen: bind } = net.Server.prototype;
const SYN_SENT = "02"; // a state in /proc/net/tcp: not connected yet
const DISPATCHER = `${__dirname}/dispatcher.py`;
const MOST = 100; // strangers' connections at a time: each is an open file of the manager
const USER = process.getuid();
// In WSL a process of root relays the connections of Windows' browser.
const WELCOME = /microsoft/i.test(os.release()) ? [USER, 0] : [USER];

const ipv4 = (address) => address.replace(/^::ffff:/, "");

// An address and port as in /proc/net/tcp and tcp6: 4-byte words in reverse byte order.
function entries(address, port) {
    const hex = (number, digits) => number.toString(16).toUpperCase().padStart(digits, "0");
    const word = (bytes) => [...bytes].reverse().map((byte) => hex(byte, 2)).join("");
    const end = `:${hex(port, 4)}`;
    if (net.isIPv4(ipv4(address))) {
        const four = word(ipv4(address).split(".").map(Number)) + end;
        return [four, `0000000000000000FFFF0000${four}`]; // the second one is IPv4 in an IPv6 socket
    }
    const [head, tail] = address.split("%")[0].split("::").map((part) => part.split(":"));
    const zeros = tail ? Array(8 - head.length - tail.length).fill("0") : [];
    const groups = [...head, ...zeros, ...(tail ?? [])].map((group) => parseInt(group || "0", 16));
    const bytes = groups.flatMap((group) => [group >> 8, group & 255]);
    return [[0, 4, 8, 12].map((at) => word(bytes.slice(at, at + 4))).join("") + end];
}

// {both addresses of a connection: UID of the process at its other end}; undefined without /proc.
function readOwners() {
    const tables = ["/proc/net/tcp", "/proc/net/tcp6"].filter((file) => fs.existsSync(file));
    const lines = tables.flatMap((file) => fs.readFileSync(file, "latin1").trim().split("\n"));
    const owners = new Map();
    for (const line of lines) {
        const [, local, remote, state, , , , uid, , inode] = line.trim().split(/\s+/);
        if (state === SYN_SENT || Number(inode) === 0) continue; // 0: closed, and the UID is lost
        owners.set(`${local} ${remote}`, Number(uid));
    }
    return tables.length > 0 ? owners : undefined;
}

// The UID of the process at the other end, or undefined if it is not on this machine.
function ownerOf(socket, owners) {
    const { remoteAddress, remotePort, localAddress, localPort } = socket;
    if (!remoteAddress || !localAddress) return undefined; // it has hung up
    const isLocal = ipv4(remoteAddress).startsWith("127.") || remoteAddress === "::1";
    if (!owners) return isLocal ? USER : undefined; // users cannot be told apart
    const here = entries(localAddress, localPort);
    const ends = entries(remoteAddress, remotePort).flatMap((peer) =>
        here.map((own) => `${peer} ${own}`));
    // Still connected? Otherwise a process of this user may just have got another user's port.
    const isConnected = socket._handle?.getpeername({}) === 0;
    return isConnected ? owners.get(ends.find((each) => owners.has(each))) : undefined;
}

const asked = []; // connections that wait for the next reading of the tables, with their callbacks
let nextReading = 0; // ms, as performance.now() tells

// Call back with the owner of a connection. Reading the tables takes tens of milliseconds: it is done
// once for all connections that wait, and takes a fifth of the time at most. Otherwise another user
// could stall the manager by a few dozen connections per second.
function askOwner(socket, callback) {
    if (asked.length === MOST) return socket.destroy();
    socket.on("error", () => {}); // it may hang up while it waits
    if (asked.push([socket, callback]) > 1) return;
    setTimeout(() => {
        const start = performance.now();
        const owners = readOwners();
        nextReading = performance.now() + 4 * (performance.now() - start);
        for (const [each, tell] of asked.splice(0)) tell(ownerOf(each, owners));
    }, nextReading - performance.now());
}

// Why a request is refused, or undefined. Browsers name the requesting page in Origin or
// Sec-Fetch-Site, sometimes in only one of them. Host is checked, too, because DNS can give any name
// the address 127.0.0.1. With --listen a proxy may be in front, which adds TLS and may change Host.
function refusal(headers, isOpen) {
    const { host, origin, "sec-fetch-site": site = "none" } = headers;
    if (!isOpen && !/^(localhost|127\.0\.0\.1|\[::1\])(:\d+)?$/i.test(host))
        return "Call this machine localhost or 127.0.0.1 in the address.";
    const name = isOpen && origin?.replace(/^https:/, "http:");
    const isByProxy = isOpen && (site === "same-origin" || name === `http://${host}`
        || name === `http://${headers["x-forwarded-host"] ?? host}`);
    const isHere = isByProxy || [undefined, `http://${host}`].includes(origin);
    if (!["none", "same-origin"].includes(site) || !isHere)
        return "A page of another site has asked. Type this address into the browser instead.";
}

const forbid = (text) => "HTTP/1.1 403 Forbidden\r\nConnection: close\r\n"
    + `Content-Length: ${Buffer.byteLength(text)}\r\n\r\n${text}`;

const turnedAway = new Set(); // connections to which the reason is being sent

// Close the connection, and tell a process of another user why: it may be this user's own relay.
function turnAway(socket, owner) {
    if (owner === undefined || turnedAway.size === MOST) return socket.destroy();
    turnedAway.add(socket.on("close", () => turnedAway.delete(socket)));
    const advice = "--listen 127.0.0.1 admits all users of this machine, and so a proxy or a relay, "
        + "such as kubectl port-forward's";
    socket.on("error", () => {}).end(forbid(`A process of user ${owner} has asked, and this Web UI `
        + `belongs to user ${USER}. ${advice}.\n`));
    socket.resume();
    setTimeout(() => socket.destroy(), 1000).unref();
}

function guard(server, isWelcome, isOpen, refuse = (socket) => socket.destroy()) {
    const { emit } = server;
    server.emit = function (event, subject, answer, ...rest) {
        if (event === "connection" && !isWelcome(subject))
            return askOwner(subject, (owner) =>
                WELCOME.includes(owner) ? emit.call(this, event, subject) : refuse(subject, owner));
        if (event === "request" || event === "upgrade") {
            const why = refusal(subject.headers, isOpen);
            if (event === "request") answer.setHeader("X-Frame-Options", "DENY");
            if (why && event === "request") // after the answers to earlier requests
                return answer.writeHead(403, { Connection: "close" }).end(`${why}\n`);
            if (why)
                return answer.on("error", () => {}).end(forbid("")); // the socket of an upgrade
        }
        return emit.call(this, event, subject, answer, ...rest);
    };
}

// Listen on ::1 as well, since localhost may be ::1 first; then call back. Nobody else can take the
// port there afterwards. If somebody has it already, the manager ends.
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

// A browser opens connections in advance. NNI would wait up to a minute for their end when it stops.
function closeQuickly(server, kept) {
    const { close } = server;
    const connections = new Set();
    server.on("connection", (socket) => {
        if (kept.has(socket)) return;
        connections.add(socket);
        socket.on("close", () => connections.delete(socket));
    });
    server.close = function (...args) {
        setTimeout(() => connections.forEach((socket) => socket.destroy()), 1000); // after the answers
        return close.apply(this, args);
    };
}

// Returns a function that passes a connection to the server of the Web UI's port.
function guardPorts({ port, listen, machines }) {
    let webUI;
    const adopted = new Set();
    net.Server.prototype.listen = function (at, ...rest) {
        if (at === port) {
            const isAsked = ({ localAddress }) =>
                Boolean(listen) && ["0.0.0.0", ipv4(localAddress ?? "")].includes(listen);
            const isWelcome = (socket) => adopted.has(socket) || isAsked(socket);
            guard(this, isWelcome, Boolean(listen), turnAway);
            closeQuickly(this, adopted);
            webUI = this;
            const address = listen ? "0.0.0.0" : "127.0.0.1";
            listenOnIPv6(this, port, () => bind.call(this, at, address, ...rest));
            return this;
        }
        if (at === port + 1) { // for runners: on other machines, or in NNI's reuse mode
            const isMachine = ({ remoteAddress }) => machines.includes(ipv4(remoteAddress ?? ""));
            guard(this, isMachine, true);
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
    // NNI only checks a runner's ID, which ps shows on the runner's machine.
    const secret = crypto.randomBytes(16).toString("hex");
    // Runner and manager prove that they know the secret, without sending it (runner.py).
    const proof = (who, nonce) =>
        crypto.createHmac("sha256", secret).update(`${who} ${nonce}`).digest("hex");
    const reusable = "training_service/reusable";
    const remote = "training_service/remote_machine";
    return {
        // A proxy to netron.app, open to GET requests of any page. An unknown host name ends NNI.
        "node_modules/http-proxy/index.js": (proxy) => {
            proxy.createProxyServer = () => ({ web: (_, answer) => answer.status(403).end() });
        },
        // The tuner's process inherits its connection, because another user may take the port. It gets
        // the configuration by this connection, because ps shows arguments to all users.
        "common/utils.js": (utils) => {
            const { getTunerProc } = utils;
            let config;
            utils.getMsgDispatcherCommand = ({ searchSpace, ...needed }) => {
                config = needed;
                return [settings.python, DISPATCHER, "3"];
            };
            utils.getTunerProc = (command, stdio, cwd, env, ...rest) => {
                if (command[1] !== DISPATCHER) { // it is TensorBoard, which NNI opens to all users
                    const host = `--host=${settings.listen ?? "127.0.0.1"}`;
                    const closed = command.map((part) => part.replace("--bind_all", host));
                    return getTunerProc(closed, stdio, cwd, env, ...rest);
                }
                const [python, ...args] = command;
                const tuner = spawn(python, args, { stdio: [...stdio, "pipe"], cwd, env });
                tuner.on("error", ({ message }) => console.error(message)); // Python does not exist
                const connection = tuner.stdio[3];
                connection.writable = true; // Node 16 has false by mistake
                connection.on("error", () => {}); // it has ended
                connection.write(`${JSON.stringify(config)}\n`);
                adopt(connection);
                return tuner;
            };
        },
        "training_service/common/util.js": (util) => {
            const { execMkdir } = util;
            util.execMkdir = (folder) => execMkdir(folder); // without NNI's umask 0
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
            prototype.createFolder = (folder) => createFolder(folder); // without NNI's umask 0
            prototype.allowPermission = () => "true"; // NNI opens the folder to all users
        },
        // NNI's files on a machine are all in one folder. It is directly in /tmp, where others cannot
        // move it, and one check proves that it is a folder, this user's, and closed to others.
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
                    throw new Error(`${this.name}: ${folder} is not a private folder of this user`);
                }
                this.tempPath = folder;
            };
        },
    };
};
