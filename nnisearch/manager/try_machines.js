// Tries the machines of a configuration as NNI would use them, all at once, before a search starts:
//     echo '{"machines": [...], "address": IP or null, "port": N, "probe": CODE}' | node try_machines.js
// On each machine the code, in Python, is run with an address to call back to as its argument. Prints
// [{stage, message}, ...], an object for each machine: stage is "machine", "login", "python" or "way"
// if it fails there, else null. NNI's own classes connect, so nothing differs from the search.
"use strict";
const crypto = require("crypto");
const fs = require("fs");
const { Server } = require("ws");

global.nni = { args: { logLevel: "critical" }, logStream: { writeLine() {} } };
require("common/globals");
const { getIPV4Address } = require("common/utils");
const { ShellExecutor } = require("training_service/remote_machine/shellExecutor");

const PATIENCE = 60; // s, with one machine
const OFF = /ECONN|EHOST|ENET|EPIPE|ETIMEDOUT|Timed out|Connection lost/i; // and no fault of the user's

async function tryMachine(machine, probe, url) {
    const executor = new ShellExecutor();
    try {
        await executor.initialize({ config: machine });
    } catch ({ message }) {
        return { stage: OFF.test(message) ? "machine" : "login", message };
    }
    const code = Buffer.from(probe).toString("base64");
    const python = `python3 -c "import base64; exec(base64.b64decode('${code}'))" ${url}`;
    const { stdout } = await executor.execute(python, undefined, true); // as NNI starts its runner
    const answer = /^<(\{.*\})>\s*$/m.exec(stdout);
    if (answer) return JSON.parse(answer[1]);
    const said = stdout.split(/[\r\n]+/).filter((line) => !line.includes("b64decode")); // the echo
    const message = said.filter((line) => /python|not found|denied/i.test(line)).pop();
    return { stage: "python", message: message ?? "python3 there does not answer" };
}

async function main() {
    const { machines, address, port, probe } = JSON.parse(fs.readFileSync(0, "utf8"));
    const secret = crypto.randomBytes(16).toString("hex");
    const server = new Server({ port });
    server.on("connection", (client) => client.send(secret));
    const url = `ws://${address ?? await getIPV4Address()}:${port} ${secret}`;
    const late = { stage: "machine", message: `no answer within ${PATIENCE} s` };
    const found = await Promise.all(machines.map((machine) => Promise.race([
        tryMachine(machine, probe, url),
        new Promise((resolve) => setTimeout(resolve, PATIENCE * 1000, late)),
    ])));
    console.log(JSON.stringify(found));
    process.exit(0);
}

main();
