// Fixes faults of NNI's manager, into which Node's --require loads this file. The changes concern
// access (access.js), the manager of trials (manager.js), trials here and elsewhere (local.js), and
// what is stored (store.js). Each file changes modules of NNI, named by their paths below nni_node.
"use strict";
const fs = require("fs");
const Module = require("module");
const path = require("path");

// By Node's debugger all users of this machine can run commands. SIGUSR1 starts it, and batch
// systems send this signal. A module in the user's NODE_OPTIONS may start it, too.
process.on("SIGUSR1", () => {});
const inspector = require("inspector");
inspector.open = () => {};
if (inspector.url()) {
    console.error(`Error: Node's debugger is open at ${inspector.url()}`);
    process.exit(1);
}

const { nodeOptions, ...settings } = JSON.parse(process.env.NNI_GUARD);
Object.assign(process.env, { NODE_OPTIONS: nodeOptions, NNI_GUARD: "" }); // trials inherit these
const argument = (name) => process.argv[process.argv.indexOf(`--${name}`) + 1];
Object.assign(settings, {
    port: Number(argument("port")),
    id: argument("experiment-id"),
    action: argument("action"),
    folder: path.join(argument("experiments-directory"), argument("experiment-id")),
    python: argument("python-interpreter"),
});
// In /tmp other users could read NNI's files, and two searches would delete each other's.
require("os").tmpdir = () => settings.folder;
const notices = path.join(settings.folder, "log", "notices.log");
fs.rmSync(notices, { force: true }); // from before a resume
settings.say = (line) => fs.appendFileSync(notices, `${line}\n`); // progress.py prints these lines
settings.unstored = {}; // trial: number of its metrics that are not in the database yet

const root = path.dirname(fs.realpathSync(process.argv[1]));
const files = ["access", "manager", "local", "store"];
const changes = Object.assign({}, ...files.map((file) => require(`./${file}`)(settings, root)));
const { _load } = Module;
Module._load = function (request, parent, ...rest) {
    const exports = _load.call(this, request, parent, ...rest);
    const file = Module._resolveFilename(request, parent);
    const name = path.relative(root, file);
    if (!changes[name] || !Module._cache[file].loaded) return exports; // or a circular import
    changes[name](exports);
    delete changes[name];
    return exports;
};
