// Fixes faults of NNI's manager, into which Node's --require loads this file. The fixes concern access
// (access.js), the manager of trials (manager.js), trials on this machine and others (local.js,
// elsewhere.js), and the database and the list of searches (store.js). Each file changes modules of NNI,
// which it names by their paths below nni_node.
"use strict";
const fs = require("fs");
const Module = require("module");
const path = require("path");

// All users of this machine can run commands by Node's debugger. SIGUSR1 starts it, which batch systems
// send; a module in the user's NODE_OPTIONS may start it, too.
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
    mode: argument("mode"),
    python: argument("python-interpreter"),
});

const root = path.dirname(fs.realpathSync(process.argv[1]));
// In /tmp other users could read NNI's files, and two searches would delete each other's.
require("os").tmpdir = () => settings.folder;
const notices = path.join(settings.folder, "log", "notices.log");
fs.rmSync(notices, { force: true }); // from before a resume
settings.say = (line) => fs.appendFileSync(notices, `${line}\n`); // progress.py prints these lines
settings.unstored = {}; // trial: number of its metrics that are not in the database yet
const changes = ["access", "manager", "local", "store"].map((name) =>
    require(`./${name}`)(settings, root));

const { _load } = Module;
Module._load = function (request, parent, ...rest) {
    const exports = _load.call(this, request, parent, ...rest);
    const file = Module._resolveFilename(request, parent);
    const name = path.relative(root, file);
    for (const change of changes) {
        if (!change[name] || !Module._cache[file].loaded) continue; // not loaded yet: a circular import
        change[name](exports);
        delete change[name];
    }
    return exports;
};
