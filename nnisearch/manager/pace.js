// How NNI's manager goes on. As shipped it takes some 11 s from a trial's end to the next one's start,
// loses a result that comes late, and resumes a search with too few trials and results twice. Loaded
// by manager.js, this promises: the next trial starts within a second; what a trial has reported is
// stored before it ends, whatever ends it; a search that was killed and resumed has exactly the trials
// asked for; no button of the Web UI ends a search; and NNI's list of all searches is whole whenever
// the manager is killed.
"use strict";
const child_process = require("child_process");
const fs = require("fs");
const path = require("path");
const timers = require("timers/promises");
const { promisify } = require("util");

// The loops that see a trial's end, start the next one and read the GPUs' state: ms, for NNI's 5,000.
// Not where NNI would note a trial before it knows its machine (machines.js).
const PAUSES = { manageTrials: 50, runJobLoop: 50, "GPUScheduler.run": 500 };

function shortenPauses(settings, isIdle) {
    const { setTimeout: pause } = timers;
    timers.setTimeout = (ms, ...rest) => {
        if (ms === 1) return pause(20, ...rest); // 1,000 times a second NNI looks for news of runners
        const pauses = settings.mode === "local" || settings.hasRunners ? PAUSES : {};
        const caller = ms === 5000 && !isIdle() ? new Error().stack.split("\n")[2] : "";
        return pause(pauses[Object.keys(pauses).find((name) => caller.includes(name))] ?? ms, ...rest);
    };
    const { setTimeout: wait } = global; // 10 s is how long NNI lets the tuner's process start
    global.setTimeout = Object.assign((f, ms, ...rest) => wait(f, ms === 1e4 ? 12e4 : ms, ...rest), wait);
}

const [INITIALIZED, NEW_TRIAL_JOB, REPORT_METRIC_DATA] = ["ID", "TR", "ME"]; // of the tuner's channel
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
        const numbers = jobs.map(({ sequenceId }) => sequenceId ?? -1); // NNI: of the unended only
        this.experimentProfile.nextSequenceId = Math.max(-1, ...numbers) + 1;
        // NNI's tuner hears of the unended only, and gives out the sets of failed ones again.
        const given = jobs.flatMap(({ hyperParameters }) => hyperParameters ?? []);
        this.trialDataForResume = `[${given.join()}]`;
    };
}

// NNI counts how many sets it wants when a trial ends. It forgets that if maxTrialNumber is reached
// at that moment, so nothing starts once the limit is raised. Here it asks for what is lacking.
function askForWhatLacks(prototype) {
    const { onTunerCommand, requestTrialJobs } = prototype;
    prototype.requestTrialJobs = function () {
        const { trialConcurrency } = this.experimentProfile.params;
        const lack = trialConcurrency - this.trialJobs.size - this.waitingTrials.length - this.asked;
        if (!(lack > 0)) return; // asked is not known before the tuner is ready
        this.asked += lack;
        requestTrialJobs.call(this, lack);
    };
    prototype.onTunerCommand = function (command, content) {
        if (command === INITIALIZED) this.asked = 0;
        // A tuner that has no more is asked no more in that place, until a trial ends.
        if (command === NEW_TRIAL_JOB) this.asked = Math.max(0, this.asked - 1);
        return onTunerCommand.call(this, command, content);
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
            if (!isAlive(pid)) return;
            await timers.setTimeout(100);
        }
    };
}

const isAlive = (pid) => { try { return process.kill(pid, 0); } catch { return false; } };

// The processes of a trial by their environment, [] where the system does not show it.
function processesOf(id) {
    const numbers = fs.existsSync("/proc") ? fs.readdirSync("/proc").filter(Number) : [];
    return numbers.filter((pid) => {
        try {
            const environment = fs.readFileSync(`/proc/${pid}/environ`, "latin1").split("\0");
            return environment.includes(`NNI_TRIAL_JOB_ID=${id}`);
        } catch { // it has ended, or is another user's
            return false;
        }
    });
}

