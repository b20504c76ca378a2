// Fixes faults of NNI's runners, which start trials on machines over SSH and with reuseMode. As
// shipped, the next trial starts seconds later, and a lost machine is neither noticed nor used again.
// With this file the next trial starts within a second. A lost machine is noticed within a minute. Its
// trial runs again with the same parameters and number. A machine that is back is used again.
"use strict";
const timers = require("timers/promises");
const { promisify } = require("util");

const SECOND = 1000; // ms
const LOOK = 5 * SECOND; // between two checks of a machine
// s without a message until a machine is lost. By then runner.py has ended the trial (see PING there).
const SILENCE = 50;
const PATIENCE = 120 * SECOND; // for each step of a start
const [TMP_NO_AVAILABLE_GPU, REQUIRE_EXCEED_TOTAL] = [1, 2]; // NNI's ScheduleResultType

function within(what, promise) {
    const end = timers.setTimeout(PATIENCE).then(() => {
        throw new Error(`${what} takes more than ${PATIENCE / SECOND} s`);
    });
    return Promise.race([promise, end]);
}

// An entry of machineList. It is connected, gets a runner and is watched; after a loss it starts over.
class Machine {
    constructor(config, service, search) {
        Object.assign(this, { config, service, search, state: "new" });
        this.name = `machine ${config.user}@${config.host}:${config.port}`;
    }

    async keep() {
        while (!this.search.dispatcher.stopping) {
            const runner = { isLost: false };
            runner.loss = new Promise((_, reject) => {
                runner.lose = (why) => {
                    runner.isLost = true;
                    reject(new Error(why));
                };
            });
            try {
                await Promise.race([this.start(runner), runner.loss]);
                if (this.state === "lost") this.search.say(`${this.name} is back, and used again`);
                this.state = "used";
                await runner.loss;
            } catch ({ message }) {
                if (!this.search.dispatcher.stopping) await this.giveUp(runner, message);
            }
            await timers.setTimeout(LOOK);
        }
    }

    async start(runner) {
        const { config, service, search } = this;
        const hasCalled = new Promise((resolve) => { runner.call = resolve; });
        await within("the connection", service.connect(config));
        for (const { sshClient } of service.machineExecutorManagerMap.get(config).executors)
            sshClient.on("close", () => runner.lose("its connection is closed"));
        await search.inTurn(async () => {
            if (runner.isLost) return;
            service.remoteMachineMetaOccupiedMap.set(config, false); // NNI takes the first such one
            service.runner = runner;
            const started = search.dispatcher.requestEnvironment(service);
            await within("the start of its runner", Promise.race([started, runner.loss]));
        });
        await within("its runner's call to nniManagerIp", hasCalled);
    }

    // Drop the connection and the runner, and run its trials again.
    async giveUp(runner, why) {
        const { config, service, search } = this;
        const { environment } = runner;
        runner.isLost = true; // its messages are ignored from now on
        const again = environment ? await search.runAgain(environment) : [];
        if (environment) {
            search.dispatcher.environments.delete(environment.id);
            service.environmentExecutorManagerMap.delete(environment.id);
            await service.getCommandChannel.close(environment);
        }
        for (const { sshClient } of service.machineExecutorManagerMap.get(config)?.executors ?? [])
            sshClient.destroy();
        service.machineExecutorManagerMap.delete(config);
        service.remoteMachineMetaOccupiedMap.delete(config);
        if (this.state === "lost") return; // the user has been told
        this.state = "lost";
        search.say([`${this.name} is lost: ${why}`, ...again].join("; "));
        if (search.machines.every(({ state }) => state === "lost"))
            search.say("no machine is left: the trials wait until one is back");
    }
}

// The state that all machines share.
class Search {
    machines = [];
    turn = Promise.resolve();

    constructor({ say, unstored }) {
        Object.assign(this, { say, unstored });
    }

    // Run one start at a time: NNI writes each runner's script to the same file.
    inTurn(work) {
        const done = this.turn.then(work);
        this.turn = done.catch(() => {});
        return done;
    }

