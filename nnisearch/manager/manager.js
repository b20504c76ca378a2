// The launcher loads this into NNI's manager, by Node's --require: who may talk to it (guard.js), how
// it goes on (pace.js), how SLURM's jobs are trials (slurm.js), how machines over SSH are used
// (machines.js), and where it runs (place.js). Each changes some of NNI's modules, by their paths below
// nni_node.
"use strict";
const fs = require("fs");
const Module = require("module");
const path = require("path");

// Node's debugger takes commands from all users of this machine. SIGUSR1, which batch systems send,
// starts it, and so may what the user's NODE_OPTIONS load.
process.on("SIGUSR1", () => {});
const inspector = require("inspector");
inspector.open = () => {};
if (inspector.url()) {
    console.error(`Error: Node's debugger is open at ${inspector.url()}`);
    process.exit(1);
}

const { nodeOptions, ...settings } = JSON.parse(process.env.NNI_GUARD);
Object.assign(process.env, { NODE_OPTIONS: nodeOptions, NNI_GUARD: "" }); // which trials inherit
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
// What NNI keeps in /tmp, other users could read, and two searches would delete each other's.
require("os").tmpdir = () => settings.folder;
const notices = path.join(settings.folder, "log", "notices.log");
fs.rmSync(notices, { force: true }); // of its life before a resume
settings.say = (line) => fs.appendFileSync(notices, `${line}\n`); // to whoever watches the search
settings.unstored = {}; // trial: how many of its metrics are on their way to the database
// What a later one changes, too, goes around what an earlier one has changed.
const changes = ["guard", "slurm", "pace", "machines", "place"].map((name) =>
    require(`./${name}`)(settings, root));

const { _load } = Module;
Module._load = function (request, parent, ...rest) {
    const exports = _load.call(this, request, parent, ...rest);
    const file = Module._resolveFilename(request, parent);
    const name = path.relative(root, file);
    for (const change of changes) {
        if (!change[name] || !Module._cache[file].loaded) continue; // not yet, in a circle of modules
        change[name](exports);
        delete change[name];
    }
    return exports;
};
