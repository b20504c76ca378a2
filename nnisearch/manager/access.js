// Restricts access to NNI's manager. As shipped, everybody who reaches its port can make it run any
// command, and so can any web page in the user's browser. With this file the port only accepts this
// user's processes on this machine, unless --listen opens one more address, and no page of another
// site. Tuner and TensorBoard are open to nobody else.
"use strict";
const { spawn } = require("child_process");
const fs = require("fs");
const net = require("net");
const { listen: bind } = net.Server.prototype;
const SYN_SENT = "02"; // in /proc/net/tcp: the state of a connection that does not stand yet
const IPV4_IN_IPV6 = /0{16}FFFF0{4}/g; // there: what stands before an IPv4 address
const MOST = 500; // connections at a time: each is an open file of the manager
const DISPATCHER = `${__dirname}/dispatcher.py`;
// The kernel kills it (PR_SET_PDEATHSIG is 1, SIGKILL is 9) when the manager ends.
const TENSORBOARD = "import ctypes, runpy; ctypes.CDLL(None).prctl(1, 9); "
    + "runpy.run_module('tensorboard.main', run_name='__main__')";
const CODE = /"__(symbol|nni_type|nni_obj|enum)__":/; // keys that NNI's serializer.py runs
const USER = process.getuid();
// In WSL a process of root relays the connections of Windows' browser.
const isWsl = /microsoft/i.test(require("os").release());
const REFUSAL = `This Web UI only answers processes of user ${USER}. --listen 127.0.0.1 admits all `
    + "users of this machine, and so a proxy or a relay, such as kubectl port-forward's.\n";
const isOwn = (user) => user === USER || (isWsl && user === 0);

// The UID of the process at the other end of each connection; undefined if none is on this machine.
function ownersOf(sockets) {
    const ends = {}; // inode: both addresses of a connection, as its other end has them
    const owners = {}; // both addresses: UID
    const tables = ["/proc/net/tcp", "/proc/net/tcp6"].filter(fs.existsSync);
    for (const line of tables.flatMap((file) => fs.readFileSync(file, "latin1").split("\n"))) {
        const [, local, remote, state, , , , uid, , inode] =
            line.replace(IPV4_IN_IPV6, "").trim().split(/\s+/);
        if (state === SYN_SENT || inode === "0") continue; // 0: closed, and the UID is lost
        ends[inode] = `${remote} ${local}`;
        owners[`${local} ${remote}`] = Number(uid);
    }
    return sockets.map((socket) => {
        if (!socket._handle) return undefined; // it has hung up
        const link = fs.readlinkSync(`/proc/self/fd/${socket._handle.fd}`); // socket:[inode]
        return owners[ends[link.slice("socket:[".length, -1)]];
    });
}

// Close a connection with an answer of one line, which the user's own proxy or relay may show.
function forbid(socket, text) {
    socket.on("error", () => {}).end(
        `HTTP/1.1 403 Forbidden\r\nContent-Length: ${text.length}\r\n\r\n${text}`);
    socket.resume(); // otherwise its unread request resets the connection before the answer
    setTimeout(() => socket.destroy(), 1000).unref();
}

// Why a request is refused, or undefined. Browsers name the requesting page in Origin or
// Sec-Fetch-Site, sometimes in only one. Host is checked, too, because DNS can give any name this
// machine's address. With --listen a proxy may be in front, which adds TLS and may change Host.
function refusal(headers, { listen, host: names = [] }) {
    const { host = "", origin, "sec-fetch-site": site = "none" } = headers;
    const name = host.replace(/:\d+$/, "").replace(/[[\]]/g, "").toLowerCase();
    if (!net.isIP(name) && !["localhost", ...names.map((own) => own.toLowerCase())].includes(name))
        return `Host is ${name}; allowed: localhost, an IP address, a name given by --host`;
    const page = listen ? origin?.replace(/^https:/, "http:") : origin;
    const isByProxy = listen
        && (site === "same-origin" || page === `http://${headers["x-forwarded-host"] ?? host}`);
    const isOwnPage = isByProxy || [undefined, `http://${host}`].includes(page);
    if (!["none", "same-origin"].includes(site) || !isOwnPage)
        return "A page of another site has asked. Type this address into the browser instead.";
}

