// Changes NNI's manager of trials (core/nnimanager.js) and its connection to the tuner. As shipped, the
// next trial starts some 11 s after a trial's end, late results are lost, a resumed search has too few
// trials and repeated results, and a button of the Web UI can end a search. With this file the next
// trial starts within a second, all reports of a trial reach tuner and database before its end, and a
// killed and resumed search has exactly the configured number of trials.
"use strict";
const fs = require("fs");
const timers = require("timers/promises");

const NNIS_PAUSE = 5000; // ms, of the loops that notice a trial's end and start the next one
const PAUSE = 50; // ms, in its place while trials run
const [INITIALIZED, NEW_TRIAL_JOB, REPORT_METRIC_DATA] = ["ID", "TR", "ME"]; // of the tuner's channel
const UNENDED = ["WAITING", "RUNNING"];

// What NNI stores of a trial that a user has added.
const CUSTOMIZED = '"parameter_source":"customized"';
// The trials that a user has added and that have not started; they start in the order of their events.
const UNSTARTED = `select data from TrialJobEvent where event = 'ADD_CUSTOMIZED' order by rowid
    limit -1 offset (select count(distinct trialJobId) from TrialJobEvent
        where event = 'WAITING' and data like '%${CUSTOMIZED}%')`;

// The values that the Web UI and nnictl may set: NNI takes any, even one that ends the manager.
const WHOLE = { pattern: /^[1-9]\d*$/, allowed: "a whole number from 1 on" };
const SPAN = { pattern: /^\d+(\.\d+)?\s*[smhd]?$/i, allowed: "a number and s, m, h or d" };
const LIMITS = {
    TRIAL_CONCURRENCY: { key: "trialConcurrency", ...WHOLE },
    MAX_TRIAL_NUM: { key: "maxTrialNumber", nnictls: "maxTrialNum", ...WHOLE },
    MAX_EXEC_DURATION: { key: "maxExperimentDuration", nnictls: "maxExecDuration", ...SPAN },
};

function check(params, { key, nnictls, pattern, allowed }) {
    const value = params[nnictls] ?? params[key]; // nnictl sets its own key, and NNI reads the other
    if (!pattern.test(value))
        throw new Error(`${key} is ${JSON.stringify(value)}; allowed: ${allowed}`);
    params[key] = isNaN(value) ? value : Number(value);
}

