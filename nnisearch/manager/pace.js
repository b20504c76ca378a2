// Makes NNI's manager fast and correct. As shipped it takes some 11 s from a trial's end to the next
// one's start, loses late results, and resumes a search with too few trials and with repeated results.
// With this file the next trial starts within a second. All reports of a trial are stored before it
// counts as ended. A killed and resumed search has exactly the configured number of trials. No button
// of the Web UI ends a search. NNI's list of searches stays complete if the manager is killed.
"use strict";
const child_process = require("child_process");
const fs = require("fs");
const path = require("path");
const timers = require("timers/promises");
const { promisify } = require("util");

// Pauses in ms of the loops that notice a trial's end, start the next one and read the GPUs' state;
// NNI has 5,000. Other training services keep NNI's: a trial would be stored before its machine.
const PAUSES = { manageTrials: 50, runJobLoop: 50, "GPUScheduler.run": 500 };

function shortenPauses(settings, isIdle) {
    const { setTimeout: pause } = timers;
    timers.setTimeout = (ms, ...rest) => {
        if (ms === 1) return pause(20, ...rest); // NNI checks for news of runners 1,000 times a second
        const pauses = settings.mode === "local" || settings.hasRunners ? PAUSES : {};
        const caller = ms === 5000 && !isIdle() ? new Error().stack.split("\n")[2] : "";
        const loop = Object.keys(pauses).find((name) => caller.includes(name));
        return pause(pauses[loop] ?? ms, ...rest);
    };
    const { setTimeout: wait } = global; // NNI allows the tuner's process 10 s to start
    global.setTimeout = Object.assign((f, ms, ...rest) => wait(f, ms === 1e4 ? 12e4 : ms, ...rest), wait);
}

const [INITIALIZED, NEW_TRIAL_JOB, REPORT_METRIC_DATA] = ["ID", "TR", "ME"]; // of the tuner's channel
const ENDED = ["SUCCEEDED", "FAILED", "USER_CANCELED", "SYS_CANCELED", "EARLY_STOPPED"];
const isUnended = ({ status }) => !ENDED.includes(status);

// The trials that a user has added and that have not started; they start in the order of their events.
const LEFT = `select data from TrialJobEvent where event = 'ADD_CUSTOMIZED' order by rowid
    limit -1 offset (select count(distinct trialJobId) from TrialJobEvent
        where event = 'WAITING' and data like '%"parameter_source":"customized"%')`;

// Resuming runs unfinished trials again, from their start.
function resumeExactly(prototype) {
    const { addCustomizedTrialJob, addRecoveredTrialJob, resumeExperiment } = prototype;
    prototype.resumeExperiment = async function (isView) {
        if (isView) return resumeExperiment.call(this, isView);
        const database = this.dataStore.db.db;
        const query = promisify(database.all.bind(database));
        for (const { trialJobId } of (await this.dataStore.listTrialJobs()).filter(isUnended))
            await query("delete from MetricData where trialJobId = ?", trialJobId); // reported again
        await resumeExperiment.call(this, isView);
        const view = Object.create(this, {
            dataStore: { value: { storeTrialJobEvent() {} } }, // their events are stored already
            maxTrialNum: { value: Infinity }, // they also wait if the limit is reached
        });
        for (const { data } of await query(LEFT)) await addCustomizedTrialJob.call(view, data);
    };
    prototype.addRecoveredTrialJob = function (jobs) {
        // After a second kill NNI forgets trials that the first resume had queued but not started.
        const unended = jobs.filter(isUnended).map((job) => ({ ...job, status: "WAITING" }));
        addRecoveredTrialJob.call(this, unended);
        this.currSubmittedTrialNum -= this.waitingTrials.length; // counted again at their start
        const numbers = jobs.map(({ sequenceId }) => sequenceId ?? -1); // NNI only has the unended
        this.experimentProfile.nextSequenceId = Math.max(-1, ...numbers) + 1;
        // NNI only tells the tuner of unended trials, so it would repeat the parameters of failed ones.
        const given = jobs.flatMap(({ hyperParameters }) => hyperParameters ?? []);
        this.trialDataForResume = `[${given.join()}]`;
    };
}

// NNI requests a set of parameters when a trial ends, but not if maxTrialNumber is reached then. So
// nothing starts after the limit is raised. Here the number of missing sets is computed each time.
function requestMissingSets(prototype) {
    const { onTunerCommand, requestTrialJobs } = prototype;
    prototype.requestTrialJobs = function () {
        const { trialConcurrency } = this.experimentProfile.params;
        const missing = trialConcurrency - this.trialJobs.size - this.waitingTrials.length - this.asked;
        if (!(missing > 0)) return; // NaN: asked is undefined until the tuner is ready
        this.asked += missing;
        requestTrialJobs.call(this, missing);
    };
    prototype.onTunerCommand = function (command, content) {
        if (command === INITIALIZED) this.asked = 0;
        // A tuner without more sets leaves asked as it is, and is not asked until a trial ends.
        if (command === NEW_TRIAL_JOB) this.asked = Math.max(0, this.asked - 1);
        return onTunerCommand.call(this, command, content);
    };
}

