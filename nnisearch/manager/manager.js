// Changes NNI's manager of trials, and its channel to the tuner. As shipped, the next trial starts
// some 11 s after a trial's end, late results are lost, a resumed search has too few trials and
// repeated results, and a button of the Web UI can end a search. Here the next trial starts within
// a second, all reports of a trial reach tuner and database, and a killed and resumed search has
// exactly the configured number of trials.
"use strict";
const fs = require("fs");
const timers = require("timers/promises");

const NNIS_PAUSE = 5000; // ms, of the loops that notice a trial's end and start the next one
const PAUSE = 50; // ms, in its place while there are trials
const [INITIALIZED, NEW_TRIAL_JOB, REPORT_METRIC_DATA] = ["ID", "TR", "ME"]; // of the channel
const SPACE_REFUSED = "RS"; // from fixes.py, with the search space that stays
const ENDED = ["SUCCEEDED", "FAILED", "USER_CANCELED", "SYS_CANCELED", "EARLY_STOPPED"];
const isUnended = ({ status }) => !ENDED.includes(status);

// NNI's words for a trial that a user has added.
const ADDED = '"parameter_source":"customized"';
// The parameters of added trials that have not started. They start in the order of events.
const NOT_STARTED = `select data from TrialJobEvent where event = 'ADD_CUSTOMIZED' order by rowid
    limit -1 offset (select count(distinct trialJobId) from TrialJobEvent
        where event = 'WAITING' and data like '%${ADDED}%')`;

const WHOLE = { pattern: /^[1-9]\d*$/, allowed: "a whole number from 1 on" };
const TIME = { pattern: /^\d+(\.\d+)?\s*[smhd]?$/i, allowed: "a number and s, m, h or d" };
const LIMITS = { // as the Web UI and nnictl call them
    TRIAL_CONCURRENCY: { key: "trialConcurrency", ...WHOLE },
    MAX_TRIAL_NUM: { key: "maxTrialNumber", nnictls: "maxTrialNum", ...WHOLE },
    MAX_EXEC_DURATION: { key: "maxExperimentDuration", nnictls: "maxExecDuration", ...TIME },
};

// NNI accepts any value, even one that ends the manager, and ignores nnictl's names.
function setLimit(params, { key, nnictls, pattern, allowed }) {
    const value = params[nnictls] ?? params[key];
    if (!pattern.test(value))
        throw new Error(`${key} is ${JSON.stringify(value)}; allowed: ${allowed}`);
    params[key] = isNaN(value) ? value : Number(value);
}

// Must be called before NNI's modules are loaded, since they keep the function.
function shortenPauses(settings) {
    const { setTimeout: pause } = timers;
    timers.setTimeout = (ms, ...rest) => {
        const isShort = ms === NNIS_PAUSE && settings.manager?.hasWork();
        return pause(isShort ? PAUSE : ms, ...rest);
    };
}