module.exports = function (settings) {
    const { say, unstored } = settings;
    const finals = new Set(); // "trial set" of each final result
    let manager; // NNI's only one

    const isIdle = () => manager.trialJobs.size + manager.waitingTrials.length === 0
        && ["DONE", "TUNER_NO_MORE_TRIAL"].includes(manager.status.status);
    const { setTimeout: pause } = timers;
    timers.setTimeout = (ms, ...rest) =>
        pause(ms === NNIS_PAUSE && manager && !isIdle() ? PAUSE : ms, ...rest);

    return {
        "core/tuner_command_channel/websocket_channel.js": ({ getWebSocketChannel }) => {
            const channel = getWebSocketChannel();
            // NNI ends a search if its tuner does not answer a ping within 5 s, as on a busy machine or
            // in a long computation. A dead tuner is noticed by its closed connection.
            channel.heartbeat = () => {};
            // NNI allows the tuner 10 s to start, and waits as long for one that has died.
            channel.init = async () => {
                while (!channel.ws) {
                    if (!fs.existsSync(`/proc/${manager.dispatcherPid}`))
                        throw new Error("the tuner's process has ended at its start");
                    await pause(PAUSE);
                }
            };
        },

        "core/nnimanager.js": (exports) => {
            exports.NNIManager = class Manager extends exports.NNIManager {
                run() {
                    manager = this;
                    return super.run();
                }

                // A tuner has no answer to a ping, and is written to by its connection.
                async pingDispatcher() {}

                // NNI looks for the trial in a list to which it adds a trial some time after its start,
                // and tells the tuner after the database, so maybe after the trial's end.
                async onTrialJobMetrics({ id, data }) {
                    const { type, parameter_id: set } = JSON.parse(data);
                    if (type === "FINAL") {
                        if (finals.has(`${id} ${set}`)) // NNI's TPE fails on a second one
                            return say(`trial ${id} has reported another final result; the first one counts`);
                        finals.add(`${id} ${set}`);
                    }
                    this.dispatcher.sendCommand(REPORT_METRIC_DATA, data);
                    unstored[id] = (unstored[id] ?? 0) + 1;
                    await this.dataStore.storeMetricData(id, data).finally(() => unstored[id]--);
                }

                // NNI also cancels the trials that are being stopped, again and again.
                async stopTrialIfOverMaxDurationLimit() {
                    const tooEarly = Date.now() - this.maxTrialDuration * 1000;
                    for (const { id, status, startTime } of this.trialJobs.values())
                        if (status === "RUNNING" && startTime < tooEarly)
                            await this.trainingService.cancelTrialJob(id, true);
                }

                // Resuming runs unfinished trials again, from their start.
                async resumeExperiment(isView) {
                    if (isView) return super.resumeExperiment(isView);
                    for (const { status, trialJobId } of await this.dataStore.listTrialJobs())
                        if (UNENDED.includes(status)) // they will report again
                            await settings.query("delete from MetricData where trialJobId = ?", trialJobId);
                    await super.resumeExperiment(isView);
                    for (const { data } of await settings.query(UNSTARTED)) { // NNI forgets them
                        const value = `{"parameter_id":null,${CUSTOMIZED},"parameters":${data}}`;
                        const sequenceId = this.experimentProfile.nextSequenceId++;
                        this.waitingTrials.push({ sequenceId, hyperParameters: { value, index: 0 } });
                    }
                }

                addRecoveredTrialJob(jobs) {
                    super.addRecoveredTrialJob(jobs);
                    this.currSubmittedTrialNum -= this.waitingTrials.length; // counted at their start
                    const numbers = jobs.map(({ sequenceId }) => sequenceId ?? -1);
                    this.experimentProfile.nextSequenceId = Math.max(-1, ...numbers) + 1; // not used yet
                    // NNI only tells the tuner of unended trials: it would repeat the sets of failed ones.
                    const sets = jobs.flatMap(({ hyperParameters }) => hyperParameters ?? []);
                    this.trialDataForResume = `[${sets.join()}]`;
                }

                // NNI asks for a set of parameters when a trial ends, but not if maxTrialNumber is
                // reached then: nothing starts after the limit is raised. So the number of missing sets
                // is computed each time.
                requestTrialJobs() {
                    const { trialConcurrency } = this.experimentProfile.params;
                    const missing =
                        trialConcurrency - this.trialJobs.size - this.waitingTrials.length - this.asked;
                    if (!(missing > 0)) return; // NaN: asked is undefined until the tuner is ready
                    this.asked += missing;
                    super.requestTrialJobs(missing);
                }

                onTunerCommand(command, content) {
                    if (command === INITIALIZED) this.asked = 0;
                    // A tuner without more sets leaves asked as it is: it is asked at a trial's end.
                    if (command === NEW_TRIAL_JOB) this.asked = Math.max(0, this.asked - 1);
                    return super.onTunerCommand(command, content);
                }

                async updateExperimentProfile(profile, type) {
                    if (type in LIMITS) check(profile.params, LIMITS[type]);
                    const isNewSpace = type === "SEARCH_SPACE"; // for which the tuner may have more sets
                    if (isNewSpace && this.status.status === "TUNER_NO_MORE_TRIAL") this.asked = 0;
                    return super.updateExperimentProfile(profile, type);
                }

                // NNI would delete the result of a trial that has ended.
                async cancelTrialJobByUser(id) {
                    const { status } = this.readonly ? {} : await this.trainingService.getTrialJob(id);
                    if (status && !UNENDED.includes(status))
                        throw new Error(`trial ${id} has ended: ${status}`);
                    return super.cancelTrialJobByUser(id);
                }
            };
        },
    };
};