    // Set the running trials of a lost runner to WAITING; return a line for each.
    async runAgain(environment) {
        environment.isAlive = false;
        const trials = [...this.dispatcher.trials.values()].filter((trial) =>
            trial.environment === environment && trial.status === "RUNNING" && trial.nodes.size === 0);
        return await Promise.all(trials.map(async (trial) => {
            this.dispatcher.releaseEnvironment(trial);
            trial.status = "MOVING"; // unknown to NNI, so its loops ignore the trial
            const { dataStore, trialJobs } = this.manager;
            while (this.unstored[trial.id]) await timers.setTimeout(50);
            const name = `trial ${trial.form.sequenceId} (${trial.id})`;
            if ((await dataStore.getMetricData(trial.id, "FINAL")).length) {
                trial.status = "SUCCEEDED";
                return `${name} had reported its result`;
            }
            const database = dataStore.db.db;
            const change = promisify(database.run.bind(database));
            await change("delete from MetricData where trialJobId = ?", trial.id);
            Object.assign(trial, { url: undefined, submitTime: Date.now() });
            await dataStore.storeTrialJobEvent("WAITING", trial.id, undefined, trial);
            trialJobs.get(trial.id).status = "WAITING"; // so that NNI stores the next RUNNING
            trial.status = "WAITING";
            this.dispatcher.shouldUpdateTrials = true;
            return `${name} is run again`;
        }));
    }
}

