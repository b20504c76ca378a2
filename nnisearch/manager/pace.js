// How NNI's manager goes on. As shipped it takes some 11 s from a trial's end to the next one's start,
// loses a result that comes late, and resumes a search with too few trials and results twice. Loaded
// by manager.js, this promises: the next trial starts within a second; what a trial has reported is
// stored before it ends; a search that was killed and resumed has exactly the trials asked for, and
// NNI's list of all searches is whole whenever the manager is killed.
"use strict";
const child_process = require("child_process");
const fs = require("fs");
const path = require("path");
const timers = require("timers/promises");
const { promisify } = require("util");

// The loops that see a trial's end, start the next one and read the GPUs' state: ms, for NNI's 5,000.
// Not for other platforms than local, where NNI would note a trial before it knows its machine.
const PAUSES = { manageTrials: 50, runJobLoop: 50, "GPUScheduler.run": 500 };

function shortenPauses(mode) {
    const pauses = mode === "local" ? PAUSES : {};
    const { setTimeout: pause } = timers;
    timers.setTimeout = (ms, ...rest) => {
        const caller = ms === 5000 ? new Error().stack.split("\n")[2] : "";
        return pause(pauses[Object.keys(pauses).find((name) => caller.includes(name))] ?? ms, ...rest);
    };
    const { setTimeout: wait } = global; // 10 s is how long NNI lets the tuner's process start
    global.setTimeout = Object.assign((f, ms, ...rest) => wait(f, ms === 1e4 ? 12e4 : ms, ...rest), wait);
}

const ENDED = ["SUCCEEDED", "FAILED", "USER_CANCELED", "SYS_CANCELED", "EARLY_STOPPED"];
const isUnended = ({ status }) => !ENDED.includes(status);

// Resuming runs the trials without an end anew, from their start.
function resumeExactly(prototype) {
    const { addRecoveredTrialJob, resumeExperiment } = prototype;
    prototype.resumeExperiment = async function (isView) {
        const database = this.dataStore.db.db;
        const forget = promisify(database.run.bind(database));
        const jobs = isView ? [] : (await this.dataStore.listTrialJobs()).filter(isUnended);
        for (const { trialJobId } of jobs) // they will report again
            await forget("delete from MetricData where trialJobId = ?", trialJobId);
        return resumeExperiment.call(this, isView);
    };
    prototype.addRecoveredTrialJob = function (jobs) {
        // NNI leaves out those that it had taken up, but not started, when it was killed again.
        const unended = jobs.filter(isUnended).map((job) => ({ ...job, status: "WAITING" }));
        addRecoveredTrialJob.call(this, unended);
        this.currSubmittedTrialNum -= this.waitingTrials.length; // they are counted when they start
        this.trialConcurrencyChange -= this.waitingTrials.length; // no sets ahead in their places
        const numbers = jobs.map(({ sequenceId }) => sequenceId ?? -1); // NNI: of the unended only
        this.experimentProfile.nextSequenceId = Math.max(-1, ...numbers) + 1;
    };
}

// A text as one word of a shell, as NNI should write each path.
const inQuotes = (text) => String(text).replaceAll("'", "'\\''"); // where NNI writes the quotes
const quoted = (text) => `'${inQuotes(text)}'`;

const RUNNER = fs.readFileSync(`${__dirname}/runner.py`, "utf8");

function mendRunner(prototype) {
    const { getScript } = prototype;
    prototype.getScript = function (environment) {
        environment.command = environment.command.replace(
            "-m nni.tools.trial_tool.trial_runner", () => `-c ${quoted(RUNNER)}`);
        return getScript.call(this, environment);
    };
}

// NNI quotes the folder of a runner on this machine in one line of four.
function quoteRunnersFolder(prototype) {
    const { getScript } = prototype;
    prototype.getScript = function (environment) {
        const { experimentRootDir: root } = this;
        return getScript.call(this, environment).map((line) =>
            line.replace(/>'(.*)'$/s, ">$1").replaceAll(root, () => quoted(root)));
    };
}

// NNI kills a runner on this machine by asking ps for its processes, and may end before the answer.
function waitForRunnersEnd(prototype) {
    const { stopEnvironment } = prototype;
    prototype.stopEnvironment = async function (environment) {
        await stopEnvironment.call(this, environment);
        if (environment.isAlive === false) return;
        const pid = Number(fs.readFileSync(`${environment.runnerWorkingFolder}/pid`));
        for (let tries = 0; tries < 100; tries++) {
            try { process.kill(pid, 0); } catch { return; } // it has ended
            await timers.setTimeout(100);
        }
    };
}

