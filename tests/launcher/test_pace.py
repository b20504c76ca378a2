"""pace.js in NNI's own manager and local training service; all other parts are stand-ins."""

import json
import sys
import tarfile

import pytest
from nnis_manager import run

START = """
    const { manager, endTrial, jobs } = makeManager(PARAMS);
    await manager.onTunerCommand("ID", "");
    const ended = manager.manageTrials();
"""


def start(more="Infinity", **params):
    """Return the script that starts a manager, whose tuner gives out so many sets."""
    return START.replace("PARAMS", f"{json.dumps(params)}, {more}")


def test_a_result_reaches_the_tuner_before_its_trials_end():
    script = """
        await until(() => jobs.size === 1);
        const metric = (type) => JSON.stringify({ trial_job_id: "t0", parameter_id: 0, type });
        endTrial("t0", "EARLY_STOPPED");
        for (const kind of ["PERIODICAL", "FINAL", "FINAL"])
            manager.onTrialJobMetrics({ id: "t0", data: metric(kind) });
        await until(() => events.includes("EN t0"));
        await manager.onTrialJobMetrics({ id: "t0", data: metric("FINAL") });
        return events.filter((event) => event.endsWith(" t0"));
    """
    told = run(start(trialConcurrency=1, maxTrialNumber=1) + script)
    assert [event for event in told if event in ("ME t0", "EN t0")] == ["ME t0"] * 2 + ["EN t0"]
    assert told.count("stored metric t0") == 2


def test_a_trial_that_ends_while_the_search_is_stopped_does_not_count_as_ended():
    script = """
        await until(() => jobs.size === 2);
        const { dataStore } = manager;
        const { storeTrialJobEvent } = dataStore;
        dataStore.storeTrialJobEvent = (event, id) => {
            if (event === "SUCCEEDED") { // NNI asks for the second trial afterwards
                manager.setStatus("STOPPING");
                endTrial("t1");
            }
            return storeTrialJobEvent(event, id);
        };
        endTrial("t0");
        await ended.catch(() => {}); // NNI's loop does not expect a stop
        return events.filter((event) => event.startsWith("stored SUCCEEDED"));
    """
    told = run(start(trialConcurrency=2, maxTrialNumber=2) + script)
    assert told == ["stored SUCCEEDED t0"]


def test_a_tuner_on_a_busy_machine_is_waited_for():
    script = """
        load("common/globals").default.args = { logLevel: "fatal" };
        const { getWebSocketChannel } = load("core/tuner_command_channel/websocket_channel.js");
        let beat;
        global.setInterval = (callback) => { beat = callback; };
        const channel = getWebSocketChannel();
        const note = (event) => () => events.push(event);
        channel.serveWebSocket({ on() {}, ping: note("ping"), terminate: note("end") });
        beat(), beat();
        return [channel.serving, events];
    """
    assert run(script) == [True, []]


def test_the_tuner_is_asked_when_a_limit_rises_and_the_pauses_are_nnis_when_nothing_runs():
    script = """
        await until(() => manager.status.status === "NO_MORE_TRIAL" && jobs.size === 2);
        const asked = () => events.filter((event) => event.startsWith("GE"));
        const whileItRan = new Set(pauses);
        for (const id of jobs.keys()) endTrial(id);
        await until(() => manager.status.status === "DONE");
        pauses.length = 0;
        await until(() => pauses.length > 2);
        const whenDone = pauses.at(-1);
        const change = (type, params) => manager.updateExperimentProfile({ params }, type);
        await change("MAX_TRIAL_NUM", { maxTrialNum: 4, maxTrialNumber: 2 });
        await until(() => jobs.size === 4);
        for (const id of jobs.keys()) endTrial(id);
        await until(() => manager.status.status === "DONE");
        await change("TRIAL_CONCURRENCY", { trialConcurrency: "3" });
        await change("MAX_TRIAL_NUM", { maxTrialNumber: 9 });
        await until(() => jobs.size === 7);
        return [[...whileItRan], whenDone, asked()];
    """
    while_it_ran, when_done, asked = run(start(trialConcurrency=2, maxTrialNumber=2) + script)
    assert (while_it_ran, when_done) == ([50], 5000)
    assert asked == ["GE 2", "GE 2", "GE 3"]