module.exports = function (settings) {
    const search = new Search(settings);
    const runners = new WeakMap(); // {NNI's environment: runner}
    const reusable = "training_service/reusable";
    return {
        "core/nnimanager.js": ({ NNIManager: { prototype } }) => {
            const { run } = prototype;
            prototype.run = function () {
                search.manager = this;
                return run.call(this);
            };
        },
        "node_modules/ssh2/lib/index.js": ({ Client: { prototype } }) => {
            const { connect } = prototype;
            prototype.connect = function (config) {
                const keepaliveCountMax = SILENCE * SECOND / LOOK - 1;
                return connect.call(this, { ...config, keepaliveInterval: LOOK, keepaliveCountMax });
            };
        },
        [`${reusable}/routerTrainingService.js`]: ({ RouterTrainingService: { prototype } }) => {
            const { getTrialJob } = prototype;
            prototype.getTrialJob = async function (id) {
                const trial = await getTrialJob.call(this, id);
                return trial.status === "MOVING" ? { ...trial, status: "RUNNING" } : trial;
            };
        },
        [`${reusable}/trialDispatcher.js`]: ({ TrialDispatcher: { prototype } }) => {
            const { allocateEnvironment, handleCommand, prefetchEnvironments, run } = prototype;
            const { submitTrialJob } = prototype;
            prototype.run = function () {
                settings.hasRunners = true;
                search.dispatcher = this;
                return run.call(this);
            };
            prototype.submitTrialJob = async function (form) {
                const trial = await submitTrialJob.call(this, form);
                this.shouldUpdateTrials = true; // NNI would check a second later
                return trial;
            };
            prototype.prefetchEnvironments = async function () {
                await prefetchEnvironments.call(this);
                for (const service of this.environmentServiceList.filter(({ connect }) => connect))
                    for (const config of service.config.machineList)
                        search.machines.push(new Machine(config, service, search));
                for (const machine of search.machines)
                    machine.keep().catch((error) => search.manager.criticalError(error));
            };
            prototype.allocateEnvironment = async function (trial, environment) {
                if (!environment.isAlive) return; // it was lost a moment ago
                trial.url = environment.trackingUrl; // before NNI stores that the trial runs
                const sent = allocateEnvironment.call(this, trial, environment);
                trial.message = undefined; // it only names NNI's environment
                await sent;
            };
            prototype.handleCommand = async function (command) {
                const runner = runners.get(command.environment);
                if (runner?.isLost) return; // a late message
                await handleCommand.call(this, command);
                if (runner && command.environment.isRunnerReady) {
                    command.environment.status = "RUNNING"; // NNI checks this every 5 s
                    runner.call();
                }
            };
        },
        [`${reusable}/gpuScheduler.js`]: ({ GpuScheduler: { prototype } }) => {
            const { scheduleMachine } = prototype;
            // Trials of a resumed search, and those added in the Web UI, have no constraint.
            const NONE = { type: "None", gpus: [] };
            prototype.scheduleMachine = function (machines, constraint = NONE, ...rest) {
                const result = scheduleMachine.call(this, machines, constraint, ...rest);
                const mayCome = search.machines.some(({ state }) => state !== "used");
                // NNI ends if no connected machine has enough GPUs.
                if (result.resultType === REQUIRE_EXCEED_TOTAL && mayCome)
                    result.resultType = TMP_NO_AVAILABLE_GPU;
                return result;
            };
        },
        [`${reusable}/channels/webCommandChannel.js`]: ({ WebCommandChannel: { prototype } }) => {
            const { start } = prototype;
            prototype.start = async function () {
                await start.call(this);
                this.webSocketServer.on("connection", (client) => {
                    let heard = process.uptime();
                    const hear = () => { heard = process.uptime(); };
                    client.on("message", hear).on("ping", hear); // the runner pings every 5 s
                    const look = setInterval(() => {
                        if (process.uptime() - heard > SILENCE) client.terminate();
                    }, LOOK);
                    client.on("close", () => {
                        clearInterval(look);
                        const runner = runners.get(this.clients.get(client)?.environment);
                        this.clients.delete(client);
                        // Later: if the runner has ended, the SSH connection tells the reason.
                        setTimeout(() => runner?.lose("its runner does not answer"), SECOND);
                    });
                });
            };
        },
        [`${reusable}/environments/remoteEnvironmentService.js`]:
            ({ RemoteEnvironmentService: { prototype } }) => {
                const { createEnvironmentInformation, launchRunner, prepareEnvironment } = prototype;
                prototype.connect = prototype.initRemoteMachineOnConnected;
                prototype.initRemoteMachineOnConnected = async () => {}; // NNI ends if one fails
                prototype.refreshEnvironmentsStatus = async () => {}; // the connections show it
                prototype.createEnvironmentInformation = function (...names) {
                    const environment = createEnvironmentInformation.apply(this, names);
                    this.runner.environment = environment;
                    runners.set(environment, this.runner);
                    return environment;
                };
                prototype.prepareEnvironment = async function (environment) {
                    const isPrepared = await prepareEnvironment.call(this, environment);
                    const { gpuIndices, maxTrialNumberPerGpu } = environment.rmMachineMeta ?? {};
                    // NNI ignores these two, and uses all GPUs of the machine, each for one trial.
                    Object.assign(environment, { usableGpus: gpuIndices, maxTrialNumberPerGpu });
                    return isPrepared;
                };
                prototype.launchRunner = async function (environment) {
                    const runner = runners.get(environment);
                    const executor = await this.getExecutor(environment.id);
                    const { executeScript } = executor;
                    executor.executeScript = (...script) => {
                        const errors = `'${environment.runnerWorkingFolder}/trialrunner_stderr'`;
                        const why = `grep -E '^[A-Za-z_.]+(Error|Exception)' ${errors} | tail -n 1`;
                        runner.end = executeScript.apply(executor, script)
                            .then(() => executor.execute(why))
                            .then(({ stdout }) => runner.lose(`its runner has ended ${stdout.trim()}`))
                            .catch(({ message }) => runner.lose(message));
                    };
                    await launchRunner.call(this, environment);
                };
                prototype.stopEnvironment = async function (environment) {
                    await this.getCommandChannel.close(environment); // this ends the runner
                    await Promise.race([runners.get(environment).end, timers.setTimeout(2 * LOOK)]);
                };
            },
    };
};
