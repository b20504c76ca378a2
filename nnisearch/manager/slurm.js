// Supports trials that srun starts. As shipped, NNI counts such a trial as running while its job is in
// SLURM's queue, and as failed or even succeeded if SLURM ends the job. With this file a trial is
// WAITING until its job starts on a node, and its duration counts from then. If SLURM ends the job, for
// example because the node fails, the trial runs again with the same parameters and number.
"use strict";
const child_process = require("child_process");
const fs = require("fs");
const { promisify } = require("util");

const RERUNS = 3; // of a trial, at most
const LOOK = 500; // ms between two checks of a waiting trial

// Returns "" if the trial has deleted the file.
const read = (file) => { try { return fs.readFileSync(file, "utf8"); } catch { return ""; } };

const isAlive = (pid) => {
    try { return process.kill(pid, 0); } catch { return false; }
};

module.exports = function ({ id, slurm }) {
    if (!slurm) return {};
    const lost = new RegExp(slurm.lost, "m");
    const nameOf = (job) => `nni-${id}-${job.id}`; // as in shared/slurm.py
    const noteOf = ({ workingDirectory }) => `${workingDirectory}/${slurm.note}`;
    return {
        "core/nnimanager.js": ({ NNIManager: { prototype } }) => {
            const { initTrainingService } = prototype;
            prototype.initTrainingService = async function (config) {
                const { db } = this.dataStore.db;
                const service = await initTrainingService.call(this, config);
                return Object.assign(service, { execute: promisify(db.run.bind(db)) });
            };
        },
        "training_service/local/localTrainingService.js": ({ LocalTrainingService: { prototype } }) => {
            const { cancelTrialJob, getEnvironmentVariables, getTrialJob } = prototype;
            const { runTrialJob, setTrialJobStatus } = prototype;
            prototype.getEnvironmentVariables = function (job, ...rest) {
                const name = { key: "SLURM_JOB_NAME", value: nameOf(job) };
                return [...getEnvironmentVariables.call(this, job, ...rest), name];
            };
            prototype.runTrialJob = function (trial, ...rest) {
                const job = this.jobMap.get(trial);
                fs.mkdirSync(`${job.workingDirectory}/.nni`, { recursive: true, mode: 0o700 });
                // On NFS a new file appears late, but changes of an existing one are seen on opening.
                fs.writeFileSync(noteOf(job), "");
                return runTrialJob.call(this, trial, ...rest);
            };
            prototype.setTrialJobStatus = function (job, status) {
                // NNI sets RUNNING before there is a process.
                if (status === "RUNNING" && job.pid === undefined) return;
                setTrialJobStatus.call(this, job, status);
            };
            prototype.begin = function (job) {
                const [time, node] = read(noteOf(job)).trim().split(/\s+/);
                const hasReported = read(this.jobStreamMap.get(job.id).path) !== "";
                if (!time && !hasReported && isAlive(job.pid)) return;
                const now = Date.now(); // the node's clock may differ
                job.startTime = Math.min(now, Math.max(job.startTime, Number(time) || now));
                if (node) job.url = `file://${node}:${job.workingDirectory}`;
                this.setTrialJobStatus(job, "RUNNING");
            };
            prototype.runAgain = async function (job, why) {
                await this.execute( // except the final result, since TPE fails on a second one
                    "delete from MetricData where trialJobId = ? and type <> 'FINAL'", job.id);
                this.jobStreamMap.get(job.id).end(0);
                this.jobStreamMap.delete(job.id);
                job.again = (job.again ?? 0) + 1;
                job.message = `run again (${job.again} of at most ${RERUNS}): ${why}`;
                Object.assign(job, { pid: undefined, startTime: undefined, submitTime: Date.now() });
                this.setTrialJobStatus(job, "WAITING");
                this.jobQueue.push(job.id);
            };
            prototype.getTrialJob = async function (trial) {
                const job = this.jobMap.get(trial);
                if (job?.status === "WAITING" && job.pid !== undefined) {
                    if (Date.now() - (job.seen ?? 0) < LOOK) return job;
                    job.seen = Date.now();
                    this.begin(job);
                    return job;
                }
                if (job?.status === "RUNNING") { // it has ended: pace.js handles living trials
                    const why = lost.exec(read(`${job.workingDirectory}/stderr`));
                    if (why && (job.again ?? 0) < RERUNS) {
                        await this.runAgain(job, why[0]);
                        return job;
                    }
                }
                return getTrialJob.call(this, trial);
            };
            prototype.cancelTrialJob = async function (trial, ...rest) {
                const job = this.jobMap.get(trial);
                await cancelTrialJob.call(this, trial, ...rest);
                // srun ends its job unless it was killed itself.
                const cancel = promisify(child_process.execFile);
                await cancel("scancel", ["--name", nameOf(job)]).catch(() => {});
            };
        },
    };
};