// A text as one word in a shell, since NNI does not quote all paths.
const inQuotes = (text) => String(text).replaceAll("'", "'\\''"); // if NNI writes the quotes
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

// NNI quotes a local runner's folder in only one of four lines.
function quoteRunnersFolder(prototype) {
    const { getScript } = prototype;
    prototype.getScript = function (environment) {
        const { experimentRootDir: root } = this;
        return getScript.call(this, environment).map((line) =>
            line.replace(/>'(.*)'$/s, ">$1").replaceAll(root, () => quoted(root)));
    };
}

// NNI asks ps for a local runner's processes to kill them, and may end before the answer.
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

// The PIDs of a trial's processes, by their environment; [] without /proc.
function processesOf(id) {
    const numbers = fs.existsSync("/proc") ? fs.readdirSync("/proc").filter(Number) : [];
    return numbers.filter((pid) => {
        try {
            const environment = fs.readFileSync(`/proc/${pid}/environ`, "latin1").split("\0");
            return environment.includes(`NNI_TRIAL_JOB_ID=${id}`);
        } catch { // it has ended, or belongs to another user
            return false;
        }
    });
}

// NNI only waits for the shell of a stopped trial. The trial itself may end later, or never.
async function endProcesses(id) {
    const [left, end] = [processesOf(id), Date.now() + 5000];
    while (left.some(isAlive) && Date.now() < end) await timers.setTimeout(100);
    for (const pid of left.filter(isAlive)) process.kill(pid, "SIGKILL");
}

// NNI empties its list of experiments and then writes it: if killed in between, it loses all of them.
function writeListWhole() {
    const { writeFileSync } = fs;
    fs.writeFileSync = (file, ...rest) => {
        if (path.basename(String(file)) !== ".experiment") return writeFileSync(file, ...rest);
        const unfinished = `${file}.${process.pid}`;
        const sync = (name, flags, write = () => {}) => { // otherwise a power cut may empty the list
            const descriptor = fs.openSync(name, flags, 0o600);
            write(descriptor);
            fs.fsyncSync(descriptor);
            fs.closeSync(descriptor);
        };
        sync(unfinished, "w", (descriptor) => writeFileSync(descriptor, ...rest));
        fs.renameSync(unfinished, file);
        sync(path.dirname(file), "r");
    };
}

// For the Web UI's buttons and nnictl: NNI accepts any value, even one that ends the manager.
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
            // A user's own tuner may have any search space.
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

// Rejects, with an error in one line, a search space on which NNI's own tuners fail.
function checkSpace(space, python) {
    const env = { ...process.env, PYTHONPATH: path.resolve(__dirname, "../..") };
    return new Promise((resolve, reject) => {
        const { stdin } = child_process.execFile(python, ["-c", CHECK], { env },
            (error, _, stderr) => error ? reject(new Error(stderr.trim())) : resolve());
        stdin.end(JSON.stringify(space));
    });
}

// ms to wait for the database's lock, since a reader may be slow or suspended. NNI ends after 1 s.
const PATIENCE = 600_000;

const LOOK = 1000; // ms between two checks of a trial's reports