def test_a_tuner_without_more_sets_is_asked_after_a_trials_end_or_a_new_space():
    script = """
        await until(() => manager.status.status === "TUNER_NO_MORE_TRIAL");
        await pause(100);
        const asked = () => events.filter((event) => event.startsWith("GE")).length;
        const counts = [asked()];
        endTrial("t0");
        await until(() => asked() > counts[0]);
        await pause(100);
        counts.push(asked());
        const params = { searchSpace: { x: { _type: "choice", _value: [1] } } };
        await manager.updateExperimentProfile({ params }, "SEARCH_SPACE");
        await until(() => asked() > counts[1]);
        return counts;
    """
    assert run(start(more=1, trialConcurrency=2, maxTrialNumber=9) + script) == [1, 2]


def test_a_trial_that_a_user_has_added_starts_after_a_resume_if_it_has_not_started():
    script = """
        const { Database } = load("node_modules/sqlite3");
        const database = new Database(":memory:");
        const query = process.mainModule.require("util").promisify(database.all.bind(database));
        await query("create table TrialJobEvent (trialJobId, event, data)");
        const add = (...row) => query("insert into TrialJobEvent values (?, ?, ?)", row);
        const started = JSON.stringify({ parameter_source: "customized", parameters: { x: 1 } });
        await add("", "ADD_CUSTOMIZED", '{"x": 1}');
        await add("t0", "WAITING", started);
        await add("t0", "WAITING", started);
        await add("", "ADD_CUSTOMIZED", '{"x": 2}');
        const nothing = async () => {};
        Object.assign(manager, {
            setupTuner: nothing, createCheckpointDir: nothing, exportData: async () => "[]",
            run: nothing,
        });
        Object.assign(manager.dataStore, {
            db: { db: database }, listTrialJobs: async () => [], getImportedData: async () => [],
            getExperimentProfile: async () => manager.experimentProfile,
        });
        load("common/globals").default.args = { experimentId: "abc" };
        await manager.resumeExperiment(false);
        const given = (form) => JSON.parse(form.hyperParameters.value).parameters;
        return [manager.waitingTrials.map(given), events];
    """
    make = START.replace("PARAMS", "{ maxTrialNumber: 0 }, 0").splitlines()[1]
    waiting, events = run(make + script)
    assert waiting == [{"x": 2}]
    assert events == []  # it is not stored a second time


def test_wrong_values_for_a_button_are_refused_in_one_line():
    script = """
        const refused = [];
        for (const [type, params] of [
            ["TRIAL_CONCURRENCY", { trialConcurrency: 0 }],
            ["MAX_TRIAL_NUM", { maxTrialNumber: "many" }],
            ["MAX_EXEC_DURATION", { maxExperimentDuration: "abc" }],
            ["SEARCH_SPACE", { searchSpace: { x: { _type: "choise", _value: [1] } } }],
        ]) await manager.updateExperimentProfile({ params }, type).catch(
            ({ message }) => refused.push(message));
        await manager.updateExperimentProfile(
            { params: { maxExecDuration: 60 } }, "MAX_EXEC_DURATION");
        endTrial("t0");
        await manager.cancelTrialJobByUser("t0").catch(({ message }) => refused.push(message));
        return [refused, manager.experimentProfile.params];
    """
    asked = "await until(() => jobs.size === 1);" + script
    refused, params = run(start(trialConcurrency=1, maxTrialNumber=1) + asked)
    assert refused[:3] == [
        "trialConcurrency is 0; allowed: a whole number from 1 on",
        'maxTrialNumber is "many"; allowed: a whole number from 1 on',
        'maxExperimentDuration is "abc"; allowed: a number and s, m, h or d',
    ]
    assert refused[3].startswith("searchSpace: x: _type is choise; allowed: choice, ")
    assert refused[4:] == ["trial t0 has ended: SUCCEEDED"]
    assert params == {"trialConcurrency": 1, "maxTrialNumber": 1, "maxExperimentDuration": 60}


