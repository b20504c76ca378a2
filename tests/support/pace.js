// NNI's own manager, service and database with the launcher's changes; other parts are stand-ins. A
// test's script gets them as globals; `events` lists NNI's actions, `said` the lines for the user.
"use strict";
const fs = require("fs");
const [root, changesFolder] = [process.env.NNI_NODE, process.env.CHANGES];
const [, , script, folder] = process.argv;
process.chdir(root);
process.argv[1] = `${root}/main.js`;
require(`${root}/node_modules/app-module-path`).addPath(root);
fs.watch = () => { throw new Error("ENOSPC: inotify is at its limit"); };
const timers = require("timers/promises");
const { setTimeout: pause } = timers;
global.pauses = [];
timers.setTimeout = (ms) => { pauses.push(ms); return pause(ms === 5000 ? 20 : 1); };
Object.assign(global, { fs, pause, events: [], said: [], elsewhere: undefined });
const settings = { folder, unstored: {}, say: (line) => said.push(line) };
require(`${changesFolder}/elsewhere`);
require.cache[`${changesFolder}/elsewhere.js`].exports = () => global.elsewhere;
const changes = {};
global.load = (name) => {
    const loaded = require(`${root}/${name}`);
    changes[name]?.(loaded);
    delete changes[name];
    return loaded;
};
// Other machines are hooks of the test's, which it sets before.
global.prepare = (hooks) => {
    global.elsewhere = hooks;
    for (const name of ["manager", "local", "store"])
        Object.assign(changes, require(`${changesFolder}/${name}`)(settings, root));
    for (const name of ["component", "datastore", "globals"]) load(`common/${name}`); // as main.js
    load("common/globals").default.args = { experimentId: "abc", logLevel: "fatal" };
    global.sql = load("core/sqlDatabase.js");
    global.NNIManager = load("core/nnimanager.js").NNIManager;
    global.Service = load("training_service/local/localTrainingService.js").LocalTrainingService;
};
const log = new Proxy({}, { get: () => () => {} });
const note = (...what) => { events.push(what.join(" ").trim()); };
const store = (...what) => pause(5).then(() => note("stored", ...what));

// A manager of trials that run until endTrial(), with a tuner that gives out `more` sets at most.
global.makeManager = (params, more = Infinity) => {
    const jobs = new Map();
    let sets = 0;
    const manager = Object.create(NNIManager.prototype);
    const dispatcher = {
        init() {}, onCommand() {}, onError() {},
        async sendCommand(command, content = "") {
            note(command, command === "GE" ? content : content && JSON.parse(content).trial_job_id);
            if (command !== "GE") return;
            await pause(5);
            for (let n = 0; n < Number(content); n++) {
                if (sets === more) return manager.onTunerCommand("NO", "");
                sets++;
                manager.onTunerCommand("TR", JSON.stringify({ parameter_id: sets }));
            }
        },
    };
    const trainingService = {
        run() { return new Promise(() => {}); }, addTrialJobMetricListener() {},
        async submitTrialJob(form) {
            const job = { id: `t${form.sequenceId}`, status: "RUNNING", startTime: Date.now(), form };
            jobs.set(job.id, job);
            return job;
        },
        getTrialJob: async (id) => jobs.get(id),
        async cancelTrialJob(id, isEarlyStopped) { note("cancelled", id, isEarlyStopped); },
    };
    Object.assign(manager, {
        log, dispatcher, trainingService, config: {},
        trialJobs: new Map(), waitingTrials: [], currSubmittedTrialNum: 0, trialConcurrencyChange: 0,
        trialDataForTuner: "", trialDataForResume: "",
        status: { status: "RUNNING", errors: [] },
        experimentProfile: { execDuration: 0, nextSequenceId: 0, params },
        setStatus(status) { this.status.status = status; },
        setEndtime() {},
        periodicallyUpdateExecDuration() {},
        dataStore: {
            storeExperimentProfile: () => pause(1),
            storeTrialJobEvent: (event, id) => store(event, id),
            storeMetricData: (id) => store("metric", id),
        },
    });
    const endTrial = (id, status = "SUCCEEDED") => jobs.set(id, { ...jobs.get(id), status });
    return { manager, endTrial, jobs };
};

// A service in the test's folder; each report that it tells is noted. Its loop runs.
global.makeService = (trialCommand) => {
    settings.query = async (sql) => note(sql.split(" ")[0]);
    const service = Object.create(Service.prototype);
    Object.assign(service, {
        log, rootDir: folder, config: { trialCommand, trialCodeDirectory: folder },
        eventEmitter: new (require("events"))(), experimentId: `pace${process.pid}`, stopping: false,
        jobMap: new Map(), jobQueue: [], jobStreamMap: new Map(), occupiedGpuIndexNumMap: new Map(),
    });
    service.addTrialJobMetricListener(({ data }) => note("report", JSON.parse(data).value));
    service.runJobLoop();
    return service;
};

// Start a trial; return NNI's job.
global.startTrial = (service, sequenceId = 0) => service.submitTrialJob({
    id: `t${process.pid}-${sequenceId}`, // unique: the processes of a trial are ended by its ID
    sequenceId,
    hyperParameters: { index: 0, value: "{}" },
});

global.until = async (condition) => {
    while (!await condition()) await pause(5);
};
const AsyncFunction = (async () => {}).constructor;
new AsyncFunction(script)().then((result) => {
    console.log(JSON.stringify(result));
    process.exit();
}).catch((error) => {
    console.error(error, events);
    process.exit(1);
});
