// Trials that run on other machines, over SSH (elsewhere/over_ssh.py) or as SLURM jobs that srun
// starts: the hooks that local.js calls. A trial waits until its command runs over there, which its
// file .nni/elsewhere tells. If its machine and not the trial has failed, it runs again.
"use strict";
const { execFile } = require("child_process");
const fs = require("fs");
const { setTimeout: pause } = require("timers/promises");
const { promisify } = require("util");

const RERUNS = 3; // of a SLURM job, at most
const LONGEST = 60; // s between two submissions
const PATIENCE = 40; // s until SLURM knows how a job has ended
const LIMIT = { timeout: 20_000 }; // ms for an answer
const RETRIES = 60; // of scancel, one each 5 s
// SLURM's states of a job that it has ended itself, but not for a limit.
const ENDED_BY_SLURM = ["BOOT_FAIL", "NODE_FAIL", "PREEMPTED", "REVOKED"];
const UNCLEAR = ["COMPLETING", "CONFIGURING", "PENDING", "RUNNING", "STAGE_OUT", "SUSPENDED"];
// What srun says of a job that does not exist yet, and that may be submitted again.
const NOT_YET = new RegExp("^srun: error: .*("
    + "[Uu]nable to contact slurm controller|timed out|transmitted or received|temporarily"
    + "|violates accounting/QOS policy|[Ll]imit.*(submit|reached)|[Ss]ubmit.*limit"
    + ").*$", "m");
// What srun says of a job whose state SLURM does not tell.
const LOST = /^(srun|slurmstepd\S*): error: .*(node failure|due to preemption|launch.* failed).*$/im;
const SLURMS_ERROR = /^(srun|slurmstepd\S*): (error: |.* aborted)/m;
const NO_PROLOG = /^.*task.?prolog.*$/im;

// A trial may delete its files.
const read = (file) => { try { return fs.readFileSync(file, "utf8"); } catch { return ""; } };
const noteOf = ({ workingDirectory }) => `${workingDirectory}/.nni/elsewhere`;
const nameOf = ({ form, id }) => `trial ${form.sequenceId} (${id})`;

const shared = {
    environment: () => ({}),
    // On NFS a new file appears late, but changes of an existing one are seen on opening.
    prepare: (job) => fs.writeFileSync(noteOf(job), ""),
    begun(job) {
        const [, time, place] = /^(\d+) (\S+)/m.exec(read(noteOf(job))) ?? [];
        if (time) return { time: Number(time), place };
        return read(`${job.workingDirectory}/.nni/metrics`) ? {} : undefined;
    },
    async cancel() {},
    async close() {},
};

const overSsh = ({ elsewhere: { folder, program }, python, say }) => ({
    ...shared,
    async lost(job) {
        const why = /^lost (.*)/.exec(read(noteOf(job)))?.[1];
        return why && { why, pause: 0 };
    },
    async close() {
        const { stdout } = await promisify(execFile)(python, ["-IS", program, folder, "remove"])
            .catch(({ message }) => ({ stdout: message }));
        stdout.trim().split("\n").filter(Boolean).forEach(say);
    },
});

function bySlurm({ elsewhere: { environment, isStep, name }, say }) {
    const told = new Set();
    const sayOnce = (line) => {
        if (!told.has(line)) say(line);
        told.add(line);
    };
    const warnOfTasks = (job) => {
        if (read(noteOf(job)).includes("several"))
            sayOnce(`${nameOf(job)} runs as several tasks, which all report: take srun --ntasks=1`);
    };
    // How a trial's job has ended: SLURM's state of it, "" if that is unknown.
    async function stateOf(job) {
        const number = /^\d+ \S+ (\d+)$/m.exec(read(noteOf(job)))?.[1];
        const end = Date.now() + PATIENCE * 1000;
        while (number && !isStep && Date.now() < end) {
            const ask = promisify(execFile)("scontrol", ["-o", "show", "job", number], LIMIT);
            const { stdout } = await ask.catch(() => ({ stdout: "" }));
            const state = /\bJobState=(\w+)/.exec(stdout)?.[1] ?? "";
            const isPreempted = /\bPreemptTime=\d/.test(stdout); // with a GraceTime it just FAILED
            if (!UNCLEAR.includes(state)) return isPreempted ? "PREEMPTED" : state;
            await pause(500);
        }
        return "";
    }
    return {
        ...shared,
        environment: ({ id }) => ({ ...environment, SLURM_JOB_NAME: name + id }),
        begun(job) {
            warnOfTasks(job);
            return shared.begun(job);
        },
        async lost(job) {
            warnOfTasks(job);
            const said = read(`${job.workingDirectory}/stderr`);
            // With a node's failure srun's status is 0, too.
            if (job.end.status === 0 && !SLURMS_ERROR.test(said)) return undefined;
            const refused = shared.begun(job) ? undefined : NOT_YET.exec(said)?.[0];
            if (refused) {
                sayOnce(`SLURM takes no more jobs now, so trials are submitted again later: ${refused}`);
                return { why: "", pause: Math.min(2 ** (job.again ?? 0), LONGEST) * 1000 };
            }
            const [prolog] = NO_PROLOG.exec(said) ?? [];
            if (prolog) {
                const folder = job.workingDirectory;
                sayOnce(`a node does not have ${folder}, or may not run files there: ${prolog}`);
            }
            const state = await stateOf(job);
            const ofState = ENDED_BY_SLURM.includes(state) && `SLURM has ended its job: ${state}`;
            // A job that the user has cancelled is not run again.
            const why = ofState || (state !== "CANCELLED" && LOST.exec(said)?.[0]);
            return why ? { why, pause: 0, limit: RERUNS } : undefined;
        },
        // srun ends its job unless it was killed itself.
        async cancel(job) {
            const cancel = () => promisify(execFile)("scancel", ["--name", name + job.id], LIMIT);
            const tryAgain = async () => {
                for (let tries = 0; tries < RETRIES; tries++) {
                    await pause(5000);
                    if (await cancel().then(() => true, () => false)) return;
                }
            };
            await cancel().catch(({ message }) => {
                sayOnce(`jobs of stopped trials may still run; it is tried again: ${message.trim()}`);
                tryAgain();
            });
        },
    };
}

module.exports = function (settings) {
    return { ssh: overSsh, slurm: bySlurm }[settings.elsewhere?.kind]?.(settings);
};