def test_the_code_is_packed_without_the_folder_of_the_search(tmp_path):
    own = tmp_path / "code" / "experiments" / "abc"
    (own / "runner").mkdir(parents=True)
    for path in (own / "runner" / "run.sh", own.with_name("abcd"), tmp_path / "code" / "trial.py"):
        path.touch()
    own.with_name("_latest").symlink_to(own.name)
    script = """
        const [own, code] = process.argv.slice(3);
        load("node_modules/tar/index.js");
        const { tarAdd } = load("training_service/common/util.js");
        await tarAdd(`${own}/code.tar.gz`, code);
        await tarAdd(`${own}/runner.tar.gz`, `${own}/runner`); // as for machines
        return true;
    """
    assert run(script, own, tmp_path / "code")
    with tarfile.open(own / "code.tar.gz") as archive:
        assert {*archive.getnames()} == {"experiments", "experiments/abcd", "trial.py"}
    with tarfile.open(own / "runner.tar.gz") as archive:
        assert archive.getnames() == ["run.sh"]


TRIAL = """
import json, os, pathlib, signal, sys
signal.signal(signal.SIGTERM, lambda *_: (report("late"), os._exit(1)))
def report(value):
    text = json.dumps({"value": value})
    path = pathlib.Path(os.environ["NNI_SYS_DIR"], ".nni", "metrics")
    with path.open("a") as file:
        file.write(f"ME{len(text):06d}{text}")
report("first")
if sys.argv[1] == "ignores it":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    report("ready")
while sys.argv[1] != "ends":
    signal.pause()
"""


@pytest.mark.parametrize(
    ("how", "reports", "status"),
    [
        ("reports", ["first", "late"], "EARLY_STOPPED"),
        ("ignores it", ["first", "ready"], "EARLY_STOPPED"),
        ("ends", ["first"], "SUCCEEDED"),
    ],
)
def test_a_trial_that_is_stopped_ends_after_its_last_report(tmp_path, how, reports, status):
    (tmp_path / "trial.py").write_text(TRIAL)
    script = """
        const [folder, command, last] = process.argv.slice(3);
        const [now, start] = [Date.now, Date.now()];
        if (last === "ready") Date.now = () => start + 20 * (now() - start); // for 5 s
        const service = makeService(folder, command);
        const id = `t${process.pid}`; // unique: the processes of a trial are ended by its ID
        const hyperParameters = { index: 0, value: "" };
        service.submitTrialJob({ id, sequenceId: 0, hyperParameters });
        const { promises } = process.mainModule.require("fs");
        const { readFile } = promises;
        promises.readFile = async (...file) => { await pause(50); return readFile(...file); };
        const seen = new Set(); // by several at a time, as NNI's loop and a user's request
        setInterval(async () => seen.add((await service.getTrialJob(id)).status), 5);
        const loop = service.runJobLoop();
        await until(() => events.includes(`metric ${last}`));
        if (command.endsWith("ends'")) await pause(300);
        await service.cancelTrialJob(id, true);
        await service.cancelTrialJob(id, true);
        await until(async () => (await service.getTrialJob(id)).status !== "RUNNING");
        events.push((await service.getTrialJob(id)).status);
        await service.cancelTrialJob(id);
        events.push((await service.getTrialJob(id)).status);
        return [...events, [...seen].sort()];
    """
    command = f"exec {sys.executable} trial.py '{how}'"
    last = "ready" if "ready" in reports else "first"
    told = run(script, tmp_path, command, last)
    *told, seen = told
    assert told == [*(f"metric {report}" for report in reports), status, status]
    assert set(seen) == {"WAITING", "RUNNING", status}