// Guard NNI's server. Returns pass, which admits any connection, and adopt, for the tuner's.
function guard(server, settings, isOpen) {
    const { close, emit } = server;
    const pass = (socket) => emit.call(server, "connection", socket);
    const waiting = [];
    let nextReading = 0; // ms, as performance.now() tells
    let tuner;
    // The tables are read once for all that wait, and for a fifth of the time at most. Otherwise
    // another user could stall the manager by a few dozen connections per second.
    const decide = () => {
        const start = performance.now();
        const sockets = waiting.splice(0);
        ownersOf(sockets).forEach((user, index) =>
            isOwn(user) ? pass(sockets[index]) : forbid(sockets[index], REFUSAL));
        nextReading = performance.now() + 4 * (performance.now() - start);
    };
    const knock = (socket) => {
        socket.on("error", () => {}); // it may hang up while it waits
        if (waiting.push(socket) === 1) setTimeout(decide, nextReading - performance.now());
    };
    server.maxConnections = MOST;
    server.emit = function (event, subject, answer, ...rest) {
        if (event === "connection") return isOpen ? pass(subject) : knock(subject);
        if (event === "upgrade" && subject.socket !== tuner) // answer is a socket
            return forbid(answer, "Only the search's own tuner may open a web socket.\n");
        if (event === "request") {
            answer.setHeader("X-Frame-Options", "DENY");
            const why = refusal(subject.headers, settings);
            if (why) return answer.writeHead(403, { Connection: "close" }).end(`${why}\n`);
        }
        return emit.call(this, event, subject, answer, ...rest);
    };
    server.close = (then) => { // a browser may keep connections open for a minute
        setTimeout(then, 1000);
        return close.call(server, then);
    };
    return { pass, adopt: (socket) => pass(tuner = socket) };
}

// Listen on one more address, then call back. The manager ends if somebody has the port there.
function listenAlso(address, port, pass, then) {
    const server = net.createServer({ allowHalfOpen: true }, pass);
    server.maxConnections = MOST;
    server.once("listening", then).once("error", (error) => {
        if (["EADDRNOTAVAIL", "EAFNOSUPPORT"].includes(error.code)) return then(); // no IPv6 here
        console.error(error.message);
        process.exit(1);
    });
    bind.call(server, port, address).unref();
}

module.exports = function (settings) {
    const { listen, port, python } = settings;
    let adopt;
    net.Server.prototype.listen = function (at, ...rest) {
        if (at !== port) return bind.call(this, at, ...rest);
        const isOpen = ["127.0.0.1", "0.0.0.0"].includes(listen);
        const door = guard(this, settings, isOpen);
        adopt = door.adopt;
        const start = () => bind.call(this, port, isOpen ? listen : "127.0.0.1", ...rest);
        const next = listen && !isOpen ? () => listenAlso(listen, port, door.pass, start) : start;
        // NNI's clients call localhost, which may be ::1 first: nobody else may have that.
        listenAlso("::1", port, (socket) => this.emit("connection", socket), next);
        return this;
    };
    return {
        // A proxy to netron.app, open to GET requests of any page. An unknown host name ends NNI.
        "node_modules/http-proxy/index.js": (proxy) => {
            proxy.createProxyServer = () => ({ web: (_, answer) => answer.status(403).end() });
        },
        "rest_server/restHandler.js": (exports) => {
            const { createRestHandler } = exports;
            exports.createRestHandler = () => {
                const handle = createRestHandler();
                return (request, answer, next) => {
                    const [key] = CODE.exec(JSON.stringify(request.body)) ?? [];
                    if (!key) return handle(request, answer, next);
                    answer.status(400).json({ error: `${key} is code; allowed: data` });
                };
            };
        },
        // The tuner's process inherits its connection, because another user may take the port. It
        // gets the configuration by this connection, because ps shows arguments to all users.
        "common/utils.js": (utils) => {
            let config;
            utils.getMsgDispatcherCommand = ({ searchSpace, ...needed }) => {
                config = needed;
                return [python, DISPATCHER, "3"];
            };
            utils.getTunerProc = ([program, ...args], stdio, cwd, env) => {
                if (args[0] !== DISPATCHER) { // it is TensorBoard, which NNI opens to all users
                    const own = args.map((part) => part.replace("--bind_all ", ""));
                    const command = ["-c", TENSORBOARD, "--host=127.0.0.1", ...own];
                    return spawn(python, command, { stdio, cwd, env, detached: true });
                }
                const tuner = spawn(program, args, { stdio: [...stdio, "pipe"], cwd, env });
                tuner.on("error", ({ message }) => console.error(message)); // no such program
                const connection = tuner.stdio[3];
                connection.writable = true; // Node 16 has false by mistake
                connection.on("error", () => {}); // it has ended
                connection.write(`${JSON.stringify(config)}\n`);
                adopt(connection);
                return tuner;
            };
        },
    };
};