// NNI empties its list of experiments and then writes it: killed in between, it has lost them all.
function writeListWhole() {
    const { writeFileSync } = fs;
    fs.writeFileSync = (file, ...rest) => {
        if (path.basename(String(file)) !== ".experiment") return writeFileSync(file, ...rest);
        const unfinished = `${file}.${process.pid}`;
        const sync = (name, flags, write = () => {}) => { // else a power cut empties it
            const opened = fs.openSync(name, flags, 0o600);
            write(opened);
            fs.fsyncSync(opened);
            fs.closeSync(opened);
        };
        sync(unfinished, "w", (opened) => writeFileSync(opened, ...rest));
        fs.renameSync(unfinished, file);
        sync(path.dirname(file), "r");
    };
}

module.exports = function ({ mode, python }) {
    shortenPauses(mode);
    writeListWhole();
    const environments = "training_service/reusable/environments";
    const finals = new Set(); // the sets of parameters of which there is a final result
    const isSecondFinal = ({ id, data }) => { // of which NNI's TPE dies
        const { type, parameter_id: set } = JSON.parse(data);
        const isSecond = type === "FINAL" && finals.has(`${id} ${set}`);
        if (type === "FINAL") finals.add(`${id} ${set}`);
        return isSecond;
    };
    const unstored = {}; // trial: how many of its metrics are on their way to database and tuner
    return {
        "core/nnimanager.js": ({ NNIManager: { prototype } }) => {
            const { onTrialJobMetrics } = prototype;
            prototype.onTrialJobMetrics = async function (metric) {
                if (isSecondFinal(metric)) return;
                unstored[metric.id] = (unstored[metric.id] ?? 0) + 1;
                await onTrialJobMetrics.call(this, metric).finally(() => unstored[metric.id]--);
            };
            resumeExactly(prototype);
        },
        "training_service/local/localTrainingService.js": ({ LocalTrainingService: { prototype } }) => {
            const { getScript, getTrialJob, runTrialJob } = prototype;
            prototype.getScript = function (folder) {
                const files = `1>${folder}/stdout 2>${folder}/stderr`; // NNI quotes neither folder
                const given = `< /dev/null 1>${quoted(`${folder}/stdout`)} 2>${quoted(`${folder}/stderr`)}`;
                // In a shell of its own, since NNI notes no status after an `exit` or `exec`. And NNI
                // never writes to the input: a trial that reads it would wait for ever.
                return getScript.call(this, folder).map((line) =>
                    line.startsWith("eval ") && line.endsWith(files)
                        ? `(${line.slice(0, -files.length)}) ${given}`
                        : line.replace("cd $NNI_CODE_DIR", 'cd "$NNI_CODE_DIR"')
                            .replace(/>'(.*)'$/s, (_, state) => `>${quoted(state)}`));
            };
            prototype.getTrialJob = async function (id) {
                const job = this.jobMap.get(id);
                if (job?.status !== "RUNNING") return getTrialJob.call(this, id);
                try {
                    process.kill(job.pid, 0); // NNI starts a shell to ask
                    return job;
                } catch { // It has ended. Its end counts once its last metric is stored: TPE dies of a later one.
                    const stream = this.jobStreamMap.get(id);
                    const written = fs.statSync(stream.path, { throwIfNoEntry: false })?.size ?? 0;
                    if (stream.bytesRead >= written && !unstored[id]) return getTrialJob.call(this, id);
                    stream.dataAvailable = true;
                    stream.read(0);
                    return job;
                }
            };
            prototype.runTrialJob = function (id, ...rest) {
                const { workingDirectory } = this.jobMap.get(id);
                // The reports and the exit status of its run before the resume, which NNI would read.
                fs.rmSync(`${workingDirectory}/.nni`, { recursive: true, force: true });
                return runTrialJob.call(this, id, ...rest);
            };
        },
        [`${environments}/localEnvironmentService.js`]:
            ({ LocalEnvironmentService: { prototype } }) => {
                mendRunner(prototype);
                quoteRunnersFolder(prototype);
                waitForRunnersEnd(prototype);
            },
        [`${environments}/remoteEnvironmentService.js`]:
            ({ RemoteEnvironmentService: { prototype } }) => mendRunner(prototype),
        "training_service/common/util.js": (util) => {
            const patience = "sleep = time.sleep; time.sleep = lambda _: sleep(2)"; // s, for NNI's 5
            const collector = `${quoted(python)} -c "import time; ${patience}; `
                + 'from nni.tools.gpu_tool.gpu_metrics_collector import main; main([])"';
            util.runGpuMetricsCollector = (folder) => child_process.exec(
                util.getGpuMetricsCollectorBashScriptContent(quoted(folder))
                    .replace(/python3 -m \S+/, () => collector),
                { shell: "/bin/bash" });
            const { setEnvironmentVariable } = util;
            util.setEnvironmentVariable = ({ key, value }) =>
                setEnvironmentVariable({ key, value: inQuotes(value) });
            for (const name of ["execMkdir", "execNewFile", "execTail", "execRemove", "runScript"]) {
                const run = util[name];
                util[name] = (file) => run(inQuotes(file));
            }
        },
    };
};
