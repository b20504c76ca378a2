// NNI's own manager and local training service with pace.js; all other parts are stand-ins. A test's
// script gets them as globals; `events` lists NNI's actions.
"use strict";
const [root, pace] = [process.env.NNI_NODE, process.env.PACE];
process.chdir(root);
process.argv[1] = `${root}/main.js`;
require(`${root}/node_modules/app-module-path`).addPath(root);
const timers = require("timers/promises");
const { setTimeout: pause } = timers;
global.pauses = [];
timers.setTimeout = (ms) => { pauses.push(ms); return pause(ms === 5000 ? 20 : 1); };
const [folder, python] = [process.argv[3], process.env.PYTHON];
const changes = require(pace)({ mode: "local", python, folder, unstored: {} });
global.load = (name) => {
    const loaded = require(`${root}/${name}`);
    changes[name]?.(loaded);
    return loaded;
};
for (const name of ["component", "datastore", "globals"]) load(`common/${name}`); // as NNI's main.js
global.events = [];
global.pause = pause;
global.sql = load("core/sqlDatabase.js");
const { NNIManager } = load("core/nnimanager.js");
const { LocalTrainingService } = load("training_service/local/localTrainingService.js");
const log = new Proxy({}, { get: () => () => {} });
const note = (...what) => { events.push(what.join(" ").trim()); };
const store = (...what) => pause(5).then(() => note("stored", ...what));

// A manager of trials that run until endTrial(), with a tuner that gives out `more` sets at most.
global.makeManager = (params, more = Infinity) => {
    const jobs = new Map();
    let given = 0;
    const manager = Object.create(NNIManager.prototype);
    const dispatcher = {
        async sendCommand(command, content = "") {
            note(command, command === "GE" ? content : content && JSON.parse(content).trial_job_id);
            if (command !== "GE") return;
            await pause(5);
            for (let n = 0; n < Number(content); n++) {
                if (given === more) return manager.onTunerCommand("NO", "");
                given++;
                manager.onTunerCommand("TR", JSON.stringify({ parameter_id: given }));
            }
        },
    };
    const trainingService = {
        async submitTrialJob(form) {
            const job = { id: `t${form.sequenceId}`, status: "RUNNING", startTime: Date.now(), form };
            jobs.set(job.id, job);
            return job;
        },
        getTrialJob: async (id) => jobs.get(id),
    };
    Object.assign(manager, {
        log, dispatcher, trainingService, config: { tuner: { name: "TPE" } },
        trialJobs: new Map(), waitingTrials: [], currSubmittedTrialNum: 0, trialConcurrencyChange: 0,
        trialDataForTuner: "", trialDataForResume: "",
        status: { status: "RUNNING", errors: [] },
        experimentProfile: { execDuration: 0, nextSequenceId: 0, params },
        setStatus(status) { this.status.status = status; },
        setEndtime() {},
        dataStore: {
            storeExperimentProfile: () => pause(1),
            storeTrialJobEvent: (event, id) => store(event, id),
            storeMetricData: (id) => store("metric", id),
        },
    });
    const endTrial = (id, status = "SUCCEEDED") => jobs.set(id, { ...jobs.get(id), status });
    return { manager, endTrial, jobs };
};

// A local training service in this folder; each metric that it hears is noted.
global.makeService = (rootDir, trialCommand) => {
    const service = Object.create(LocalTrainingService.prototype);
    Object.assign(service, {
        log, rootDir, config: { trialCommand, trialCodeDirectory: rootDir },
        eventEmitter: new (require("events"))(), experimentId: `pace${process.pid}`, stopping: false,
        jobMap: new Map(), jobQueue: [], jobStreamMap: new Map(), occupiedGpuIndexNumMap: new Map(),
    });
    service.addTrialJobMetricListener(({ data }) => note("metric", JSON.parse(data).value));
    return service;
};

global.until = async (condition) => {
    while (!await condition()) await pause(5);
};
const run = new (async () => {}).constructor(process.argv[2]);
run().then((result) => {
    console.log(JSON.stringify(result));
    process.exit();
}).catch((error) => {
    console.error(error, events);
    process.exit(1);
});