// NNI waits for the shell of a trial that it stops. The trial itself may take longer, or never end.
async function endProcesses(id) {
    const [left, end] = [processesOf(id), Date.now() + 5000];
    while (left.some(isAlive) && Date.now() < end) await timers.setTimeout(100);
    for (const pid of left.filter(isAlive)) process.kill(pid, "SIGKILL");
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

// The buttons of the Web UI, and nnictl. NNI takes any value, and says nothing of one that ends it.
function checkButtons(prototype, python) {
    const { cancelTrialJobByUser, updateExperimentProfile } = prototype;
    const limits = {
        TRIAL_CONCURRENCY: ["trialConcurrency"],
        MAX_TRIAL_NUM: ["maxTrialNumber", "maxTrialNum"], // as nnictl calls it
        MAX_EXEC_DURATION: ["maxExperimentDuration", "maxExecDuration"],
    };
    prototype.updateExperimentProfile = async function (profile, type) {
        if (type in limits) {
            const [key, nnictls] = limits[type];
            const value = profile.params[nnictls] ?? profile.params[key];
            const isDuration = type === "MAX_EXEC_DURATION";
            const pattern = isDuration ? /^\d+(\.\d+)?\s*[smhd]?$/i : /^[1-9]\d*$/;
            if (!pattern.test(value)) {
                const allowed = isDuration ? "a number and s, m, h or d" : "a whole number from 1 on";
                throw new Error(`${key} is ${JSON.stringify(value)}; allowed: ${allowed}`);
            }
            profile.params[key] = isNaN(value) ? value : Number(value);
        }
        if (type === "SEARCH_SPACE") {
            const { name, className = "" } = this.config.tuner ?? this.config.advisor;
            // A tuner of the user's own may want a space of any form.
            if (name || className.startsWith("nnisearch."))
                await checkSpace(profile.params.searchSpace, python);
            if (this.status.status === "TUNER_NO_MORE_TRIAL") this.asked = 0; // it may have more now
        }
        return updateExperimentProfile.call(this, profile, type);
    };
    prototype.cancelTrialJobByUser = async function (id) {
        const { status } = this.readonly ? {} : await this.trainingService.getTrialJob(id);
        if (ENDED.includes(status)) throw new Error(`trial ${id} has ended: ${status}`);
        return cancelTrialJobByUser.call(this, id);
    };
}

const CHECK = "import json, sys; from nnisearch.before.space import check_space\n"
    + "try: check_space(json.load(sys.stdin))\nexcept ValueError as error: sys.exit(str(error))";

// Refuses, by an error in one line, what NNI's own tuners die of.
function checkSpace(space, python) {
    const env = { ...process.env, PYTHONPATH: path.resolve(__dirname, "../..") };
    return new Promise((resolve, reject) => {
        const { stdin } = child_process.execFile(python, ["-c", CHECK], { env },
            (error, _, stderr) => error ? reject(new Error(stderr.trim())) : resolve());
        stdin.end(JSON.stringify(space));
    });
}

// A reader of the database may be slow, or stopped. NNI gives up after a second, for good.
const PATIENCE = 600_000; // ms

const LOOK = 1000; // ms between two looks at what a trial has reported

// Read on if a trial has reported more. NNI waits for inotify, which hears of nothing that another
// machine writes. The file is opened, since NFS looks anew at its size then only.
function readOn(stream) {
    if (!fs.existsSync(stream.path)) return true; // the trial has deleted it
    const file = fs.openSync(stream.path);
    const isAllRead = stream.bytesRead >= fs.fstatSync(file).size;
    fs.closeSync(file);
    if (!isAllRead) {
        stream.dataAvailable = true;
        stream.read(0);
    }
    return isAllRead;
}

module.exports = function (settings) {
    const { python, unstored } = settings;
    let manager;
    const isIdle = () => manager?.trialJobs.size + manager?.waitingTrials.length === 0
        && ["DONE", "TUNER_NO_MORE_TRIAL"].includes(manager.status.status);
    shortenPauses(settings, isIdle);
    writeListWhole();
    const reusable = "training_service/reusable";
    const environments = `${reusable}/environments`;
    const finals = new Set(); // the sets of parameters of which there is a final result
    const isSecondFinal = ({ id, data }) => { // of which NNI's TPE dies
        const { type, parameter_id: set } = JSON.parse(data);
        const isSecond = type === "FINAL" && finals.has(`${id} ${set}`);
        if (type === "FINAL") finals.add(`${id} ${set}`);
        return isSecond;
    };
    const stopped = {}; // trial on this machine: the status that it gets by being stopped
    const stops = {}; // the same trials: a promise that all its processes have ended
    return {
        // NNI ends a search whose tuner does not answer a ping within 5 s: on a busy machine, or in
        // a long computation. A tuner that has died is noticed by its end.
        "core/tuner_command_channel/websocket_channel.js": ({ getWebSocketChannel }) => {
            getWebSocketChannel().heartbeat = () => {};
        },
        "core/sqlDatabase.js": ({ SqlDB: { prototype } }) => {
            const { init } = prototype;
            prototype.init = function (...args) {
                const task = init.apply(this, args);
                this.db.configure("busyTimeout", PATIENCE);
                this.db.serialize(); // one statement waits, not each in a thread of Node's few
                return task;
            };
        },
        "core/nnimanager.js": ({ NNIManager: { prototype } }) => {
            const { manageTrials, onTrialJobMetrics, stopTrialIfOverMaxDurationLimit } = prototype;
            prototype.manageTrials = function () {
                manager = this;
                const service = this.trainingService;
                const { submitTrialJob } = service;
                service.submitTrialJob = async (form) => {
                    const job = await submitTrialJob.call(service, form);
                    this.trialJobs.set(job.id, { ...job }); // NNI stores it first, and may miss reports
                    return job;
                };
                return manageTrials.call(this);
            };
            prototype.onTrialJobMetrics = async function (metric) {
                if (!this.dispatcher || !this.trialJobs.has(metric.id))
                    return onTrialJobMetrics.call(this, metric);
                if (isSecondFinal(metric)) return;
                // At once: the trial's end could be told while NNI stores the metric.
                this.dispatcher.sendCommand(REPORT_METRIC_DATA, metric.data);
                unstored[metric.id] = (unstored[metric.id] ?? 0) + 1;
                await this.dataStore.storeMetricData(metric.id, metric.data)
                    .finally(() => unstored[metric.id]--);
            };
            prototype.stopTrialIfOverMaxDurationLimit = function () {
                const running = [...this.trialJobs].filter(([id]) => !stopped[id]);
                const view = { trialJobs: { value: new Map(running) } };
                return stopTrialIfOverMaxDurationLimit.call(Object.create(this, view));
            };
            resumeExactly(prototype);
            askForWhatLacks(prototype);
            checkButtons(prototype, python);
        },
        "training_service/local/localTrainingService.js": ({ LocalTrainingService: { prototype } }) => {
            const { cancelTrialJob, cleanUp, getScript, getTrialJob, runTrialJob } = prototype;
            const starting = {}; // trial: a promise that it has been started
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
            // A trial has ended once its process has and all that it has reported is stored.
            prototype.getTrialJob = async function (id) {
                const job = this.jobMap.get(id);
                const stream = this.jobStreamMap.get(id);
                if (job?.status !== "RUNNING" || !stream) return getTrialJob.call(this, id);
                if (isAlive(job.pid) || stops[id]) { // NNI starts a shell to ask
                    if (Date.now() - (stream.looked ?? 0) < LOOK) return job;
                    stream.looked = Date.now();
                    readOn(stream);
                    return job;
                }
                if (!readOn(stream) || unstored[id]) return job;
                await getTrialJob.call(this, id);
                if (job.status === "FAILED") job.status = stopped[id] ?? job.status;
                return job;
            };
            prototype.runTrialJob = function (id, ...rest) {
                const { workingDirectory } = this.jobMap.get(id);
                // The reports and the exit status of its run before the resume, which NNI would read.
                fs.rmSync(`${workingDirectory}/.nni`, { recursive: true, force: true });
                starting[id] = runTrialJob.call(this, id, ...rest);
                return starting[id];
            };
            // NNI calls a trial stopped at once, and hears no more of it.
            prototype.cancelTrialJob = async function (id, isEarlyStopped = false) {
                await starting[id];
                const job = this.jobMap.get(id);
                if (job?.pid === undefined) return cancelTrialJob.call(this, id, isEarlyStopped);
                if (ENDED.includes(job.status) || stopped[id]) return;
                stopped[id] = isEarlyStopped ? "EARLY_STOPPED" : "USER_CANCELED";
                const view = Object.create(this, { setTrialJobStatus: { value: () => {} } });
                stops[id] = cancelTrialJob.call(view, id, isEarlyStopped) // until its shell has ended
                    .then(() => endProcesses(id)).finally(() => delete stops[id]);
            };
            prototype.cleanUp = async function () {
                await Promise.all(Object.values(stops));
                return cleanUp.call(this);
            };
        },
        [`${reusable}/routerTrainingService.js`]: ({ RouterTrainingService: { prototype } }) => {
            const { getTrialJob } = prototype;
            prototype.getTrialJob = async function (id) {
                const job = await getTrialJob.call(this, id);
                return ENDED.includes(job.status) && unstored[id] ? { ...job, status: "RUNNING" } : job;
            };
        },
        [`${reusable}/trialDispatcher.js`]: ({ TrialDispatcher: { prototype } }) => {
            const { cancelTrialJob } = prototype;
            prototype.cancelTrialJob = async function (id, isEarlyStopped) {
                await cancelTrialJob.call(this, id, isEarlyStopped);
                const trial = await this.getTrialJob(id);
                if (trial.status === "WAITING") trial.status = "USER_CANCELED"; // NNI lets it start
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