const extendManager = (Original, settings) => class Manager extends Original {
    run() {
        settings.manager = this;
        return super.run();
    }

    hasWork() {
        return this.trialJobs.size + this.waitingTrials.length > 0
            || !["DONE", "TUNER_NO_MORE_TRIAL"].includes(this.status.status);
    }

    async pingDispatcher() {} // the tuner ignores NNI's pings

    // NNI first stores a report, then tells the tuner. By then the trial may have ended: TPE fails
    // on that. If the database is busy, NNI also leaves out the first reports.
    async onTrialJobMetrics({ id, data }) {
        const { unstored } = settings;
        this.dispatcher.sendCommand(REPORT_METRIC_DATA, data);
        unstored[id] = (unstored[id] ?? 0) + 1;
        await this.dataStore.storeMetricData(id, data).finally(() => unstored[id]--);
    }

    // NNI writes a line into its log at each look, until the trial has ended.
    async stopTrialIfOverMaxDurationLimit() {
        const earliest = Date.now() - 1000 * this.maxTrialDuration;
        for (const { id, status, startTime } of this.trialJobs.values())
            if (status === "RUNNING" && startTime < earliest)
                await this.trainingService.cancelTrialJob(id, true);
    }

    // Unended trials run again from their start.
    async resumeExperiment(isView) {
        if (isView) return super.resumeExperiment(isView);
        for (const { trialJobId } of (await this.dataStore.listTrialJobs()).filter(isUnended))
            await settings.query("delete from MetricData where trialJobId = ?", trialJobId);
        await super.resumeExperiment(isView);
        for (const { data } of await settings.query(NOT_STARTED)) { // NNI forgets them
            const value = `{"parameter_id":null,${ADDED},"parameters":${data}}`;
            const sequenceId = this.experimentProfile.nextSequenceId++;
            this.waitingTrials.push({ sequenceId, hyperParameters: { value, index: 0 } });
        }
    }

    addRecoveredTrialJob(jobs) {
        // The status of trials that run again is ADD_RESUMED: NNI forgets them after a second kill.
        const unended = jobs.filter(isUnended).map((job) => ({ ...job, status: "WAITING" }));
        super.addRecoveredTrialJob(unended);
        this.currSubmittedTrialNum -= this.waitingTrials.length; // NNI counts them at their start
        const numbers = jobs.map(({ sequenceId }) => sequenceId ?? -1);
        this.experimentProfile.nextSequenceId = Math.max(-1, ...numbers) + 1;
        // NNI only tells the tuner of unended trials: it would propose sets of failed ones again.
        const sets = jobs.flatMap(({ hyperParameters }) => hyperParameters ?? []);
        this.trialDataForResume = `[${sets.join()}]`;
    }

    // NNI asks for a set of parameters when a trial ends, but not if maxTrialNumber is reached.
    // Then nothing would start after the user raises this limit.
    requestTrialJobs() {
        const present = this.trialJobs.size + this.waitingTrials.length + this.asked;
        const missing = this.experimentProfile.params.trialConcurrency - present;
        if (!(missing > 0)) return; // NaN until the tuner is ready
        this.asked += missing;
        super.requestTrialJobs(missing);
    }

    onTunerCommand(command, content) {
        if (command === SPACE_REFUSED) { // otherwise a resume would begin with the new one
            this.experimentProfile.params.searchSpace = JSON.parse(content);
            return this.dataStore.storeExperimentProfile(this.experimentProfile);
        }
        if (command === INITIALIZED) this.asked = 0;
        // If the tuner has no more sets, asked stays: the next question comes at a trial's end.
        if (command === NEW_TRIAL_JOB) this.asked = Math.max(0, this.asked - 1);
        return super.onTunerCommand(command, content);
    }

    async updateExperimentProfile(profile, type) {
        if (type in LIMITS) setLimit(profile.params, LIMITS[type]);
        const isUsedUp = this.status.status === "TUNER_NO_MORE_TRIAL";
        if (type === "SEARCH_SPACE" && isUsedUp) this.asked = 0; // a new space has more sets
        return super.updateExperimentProfile(profile, type);
    }

    // NNI would delete the result of a trial that has ended.
    async cancelTrialJobByUser(id) {
        const { status } = this.readonly ? {} : await this.trainingService.getTrialJob(id);
        if (ENDED.includes(status)) throw new Error(`trial ${id} has ended: ${status}`);
        return super.cancelTrialJobByUser(id);
    }
};

function changeChannel(channel, settings) {
    // NNI ends a search if its tuner does not answer within 5 s, as on a busy machine or in a long
    // computation. A dead tuner is noticed by its closed connection.
    channel.heartbeat = () => {};
    // NNI gives the tuner 10 s to start, even if its process has ended.
    channel.init = async () => {
        while (!channel.ws) {
            if (!fs.existsSync(`/proc/${settings.manager.dispatcherPid}`))
                throw new Error("the tuner's process has ended at its start");
            await timers.setTimeout(PAUSE);
        }
    };
}

module.exports = (settings) => {
    shortenPauses(settings);
    return {
        "core/nnimanager.js": (exports) => {
            exports.NNIManager = extendManager(exports.NNIManager, settings);
        },
        "core/tuner_command_channel/websocket_channel.js": ({ getWebSocketChannel }) => {
            changeChannel(getWebSocketChannel(), settings);
        },
    };
};
