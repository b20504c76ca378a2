// Changes where NNI keeps searches: the database of one search, and the list of all of them. As shipped,
// a slow reader of the database ends the search, a killed manager loses the list, and a manager on
// another machine with the same HOME counts as dead. A note in the experiment's folder tells where its
// manager runs, and a lock there is held until the manager ends; shared/place.py reads both.
"use strict";
const fs = require("fs");
const os = require("os");
const path = require("path");
const { promisify } = require("util");

const PATIENCE = 600_000; // ms to wait for the database's lock: a reader may be suspended

const here = {
    host: os.hostname(),
    boot: fs.readFileSync("/proc/sys/kernel/random/boot_id", "utf8").trim(),
    namespace: fs.readlinkSync("/proc/self/ns/pid"), // each container has one
};

// Takes the lock and writes the note. Ends the manager if another one has the lock.
function claim(folder, Database) {
    const lock = new Database(`${folder}/manager.lock`); // Node has no file locks, but SQLite has
    return new Promise((resolve) => lock.exec("BEGIN IMMEDIATE", (error) => {
        if (error) {
            const why = error.code === "SQLITE_BUSY" ? "another manager has locked it" : error.message;
            console.error(`Error: ${folder}/manager.lock: ${why}`);
            process.exit(1);
        }
        fs.writeFileSync(`${folder}/manager.json`, JSON.stringify(here));
        process.on("exit", () => {
            fs.rmSync(`${folder}/manager.json`, { force: true });
            lock.close(); // this reference also prevents an earlier close by the garbage collector
        });
        resolve();
    }));
}

// NNI empties its list of experiments and then writes it: if killed in between, it loses all of them.
function writeListWhole() {
    const { writeFileSync } = fs;
    const sync = (name, flags, content) => { // otherwise a power cut may empty the list
        const file = fs.openSync(name, flags, 0o600);
        if (content) writeFileSync(file, content);
        fs.fsyncSync(file);
        fs.closeSync(file);
    };
    fs.writeFileSync = (file, content, ...rest) => {
        if (path.basename(String(file)) !== ".experiment") return writeFileSync(file, content, ...rest);
        const unfinished = `${file}.${process.pid}`;
        sync(unfinished, "w", content);
        fs.renameSync(unfinished, file);
        sync(path.dirname(file), "r");
    };
}

// Whether the note of another experiment names another machine or container.
function runsElsewhere(id) {
    const read = (...file) => JSON.parse(fs.readFileSync(path.join(...file)));
    try {
        const { logDir } = read(os.homedir(), "nni-experiments", ".experiment")[id];
        const { boot, namespace } = read(logDir, id, "manager.json");
        return boot !== here.boot || namespace !== here.namespace;
    } catch {
        return false; // without a note it has ended, or was started by nnictl
    }
}

module.exports = function (settings, root) {
    const { action, folder } = settings;
    writeListWhole();
    return {
        "core/sqlDatabase.js": (exports) => {
            exports.SqlDB = class Database extends exports.SqlDB {
                async init(...args) { // the first thing that a manager does
                    if (action !== "view") // several may show the same experiment
                        await claim(folder, require(path.join(root, "node_modules/sqlite3")).Database);
                    const opened = super.init(...args);
                    this.db.configure("busyTimeout", PATIENCE); // NNI ends after a second
                    this.db.serialize(); // otherwise waiting statements occupy all of Node's threads
                    settings.query = promisify(this.db.all.bind(this.db));
                    return opened;
                }
            };
        },

        "extensions/experiments_manager/manager.js": (exports) => {
            exports.ExperimentsManager = class List extends exports.ExperimentsManager {
                // NNI looks for the process number on this machine only.
                async checkCrashed(id, pid) {
                    if (runsElsewhere(id)) return { experimentId: id, isCrashed: false };
                    return super.checkCrashed(id, pid);
                }
            };
        },
    };
};
