// Changes where NNI keeps searches: the database of one, and the list of all. As shipped, a slow
// reader ends the search, and a killed manager loses the list. A manager also holds a lock in its
// experiment's folder while it lives, and notes there where it runs: shared/place.py reads both.
"use strict";
const fs = require("fs");
const os = require("os");
const path = require("path");
const { promisify } = require("util");

const BOOT = "/proc/sys/kernel/random/boot_id"; // some sandboxes have none
const PATIENCE = 600_000; // ms to wait for a reader of the database, which may be suspended

// NNI empties its list and then writes it: if killed in between, it loses all.
function writeListWhole() {
    const { writeFileSync } = fs;
    fs.writeFileSync = (file, ...content) => {
        if (path.basename(String(file)) !== ".experiment") return writeFileSync(file, ...content);
        const unfinished = fs.openSync(`${file}.${process.pid}`, "w", 0o600);
        writeFileSync(unfinished, ...content);
        fs.fsyncSync(unfinished); // otherwise a power cut may empty it
        fs.closeSync(unfinished);
        fs.renameSync(`${file}.${process.pid}`, file);
    };
}

// Ends the process if another manager has the experiment.
function claim(folder, Database) {
    const lock = new Database(`${folder}/manager.lock`); // Node has no file locks, but SQLite has
    const note = `${folder}/manager.json`;
    return new Promise((resolve) => lock.exec("BEGIN IMMEDIATE", (error) => {
        if (error) {
            const isTaken = error.code === "SQLITE_BUSY";
            const why = isTaken ? "another manager has locked it" : error.message;
            console.error(`Error: ${folder}/manager.lock: ${why}`);
            process.exit(1);
        }
        const boot = fs.existsSync(BOOT) ? fs.readFileSync(BOOT, "utf8").trim() : os.hostname();
        const namespace = fs.readlinkSync("/proc/self/ns/pid"); // each container has one
        fs.writeFileSync(note, JSON.stringify({ host: os.hostname(), boot, namespace }));
        process.on("exit", () => {
            fs.rmSync(note, { force: true });
            lock.close(); // this reference keeps it from the garbage collector
        });
        resolve();
    }));
}

const extendDatabase = (Original, { Database }, settings) => class Store extends Original {
    async init(...args) { // the first thing that a manager does
        // Several may show the same experiment.
        if (settings.action !== "view") await claim(settings.folder, Database);
        const opened = super.init(...args);
        this.db.configure("busyTimeout", PATIENCE); // NNI ends after a second
        this.db.serialize(); // otherwise waiting statements occupy all of Node's threads
        settings.query = promisify(this.db.all.bind(this.db));
        return opened;
    }
};

module.exports = (settings, root) => {
    writeListWhole();
    return { "core/sqlDatabase.js": (exports) => {
        const sqlite = require(`${root}/node_modules/sqlite3`);
        exports.SqlDB = extendDatabase(exports.SqlDB, sqlite, settings);
    } };
};
