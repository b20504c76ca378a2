// Changes NNI's service that runs trials on this machine, and its look at the GPUs. As shipped, it starts
// shells with unquoted paths, needs inotify, loses the last reports of a trial, and leaves processes.
// With this file a trial counts as ended when its processes have ended and its reports are stored.
//
// elsewhere.js lets trials run on other machines: the trial's process here then only waits for the
// one over there. Its hooks, each with NNI's job (id, workingDirectory, form, status, pid, and again,
// how often it has been run again):
//   environment(job)   more variables of the process here, {name: value}
//   prepare(job)       is called before each start
//   begun(job)         undefined while the trial waits over there, then {time: ms, place}, both optional
//   async lost(job)    the process here has ended: undefined if the trial itself has ended, else
//                      {why, pause: ms, limit}: it runs again after the pause, limit times at most
//   async cancel(job)  the trial was stopped, and its processes here have ended
"use strict";
const { execFile, spawn } = require("child_process");
const fs = require("fs");
const { setTimeout: pause } = require("timers/promises");
const { promisify } = require("util");
const findHooks = require("./elsewhere");

const ENDED = ["SUCCEEDED", "FAILED", "USER_CANCELED", "SYS_CANCELED", "EARLY_STOPPED"];
const LOOK = 500; // ms between two looks at a running trial's reports
const GRACE = 5000; // ms from SIGTERM to SIGKILL
const GPU_PAUSE = 2000; // ms between two looks at the GPUs
const MOST = 1 << 20; // bytes of reports to read at a time: others wait meanwhile
// A report begins with its number of bytes. Inside one, the last quote would have a backslash.
const START = /ME(\d{6})(?=\{")/g;
const HEADER = 8; // bytes

function isReport(text, trial) {
    try {
        const { trial_job_id: id, type, value } = JSON.parse(text);
        const isResult = ["PERIODICAL", "FINAL"].includes(type) && typeof value === "string";
        return id === trial && (isResult || type === "REQUEST_PARAMETER");
    } catch {
        return false;
    }
}

// The reports of a trial, from a file that grows. It may be on NFS, and the trial may damage it.
class Reports {
    constructor(file, trial, tell, warn) {
        Object.assign(this, { file, trial, tell, warn, place: 0, rest: Buffer.alloc(0) });
    }

    // Tell what is new; return whether all is read.
    read() {
        if (!fs.existsSync(this.file)) return true; // the trial has deleted it
        const file = fs.openSync(this.file); // anew, since NFS only then tells the size
        const { size } = fs.fstatSync(file);
        if (size < this.place) { // the trial has cut it, and writes on from there
            this.warn();
            Object.assign(this, { place: 0, rest: Buffer.alloc(0) });
        }
        const news = Buffer.alloc(Math.min(size - this.place, MOST));
        const length = fs.readSync(file, news, 0, news.length, this.place);
        fs.closeSync(file);
        this.place += length;
        this.rest = Buffer.concat([this.rest, news.slice(0, length)]);
        if (length > 0) this.split();
        return this.place >= size;
    }

    // Tell the whole reports of the rest, and keep what may become one.
    split() {
        const bytes = this.rest.toString("latin1"); // one character each
        const starts = [...bytes.matchAll(START)];
        let end = 0;
        for (const [number, { 1: length, index }] of starts.entries()) {
            if (index > end) this.warn();
            end = index;
            const next = starts[number + 1]?.index;
            const last = index + HEADER + Number(length);
            if (last > bytes.length && next === undefined) break; // more is to come
            const text = this.rest.slice(index + HEADER, last).toString();
            if (last <= (next ?? last) && isReport(text, this.trial)) {
                this.tell(text);
                end = last;
            } else {
                this.warn();
                end = next ?? bytes.length;
            }
        }
        const isStart = end < bytes.length && /^(M|ME\d{0,6}\{?|ME\d{6}\{".*)$/s.test(bytes.slice(end));
        if (end < bytes.length && !isStart) this.warn();
        this.rest = isStart ? this.rest.slice(end) : Buffer.alloc(0);
    }
}

// A test of whether a process, by its number, is a trial's: its variables tell.
const isOf = (trial) => (pid) => {
    try {
        const variables = fs.readFileSync(`/proc/${pid}/environ`, "latin1").split("\0");
        return variables.includes(`NNI_TRIAL_JOB_ID=${trial}`);
    } catch { // it has ended, or belongs to another user
        return false;
    }
};

async function endProcesses(trial) {
    const find = () => fs.readdirSync("/proc").filter(Number).filter(isOf(trial));
    const signal = (pids, name) => pids.forEach((pid) => {
        try { process.kill(pid, name); } catch {} // it has just ended
    });
    const [left, end] = [find(), Date.now() + GRACE];
    signal(left, "SIGTERM");
    while (left.some(isOf(trial)) && Date.now() < end) await pause(100);
    signal(find(), "SIGKILL");
}

module.exports = function (settings) {
    const { say, unstored } = settings;
    const elsewhere = findHooks(settings);
    return {
        "training_service/local/localTrainingService.js": (exports) => {
            exports.LocalTrainingService = class Service extends exports.LocalTrainingService {
                // NNI starts four shells for this, and follows the reports by inotify, which ends the
                // manager at its limit, and does not notice what another machine writes.
                async runTrialJob(id, resource) {
                    const job = this.jobMap.get(id);
                    const { form, workingDirectory: folder } = job;
                    // Otherwise the reports from before a resume would come again.
                    fs.rmSync(`${folder}/.nni`, { recursive: true, force: true });
                    fs.mkdirSync(`${folder}/.nni`, { recursive: true });
                    fs.writeFileSync(`${folder}/.nni/metrics`, "");
                    fs.writeFileSync(`${folder}/parameter.cfg`, form.hyperParameters.value);
                    // A file, since ps shows arguments, and a command may contain a password.
                    const command = `cd "$NNI_CODE_DIR" || exit\n${this.config.trialCommand}\n`;
                    fs.writeFileSync(`${folder}/run.sh`, command);
                    elsewhere?.prepare(job);
                    const variables =
                        this.getEnvironmentVariables(job, resource, this.config.trialGpuNumber)
                            .map(({ key, value }) => [key, value]);
                    const env = { ...process.env, ...Object.fromEntries(variables) };
                    Object.assign(env, elsewhere?.environment(job));
                    const output = ["stdout", "stderr"].map((name) =>
                        fs.openSync(`${folder}/${name}`, "w"));
                    const started = spawn("bash", [`${folder}/run.sh`], { env, stdio: ["ignore", ...output] });
                    output.forEach((file) => fs.closeSync(file));
                    const end = (code) => { job.end = { code, time: Date.now() }; };
                    started.on("exit", end).on("error", ({ message }) => end(message));
                    job.pid = started.pid;
                    job.end = undefined;
                    job.reports = this.follow(job);
                    job.startTime = Date.now();
                    this.setExtraProperties(job, resource);
                    if (!elsewhere) this.setTrialJobStatus(job, "RUNNING");
                }

                follow({ form, id, workingDirectory }) {
                    const file = `${workingDirectory}/.nni/metrics`;
                    const tell = (data) => this.eventEmitter.emit("metric", { id, data });
                    let isTold = false;
                    const warn = () => {
                        if (!isTold)
                            say(`trial ${form.sequenceId} (${id}): what is no report is left out of ${file}`);
                        isTold = true;
                    };
                    return new Reports(file, id, tell, warn);
                }

                // NNI starts a shell for each look, and calls a trial ended that has reports left.
                async getTrialJob(id) {
                    const job = this.jobMap.get(id);
                    if (!job) return super.getTrialJob(id); // an error
                    // While NNI stops it hears no reports: what ends then runs again after a resume.
                    const isHeard = this.eventEmitter.listenerCount("metric") > 0;
                    if (job.reports && !ENDED.includes(job.status) && isHeard) this.look(job);
                    return job;
                }

                look(job) {
                    const isAlive = !job.end || job.stopping;
                    if (isAlive && Date.now() - (job.looked ?? 0) < LOOK) return;
                    job.looked = Date.now();
                    const isAllRead = job.reports.read();
                    if (job.status === "WAITING" && isAlive) this.begin(job);
                    if (isAlive || !isAllRead || unstored[job.id]) return;
                    job.ending ??= this.end(job).finally(() => { job.ending = undefined; });
                }

                // A trial elsewhere waits until its command runs over there.
                begin(job) {
                    const begun = elsewhere.begun(job);
                    if (!begun && !job.end && job.reports.place === 0) return;
                    const now = Date.now(); // the other clock may differ
                    job.startTime = Math.min(now, Math.max(job.startTime, begun?.time ?? now));
                    if (begun?.place) job.url = `file://${begun.place}:${job.workingDirectory}`;
                    this.setTrialJobStatus(job, "RUNNING");
                }

                async end(job) {
                    const loss = job.stopped ? undefined : await elsewhere?.lost(job);
                    const { limit = Infinity } = loss ?? {};
                    if (loss && (job.again ?? 0) < limit) await this.forget(job);
                    if (loss && (job.again ?? 0) < limit && !job.stopped) return this.runAgain(job, loss);
                    if (job.status === "WAITING") this.begin(job);
                    job.endTime = job.end.time;
                    this.setTrialJobStatus(job, job.end.code === 0 ? "SUCCEEDED" : job.stopped ?? "FAILED");
                }

                async forget({ id }) { // but for the final result, which the tuner has
                    const others = "delete from MetricData where trialJobId = ? and type <> 'FINAL'";
                    await settings.query(others, id);
                }

                runAgain(job, { why, pause, limit }) {
                    job.again = (job.again ?? 0) + 1;
                    const often = limit ? `${job.again} of at most ${limit}` : job.again;
                    job.message = `run again (${often}): ${why}`;
                    Object.assign(job, { pid: undefined, reports: undefined, submitTime: Date.now() });
                    this.setTrialJobStatus(job, "WAITING");
                    setTimeout(() => this.jobQueue.push(job.id), pause);
                }

                // NNI sets the final status at once, ignores the trial's last reports, and only waits
                // for its shell.
                async cancelTrialJob(id, isEarlyStopped = false) {
                    const job = this.jobMap.get(id);
                    if (!job?.reports) return super.cancelTrialJob(id, isEarlyStopped); // not started
                    if (ENDED.includes(job.status) || job.stopped) return;
                    job.stopped = isEarlyStopped ? "EARLY_STOPPED" : "USER_CANCELED";
                    job.stopping = endProcesses(id).then(() => elsewhere?.cancel(job))
                        .finally(() => { job.stopping = undefined; });
                }

                async cleanUp() {
                    await Promise.all([...this.jobMap.values()].map(({ stopping }) => stopping));
                    return super.cleanUp();
                }
            };
        },

        // NNI starts a Python program that outlives a killed manager, and reads its file by a shell. Two
        // searches of a user delete each other's file, which everybody may write to.
        "training_service/local/gpuScheduler.js": (exports) => {
            exports.GPUScheduler = class GPUs extends exports.GPUScheduler {
                async run() {
                    while (!this.stopping) {
                        await this.look().catch((error) => {
                            if (!this.gpuSummary) throw error; // later the last state stays
                        });
                        await pause(GPU_PAUSE);
                    }
                }

                async look() {
                    const { stdout } = await promisify(execFile)("nvidia-smi", ["-q", "-x"]);
                    const gpuInfos = stdout.split(/<gpu[ >]/).slice(1).map((gpu, index) =>
                        ({ index, activeProcessNum: gpu.split("<process_info>").length - 1 }));
                    this.gpuSummary = { gpuCount: gpuInfos.length, gpuInfos };
                }

                async stop() {
                    this.stopping = true;
                }
            };
        },
    };
};
