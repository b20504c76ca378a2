// Tells the other machines and containers that have the same HOME where this manager runs: a note in
// the experiment's folder, and a lock there as long as it lives. shared/place.py reads both. NNI takes
// a manager for ended whose process number is not there, as on another machine.
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
    namespace: valueOf(() => fs.readlinkSync("/proc/self/ns/pid"), ""), // of process numbers
};

function isElsewhere(id) {
    const read = (file) => JSON.parse(fs.readFileSync(file));
    const note = valueOf(() => {
        const { logDir } = read(path.join(os.homedir(), "nni-experiments/.experiment"))[id];
        return read(path.join(logDir, id, "manager.json"));
    }, here); // none: it has ended, or NNI alone has started it
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
    if (action === "view") return listsOthers; // it changes nothing, and may be one of several
    // SQLite has the locks of files that Node has not.
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
            lock.close(); // not before: closed too when nothing refers to it
        });
    }));
    const { listen } = net.Server.prototype;
    net.Server.prototype.listen = function (...args) { // so nothing is changed before it is held
        held.then(() => listen.apply(this, args));
        return this;
    };
    return listsOthers;
};