// Read new reports of a trial; return whether all are read. NNI only uses inotify, which misses what
// another machine writes. The file is opened because NFS only then updates its size.
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
    const finals = new Set(); // "trial set" of each final result
    const isSecondFinal = ({ id, data }) => { // NNI's TPE fails on a second one
        const { type, parameter_id: set } = JSON.parse(data);
        const isSecond = type === "FINAL" && finals.has(`${id} ${set}`);
        if (type === "FINAL") finals.add(`${id} ${set}`);
        return isSecond;
    };
    const stopped = {}; // local trial: its status after it was stopped
    const endings = {}; // local trial that has ended: a promise that its status is known
    const stops = {}; // local trial: a promise that all its processes have ended
    return {
        // NNI ends a search if its tuner does not answer a ping within 5 s, as on a busy machine or
        // in a long computation. A dead tuner is noticed by its closed connection.
        "core/tuner_command_channel/websocket_channel.js": ({ getWebSocketChannel }) => {
            getWebSocketChannel().heartbeat = () => {};
        },
        "core/sqlDatabase.js": ({ SqlDB: { prototype } }) => {
            const { init } = prototype;
            prototype.init = function (...args) {
                const task = init.apply(this, args);
                this.db.configure("busyTimeout", PATIENCE);
                this.db.serialize(); // otherwise waiting statements occupy all of Node's threads
                return task;
            };
        },
        "core/nnimanager.js": ({ NNIManager: { prototype } }) => {
            const { manageTrials, onTrialJobMetrics, stopTrialIfOverMaxDurationLimit } = prototype;
            prototype.manageTrials = function () {
                manager = this;
                const service = this.trainingService;
                const { getTrialJob, submitTrialJob } = service;
                service.getTrialJob = async (id) => {
                    const job = await getTrialJob.call(service, id);
                    // While NNI stops, it reads no reports. A trial that ends then runs again later.
                    const isStopping = this.status.status === "STOPPING";
                    return isStopping ? this.trialJobs.get(id) ?? job : job;
                };
                service.submitTrialJob = async (form) => {
                    const job = await submitTrialJob.call(service, form);
                    // NNI does this only after a write to the database, and may miss earlier reports.
                    this.trialJobs.set(job.id, { ...job });
                    return job;
                };
                return manageTrials.call(this);
            };
            prototype.onTrialJobMetrics = async function (metric) {
                if (!this.dispatcher || !this.trialJobs.has(metric.id))
                    return onTrialJobMetrics.call(this, metric);
                if (isSecondFinal(metric)) return;
                // Before the metric is stored: otherwise the tuner may hear of the trial's end first.
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
            requestMissingSets(prototype);
            checkButtons(prototype, python);
        },
        "training_service/local/localTrainingService.js": ({ LocalTrainingService: { prototype } }) => {
            const { cancelTrialJob, cleanUp, getScript, getTrialJob, runTrialJob } = prototype;
            const starting = {}; // trial: a promise that it has been started
            prototype.getScript = function (folder) {
                const files = `1>${folder}/stdout 2>${folder}/stderr`; // without quotes
                const given = `< /dev/null 1>${quoted(`${folder}/stdout`)} 2>${quoted(`${folder}/stderr`)}`;
                // In a subshell, since NNI notes no status after `exit` or `exec`. Its input is empty:
                // otherwise a trial that reads it would wait for ever.
                return getScript.call(this, folder).map((line) =>
                    line.startsWith("eval ") && line.endsWith(files)
                        ? `(${line.slice(0, -files.length)}) ${given}`
                        : line.replace("cd $NNI_CODE_DIR", 'cd "$NNI_CODE_DIR"')
                            .replace(/>'(.*)'$/s, (_, state) => `>${quoted(state)}`));
            };
            // A trial counts as ended when its process has ended and all its reports are stored.
            prototype.getTrialJob = async function (id) {
                await endings[id]; // until then NNI calls a SUCCEEDED trial FAILED
                const job = this.jobMap.get(id);
                const stream = this.jobStreamMap.get(id);
                if (job?.status !== "RUNNING" || !stream) return getTrialJob.call(this, id);
                if (isAlive(job.pid) || stops[id]) { // NNI would start a shell to find out
                    if (Date.now() - (stream.looked ?? 0) < LOOK) return job;
                    stream.looked = Date.now();
                    readOn(stream);
                    return job;
                }
                if (!readOn(stream) || unstored[id]) return job;
                endings[id] ??= getTrialJob.call(this, id).then(() => {
                    if (job.status === "FAILED") job.status = stopped[id] ?? job.status;
                }).finally(() => delete endings[id]); // slurm.js may run it again: it ends again
                await endings[id];
                return job;
            };
            prototype.runTrialJob = function (id, ...rest) {
                const { workingDirectory } = this.jobMap.get(id);
                // Otherwise NNI reads the reports and the exit status from before a resume.
                fs.rmSync(`${workingDirectory}/.nni`, { recursive: true, force: true });
                starting[id] = runTrialJob.call(this, id, ...rest);
                return starting[id];
            };
            // NNI sets the final status at once, and then ignores the trial's last reports.
            prototype.cancelTrialJob = async function (id, isEarlyStopped = false) {
                await starting[id];
                const job = this.jobMap.get(id);
                if (job?.pid === undefined) return cancelTrialJob.call(this, id, isEarlyStopped);
                if (ENDED.includes(job.status) || stopped[id]) return;
                stopped[id] = isEarlyStopped ? "EARLY_STOPPED" : "USER_CANCELED";
                const view = Object.create(this, { setTrialJobStatus: { value: () => {} } });
                stops[id] = cancelTrialJob.call(view, id, isEarlyStopped) // waits for the shell's end
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
                if (trial.status === "WAITING") trial.status = "USER_CANCELED"; // NNI would start it
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
        // Runners get the folder of the code. If it contains this search's folder, files come, grow and
        // go there while NNI packs them, such as the archive itself, and NNI ends the search.
        "node_modules/tar/index.js": (tar) => {
            const { create } = tar;
            tar.create = (options, files) => {
                const [code, own] = [options.cwd, settings.folder].map((f) => fs.realpathSync(f));
                const latest = path.join(path.dirname(own), "_latest"); // NNI's link to it
                // For machines NNI also packs folders inside the search's: nothing is left out of them.
                const left = [own, latest].map((folder) => `${path.relative(code, folder)}/`);
                const filter = (name) =>
                    !left.some((folder) => `${path.normalize(name)}/`.startsWith(folder));
                return create({ ...options, filter }, files.filter(filter));
            };
        },
        "training_service/common/util.js": (util) => {
            const patience = "sleep = time.sleep; time.sleep = lambda _: sleep(2)"; // s; NNI has 5
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
