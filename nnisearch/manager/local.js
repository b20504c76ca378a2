// Changes NNI's service for trials on this machine, and its look at the GPUs. As shipped, it starts
// shells with unquoted paths, needs inotify, loses a trial's last reports, and leaves processes.
// Here a trial counts as ended when its processes have ended and its reports are stored.
//
// With elsewhere.js a trial runs on another machine, and its process here waits for it. The hooks
// get NNI's job: id, workingDirectory, form, status; again, how often it was run again; and, once
// its process here has ended, end: {status: number, null after a signal or a text, time: ms}.
//   prepare(job), environment(job)  before each start; returns {name: value} for the process here
//   begun(job)  undefined while the trial waits over there, then {time: ms, place}, both optional
//   async lost(job)  its process here has ended: undefined if the trial itself has ended, otherwise
//                    {why, pause: ms, limit}: it runs again after the pause, limit times at most;
//                    the user is told why, if that is not empty
//   async cancel(job)  it was stopped, and its processes here have ended
//   async close()  the search is stopped, and its trials have ended
"use strict";
const { execFile, spawn } = require("child_process");
const fs = require("fs");
const { setTimeout: pause } = require("timers/promises");
const { promisify } = require("util");
const findHooks = require("./elsewhere");

const LOOK = 500; // ms between two looks at a running trial's reports
const GRACE = 5000; // ms from SIGTERM to SIGKILL
const GPU_PAUSE = 2000; // ms between two looks at the GPUs
const MOST = 1 << 20; // bytes: longer than any report, and the most that is read at a time
const READ_LATER = ["EIO", "EMFILE", "ENFILE", "ESTALE"]; // NFS, or the limit of open files
const HEADER = 8; // characters of a report: ME and the number of its bytes
// The start of a report; inside one, this quote would have a backslash.
const START = /(?=ME\d{6}\{")/;

// The reports of a trial, from its growing file. What is no report is left out.
class Reports {
    constructor(job, tell, say) {
        const file = `${job.workingDirectory}/.nni/metrics`;
        Object.assign(this, { file, job, tell, say, place: 0, rest: "", said: new Set() });
    }

    // Tell the new reports; return whether all is read.
    read() {
        let size, news;
        try {
            const file = fs.openSync(this.file); // anew, since NFS only then tells the size
            try {
                size = fs.fstatSync(file).size;
                if (size < this.place) this.skipTo(0); // the trial has cut it
                news = Buffer.alloc(Math.min(size - this.place, MOST));
                this.place += fs.readSync(file, news, 0, news.length, this.place);
            } finally {
                fs.closeSync(file);
            }
        } catch ({ code }) {
            return !READ_LATER.includes(code); // otherwise the trial has deleted it
        }
        const pieces = (this.rest + news.toString("latin1")).split(START); // a character per byte
        this.rest = pieces.pop();
        if (this.rest.length >= HEADER + Number(this.rest.slice(2, HEADER))) {
            pieces.push(this.rest);
            this.rest = "";
        }
        pieces.forEach((piece) => this.check(piece));
        if (this.rest.length > MOST) this.skipTo(this.place);
        return this.place >= size;
    }

    check(piece) {
        const end = HEADER + Number(piece.slice(2, HEADER));
        const text = Buffer.from(piece.slice(HEADER, end), "latin1").toString();
        const report = parse(text, this.job.id);
        if (!report || piece.length > end) this.warn();
        const isFinal = report?.type === "FINAL";
        if (isFinal && this.job.hasResult) // NNI's TPE fails on a second one
            this.sayOnce("several final results; the first one counts");
        else if (report)
            this.tell({ id: this.job.id, data: JSON.stringify(report) });
        this.job.hasResult ||= isFinal;
    }

    skipTo(place) {
        this.warn();
        Object.assign(this, { place, rest: "" });
    }

    warn() {
        this.sayOnce(`what is no report is left out: ${this.file}`);
    }

    sayOnce(what) {
        if (!this.said.has(what)) this.say(`${nameOf(this.job)}: ${what}`);
        this.said.add(what);
    }
}

const nameOf = ({ form, id }) => `trial ${form.sequenceId} (${id})`;

// A trial's report; undefined if the text is none. Further keys could run code in the tuner.
function parse(text, trial) {
    try {
        const { parameter_id, trial_job_id, type, sequence, value } = JSON.parse(text);
        const isResult = type === "FINAL" || type === "PERIODICAL" && Number.isInteger(sequence);
        const isReport = isResult && trial_job_id === trial && typeof value === "string";
        const isId = parameter_id === null || typeof parameter_id !== "object";
        if (isReport && isId) return { parameter_id, trial_job_id, type, sequence, value };
    } catch {} // it is no JSON
}

// Whether a process belongs to a trial: its variables tell.
function isOf(trial, pid) {
    try {
        const variables = fs.readFileSync(`/proc/${pid}/environ`, "latin1").split("\0");
        return variables.includes(`NNI_TRIAL_JOB_ID=${trial}`);
    } catch { // it has ended, or is another user's
        return false;
    }
}

async function endProcesses(trial) {
    const find = () => fs.readdirSync("/proc").filter((name) => Number(name) && isOf(trial, name));
    const signal = (pids, name) => pids.forEach((pid) => {
        try { process.kill(pid, name); } catch {} // it has just ended
    });
    const [left, end] = [find(), Date.now() + GRACE];
    signal(left, "SIGTERM");
    while (left.some((pid) => isOf(trial, pid)) && Date.now() < end) await pause(100);
    signal(find(), "SIGKILL");
}

const extendService = (Original, settings, elsewhere) => class Service extends Original {
    // NNI starts five shells, and follows the reports by inotify. At inotify's limit the manager
    // ends, and inotify does not see what another machine writes.
    async runTrialJob(id, resource) {
        const job = this.jobMap.get(id);
        const folder = job.workingDirectory;
        // Otherwise the reports from before a resume come again.
        fs.rmSync(`${folder}/.nni`, { recursive: true, force: true });
        fs.mkdirSync(`${folder}/.nni`, { recursive: true });
        const write = (name, text) => fs.writeFileSync(`${folder}/${name}`, text);
        write(".nni/metrics", "");
        write("parameter.cfg", job.form.hyperParameters.value);
        // A file, since ps shows arguments, and the command may contain a password.
        write("run.sh", `cd "$NNI_CODE_DIR" || exit\n${this.config.trialCommand}\n`);
        elsewhere?.prepare(job);
        const variables = this.getEnvironmentVariables(job, resource, this.config.trialGpuNumber)
            .map(({ key, value }) => [key, value]);
        const own = { ...Object.fromEntries(variables), ...elsewhere?.environment(job) };
        const output = ["stdout", "stderr"].map((name) => fs.openSync(`${folder}/${name}`, "w"));
        const how = { env: { ...process.env, ...own }, stdio: ["ignore", ...output] };
        const shell = spawn("bash", [`${folder}/run.sh`], how);
        output.forEach((file) => fs.closeSync(file));
        const end = (status) => {
            job.end = { status, time: Date.now() };
            // As NNI; watch/endings.py reads it. The trial may have removed the folder.
            fs.writeFile(`${folder}/.nni/state`, `${status} ${job.end.time}`, () => {});
        };
        shell.on("exit", end).on("error", ({ message }) => end(message));
        const tell = (report) => this.eventEmitter.emit("metric", report);
        const reports = new Reports(job, tell, settings.say);
        Object.assign(job, { reports, startTime: Date.now(), end: undefined });
        this.setExtraProperties(job, resource);
        if (!elsewhere) this.setTrialJobStatus(job, "RUNNING");
    }

    // NNI starts a shell for each look, and ends a trial that has reports left.
    async getTrialJob(id) {
        const job = this.jobMap.get(id);
        // While NNI stops, it hears no reports: a trial that ends then runs again after a resume.
        const isHeard = this.eventEmitter.listenerCount("metric") > 0;
        if (job?.reports && !job.endTime && isHeard) this.look(job);
        return job ?? super.getTrialJob(id); // which throws NNI's error
    }

    look(job) {
        const isAlive = !job.end || job.stopping;
        if (isAlive && Date.now() - (job.looked ?? 0) < LOOK) return;
        job.looked = Date.now();
        const isAllRead = job.reports.read();
        const begun = job.status === "WAITING" && elsewhere.begun(job);
        if (begun) this.begin(job, begun);
        if (isAlive || !isAllRead || settings.unstored[job.id]) return;
        job.ending ??= this.end(job).finally(() => { job.ending = undefined; });
    }

    begin(job, { time, place }) {
        const now = Date.now(); // the other clock may differ
        job.startTime = Math.min(now, Math.max(job.startTime, time ?? now));
        if (place) job.url = `file://${place}:${job.workingDirectory}`;
        this.setTrialJobStatus(job, "RUNNING");
    }

    async end(job) {
        const loss = job.stopped ? undefined : await elsewhere?.lost(job);
        if (loss && (job.again ?? 0) < (loss.limit ?? Infinity)) {
            await settings.query( // a final result stays: the tuner knows it
                "delete from MetricData where trialJobId = ? and type <> 'FINAL'", job.id);
            if (!job.stopped) return this.runAgain(job, loss);
        }
        if (job.reports.rest) job.reports.warn(); // it was killed while it wrote
        if (job.status === "WAITING") this.begin(job, {});
        job.endTime = job.end.time;
        const isGood = job.end.status === 0;
        this.setTrialJobStatus(job, isGood ? "SUCCEEDED" : job.stopped ?? "FAILED");
    }

    runAgain(job, { why, pause: ms, limit }) {
        job.again = (job.again ?? 0) + 1;
        const often = limit ? `${job.again} of at most ${limit}` : job.again;
        if (why) settings.say(`${nameOf(job)} is run again (${often}): ${why}`);
        job.reports = undefined;
        job.submitTime = Date.now(); // NNI stores it as the time of WAITING
        this.setTrialJobStatus(job, "WAITING");
        setTimeout(() => this.jobQueue.push(job.id), ms);
    }

    // NNI sets the status at once, ignores the last reports, and only waits for the shell.
    async cancelTrialJob(id, isEarlyStopped = false) {
        const job = this.jobMap.get(id);
        if (!job?.reports) return super.cancelTrialJob(id); // it has no process
        if (job.endTime || job.stopped) return;
        job.stopped = isEarlyStopped ? "EARLY_STOPPED" : "USER_CANCELED";
        job.stopping = endProcesses(id).then(() => elsewhere?.cancel(job))
            .finally(() => { job.stopping = undefined; });
    }

    async cleanUp() {
        await Promise.all([...this.jobMap.values()].map(({ stopping }) => stopping));
        await elsewhere?.close();
        return super.cleanUp();
    }
};

// NNI starts a Python program that outlives a killed manager, and reads its file by a shell. All
// users may write to that file, and another search may delete it.
const extendScheduler = (Original) => class Scheduler extends Original {
    async run() {
        while (!this.stopping) {
            await this.look().catch((error) => {
                if (!this.gpuSummary) throw error; // later its last answer is used
            });
            await pause(GPU_PAUSE);
        }
    }

    async look() {
        const { stdout } = await promisify(execFile)("nvidia-smi", ["-q", "-x"]);
        const gpuInfos = stdout.split(/<gpu[ >]/).slice(1).map((gpu, index) =>
            ({ index, activeProcessNum: gpu.split("<process_info>").length - 1 }));
        if (gpuInfos.length === 0) throw new Error("nvidia-smi shows no GPU");
        this.gpuSummary = { gpuCount: gpuInfos.length, gpuInfos };
    }

    async stop() {
        this.stopping = true;
    }
};

module.exports = (settings) => ({
    "training_service/local/localTrainingService.js": (exports) => {
        const { LocalTrainingService: Original } = exports;
        exports.LocalTrainingService = extendService(Original, settings, findHooks(settings));
    },
    "training_service/local/gpuScheduler.js": (exports) => {
        exports.GPUScheduler = extendScheduler(exports.GPUScheduler);
    },
});
