// Tells other machines and containers with the same HOME where this manager runs. A note in the
// experiment's folder says it, and a lock there is held until the manager ends; shared/place.py reads
// both. NNI itself believes that a manager on another machine has ended, since its PID does not exist.
"use strict";
const fs = require("fs");
const net = require("net");
const os = require("os");
const path = require("path");

function valueOf(read, otherwise) {
    try { return read(); } catch { return otherwise; } // no /proc, as on macOS
}

const here = {
    host: os.hostname(),
    boot: valueOf(() => fs.readFileSync("/proc/sys/kernel/random/boot_id", "utf8").trim(), os.hostname()),
    namespace: valueOf(() => fs.readlinkSync("/proc/self/ns/pid"), ""),
};

function isElsewhere(id) {
    const read = (file) => JSON.parse(fs.readFileSync(file));
    const note = valueOf(() => {
        const { logDir } = read(path.join(os.homedir(), "nni-experiments/.experiment"))[id];
        return read(path.join(logDir, id, "manager.json"));
    }, here); // without a note it has ended, or was started by nnictl
    return note.boot !== here.boot || note.namespace !== here.namespace;
}

module.exports = function ({ folder, action }, root) {
    const listsOthers = {
        "extensions/experiments_manager/manager.js": ({ ExperimentsManager: { prototype } }) => {
            const { checkCrashed } = prototype;
            prototype.checkCrashed = async function (id, pid) {
                if (isElsewhere(id)) return { experimentId: id, isCrashed: false };
                return checkCrashed.call(this, id, pid);
            };
        },
    };
    if (action === "view") return listsOthers; // several may show the same experiment
    // Node has no file locks, but SQLite has.
    const { Database } = require(path.join(root, "node_modules/sqlite3"));
    const lock = new Database(`${folder}/manager.lock`);
    const held = new Promise((resolve) => lock.exec("BEGIN IMMEDIATE", (error) => {
        if (error) {
            const why = error.code === "SQLITE_BUSY" ? "another manager has locked it" : error.message;
            console.error(`Error: ${folder}/manager.lock: ${why}`);
            process.exit(1);
        }
        fs.writeFileSync(`${folder}/manager.json`, JSON.stringify(here));
        resolve();
        process.on("exit", () => {
            fs.rmSync(`${folder}/manager.json`, { force: true });
            lock.close(); // this reference also prevents an earlier close by the garbage collector
        });
    }));
    const { listen } = net.Server.prototype;
    net.Server.prototype.listen = function (...args) { // NNI changes nothing until then
        held.then(() => listen.apply(this, args));
        return this;
    };
    return listsOthers;
};
