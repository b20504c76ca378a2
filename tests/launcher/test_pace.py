"""The launcher's changes in NNI's own manager and service; all other parts are stand-ins."""

import json
import os
import sys

import pytest
from nnis_manager import run

START = """
    const { manager, endTrial, jobs } = makeManager(PARAMS);
    await manager.onTunerCommand("ID", "");
    manager.run();
"""


def start(more="Infinity", **params):
    """Return the script that starts a manager, whose tuner gives out so many sets."""
    return START.replace("PARAMS", f"{json.dumps(params)}, {more}")


def test_a_result_reaches_the_tuner_before_the_database():
    script = """
        await until(() => jobs.size === 1);
        const data = JSON.stringify({ trial_job_id: "t0", parameter_id: 0, type: "FINAL" });
        await manager.onTrialJobMetrics({ id: "t0", data });
        return events.filter((event) => event === "ME t0" || event === "stored metric t0");
    """
    told = run(start(trialConcurrency=1, maxTrialNumber=1) + script)
    assert told == ["ME t0", "stored metric t0"]


def test_a_tuner_on_a_busy_machine_is_waited_for_and_one_that_has_died_is_not():
    script = """
        const { getWebSocketChannel } = load("core/tuner_command_channel/websocket_channel.js");
        const channel = getWebSocketChannel();
        Object.assign(manager, { dispatcherPid: 2 ** 22 + 1 });
        const error = await channel.init().catch(({ message }) => message);
        manager.dispatcherPid = process.pid;
        const connected = channel.init();
        let beat;
        global.setInterval = (callback) => { beat = callback; };
        const note = (event) => () => events.push(event);
        channel.serveWebSocket({ on() {}, ping: note("ping"), terminate: note("end") });
        beat(), beat();
        await connected;
        return [error, channel.serving, events.filter((event) => /ping|end/.test(event))];
    """
    told = run(start(trialConcurrency=1, maxTrialNumber=1) + script)
    assert told == ["the tuner's process has ended at its start", True, []]


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
        await manager.updateExperimentProfile({ params: { searchSpace: {} } }, "SEARCH_SPACE");
        await until(() => asked() > counts[1]);
        return counts;
    """
    assert run(start(more=1, trialConcurrency=2, maxTrialNumber=9) + script) == [1, 2]


def test_a_trial_that_a_user_has_added_starts_after_a_resume_if_it_has_not_started(tmp_path):
    script = """
        const { Database } = load("node_modules/sqlite3");
        const database = new sql.SqlDB();
        await database.init(true, process.argv[3]);
        const add = (event, id, data) =>
            database.storeTrialJobEvent(event, id, 0, data && JSON.stringify(data));
        const added = { parameter_source: "customized", parameters: { x: 1 } };
        await add("ADD_CUSTOMIZED", "", { x: 1 });
        await add("WAITING", "t0", added);
        await add("WAITING", "t0", added);
        await add("ADD_CUSTOMIZED", "", { x: 2 });
        const nothing = async () => {};
        Object.assign(manager, {
            setupTuner: nothing, createCheckpointDir: nothing, exportData: async () => "[]",
            run: nothing,
        });
        Object.assign(manager.dataStore, {
            listTrialJobs: nothing, getImportedData: async () => [],
            getExperimentProfile: async () => manager.experimentProfile,
        });
        manager.dataStore.listTrialJobs = async () => [];
        await manager.resumeExperiment(false);
        const values = manager.waitingTrials.map((form) => JSON.parse(form.hyperParameters.value));
        return [values.map(({ parameters }) => parameters), events];
    """
    make = START.replace("PARAMS", "{ maxTrialNumber: 0 }, 0").splitlines()[1]
    waiting, events = run(make + script, tmp_path)
    assert waiting == [{"x": 2}]
    assert events == []  # it is not stored a second time


def test_wrong_values_for_a_button_are_refused_in_one_line():
    script = """
        await until(() => jobs.size === 1);
        const refused = [];
        for (const [type, params] of [
            ["TRIAL_CONCURRENCY", { trialConcurrency: 0 }],
            ["MAX_TRIAL_NUM", { maxTrialNumber: "many" }],
            ["MAX_EXEC_DURATION", { maxExperimentDuration: "abc" }],
        ]) await manager.updateExperimentProfile({ params }, type).catch(
            ({ message }) => refused.push(message));
        await manager.updateExperimentProfile(
            { params: { maxExecDuration: 60 } }, "MAX_EXEC_DURATION");
        endTrial("t0");
        await manager.cancelTrialJobByUser("t0").catch(({ message }) => refused.push(message));
        return [refused, manager.experimentProfile.params];
    """
    refused, params = run(start(trialConcurrency=1, maxTrialNumber=1) + script)
    assert refused == [
        "trialConcurrency is 0; allowed: a whole number from 1 on",
        'maxTrialNumber is "many"; allowed: a whole number from 1 on',
        'maxExperimentDuration is "abc"; allowed: a number and s, m, h or d',
        "trial t0 has ended: SUCCEEDED",
    ]
    assert params == {"trialConcurrency": 1, "maxTrialNumber": 1, "maxExperimentDuration": 60}


def test_a_trial_over_its_time_is_stopped():
    script = """
        await until(() => events.some((event) => event.startsWith("cancelled")));
        return events.find((event) => event.startsWith("cancelled"));
    """
    params = {"trialConcurrency": 1, "maxTrialNumber": 1, "maxTrialDuration": "1s"}
    assert run(start(**params) + script) == "cancelled t0 true"


REPORT = """
import json, os, pathlib, signal, sys
path = pathlib.Path(os.environ["NNI_SYS_DIR"], ".nni", "metrics")
def write(data, mode="ab"):
    with path.open(mode) as file:
        file.write(data)
def report(value, type="PERIODICAL", **more):
    id = os.environ["NNI_TRIAL_JOB_ID"]
    text = {"trial_job_id": id, "parameter_id": 0, "type": type, "sequence": 0}
    text = json.dumps(text | {"value": json.dumps(value)} | more)
    write(b"ME%06d%b" % (len(text), text.encode()))
"""
STOPPED = """
signal.signal(signal.SIGTERM, lambda *_: (report("late"), os._exit(1)))
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
    (tmp_path / "trial.py").write_text(REPORT + STOPPED)
    script = """
        const [command, last] = process.argv.slice(4);
        const [now, start] = [Date.now, Date.now()];
        if (last === "ready") Date.now = () => start + 20 * (now() - start); // for 5 s
        const service = makeService(command);
        const { id } = await startTrial(service);
        const seen = new Set(); // by several at a time, as NNI's loop and a user's request
        setInterval(async () => seen.add((await service.getTrialJob(id)).status), 5);
        await until(() => events.includes(`report "${last}"`));
        if (command.endsWith("ends'")) await pause(300);
        await service.cancelTrialJob(id, true);
        await service.cancelTrialJob(id, true);
        await until(async () => (await service.getTrialJob(id)).status !== "RUNNING");
        events.push((await service.getTrialJob(id)).status);
        await service.cancelTrialJob(id);
        events.push((await service.getTrialJob(id)).status);
        await until(() => seen.has(events.at(-1)));
        return [...events, [...seen]];
    """
    command = f"exec {sys.executable} trial.py '{how}'"
    last = "ready" if "ready" in reports else "first"
    *told, seen = run(script, tmp_path, command, last)
    assert told == [*(f'report "{report}"' for report in reports), status, status]
    assert {*seen} - {"WAITING"} == {"RUNNING", status}


END = """
    const service = makeService(process.argv[4]);
    const job = await startTrial(service);
    await until(async () => (await service.getTrialJob(job.id)).endTime);
"""


@pytest.mark.parametrize(
    ("writes", "reports", "line"),
    [
        ('write(b"MEabcdef{}")', [1, 2], "what is no report is left out: "),
        ('write(os.urandom(3_000_000) + b"ME000009{}")', [1, 2], "what is no report is left out: "),
        ('write(b"ME999999{\\"a\\"")', [1, 2], "what is no report is left out: "),
        ('write(b"ME000005{\\"a\\"}")', [1, 2], "what is no report is left out: "),
        ("report(3, parameter_id={'__symbol__': 'os'})", [1, 2], "what is no report is left out: "),
        ("report(3, trial_job_id='another')", [1, 2], "what is no report is left out: "),
        ("os.truncate(path, 1); time.sleep(1.5)", [1, 2], "what is no report is left out: "),
        ("path.unlink(); sys.exit(0)", [1], ""),
        ('report("\\0é ME000002{\\"")', [1, '\0é ME000002{"', 2], ""),
        ("report(3, 'FINAL'); report(4, 'FINAL'); report(4, 'FINAL')", [1, 3, 2], "the first one"),
        ("report(float('nan'))", [1, "NaN", 2], ""),
    ],
)
def test_what_is_no_report_is_left_out(tmp_path, writes, reports, line):
    trial = f"""{REPORT}
import time
report(1)
seen = pathlib.Path("seen")
while not seen.exists():
    time.sleep(0.01)
{writes}
report(2)
"""
    (tmp_path / "trial.py").write_text(trial)
    script = """
        const seen = `${process.argv[3]}/seen`;
        until(() => events.length === 1).then(() => fs.writeFileSync(seen, ""));
    """
    script += END + "return [job.status, events, said];"
    status, told, said = run(script, tmp_path, f"{sys.executable} trial.py")
    told = [text.removeprefix("report ") for text in told]
    assert told == ["NaN" if value == "NaN" else json.dumps(value) for value in reports]
    assert status == "SUCCEEDED"
    assert len(said) == bool(line)
    assert all(text.startswith("trial 0 (t") and line in text for text in said)


COMMANDS = [
    "python3 trial.py # don't",
    "python3 trial.py > log 2>&1",
    "python3 trial.py | tee log",
    "python3 trial.py && true",
    "exec python3 trial.py",
    "python3 trial.py; cat; exit 0",  # its input is empty
    'python3 trial.py && touch "$NNI_OUTPUT_DIR/out"',
    "python3 - <<EOF\nimport runpy\nrunpy.run_path('trial.py', run_name='__main__')\nEOF",
    'test "$PWD" = "$NNI_CODE_DIR" && python3 trial.py --data-dir ~/d "it\'s"',
]


def test_a_trial_command_may_be_any_bash_script_in_any_folder(tmp_path):
    folder = tmp_path / "it's a $(false) folder"
    folder.mkdir()
    (folder / "trial.py").write_text(f"{REPORT}report(os.environ['NNI_TRIAL_SEQ_ID'])")
    script = """
        const jobs = [];
        for (const command of process.argv.slice(4)) {
            const service = makeService(command);
            const job = await startTrial(service, jobs.length);
            await until(async () => (await service.getTrialJob(job.id)).endTime);
            jobs.push(job);
        }
        const errors = fs.readFileSync(`${jobs.at(-1).workingDirectory}/stderr`, "utf8");
        return [jobs.map(({ status }) => status), events, errors];
    """
    statuses, events, errors = run(script, folder, *COMMANDS, "pyton trial.py")
    assert statuses == ["SUCCEEDED"] * len(COMMANDS) + ["FAILED"]
    assert events == [f'report "{number}"' for number in range(len(COMMANDS))]
    assert "pyton: command not found" in errors


def test_reports_are_read_later_at_the_limit_of_open_files(tmp_path):
    (tmp_path / "trial.py").write_text(f"{REPORT}report(1)")
    script = """
        const { openSync } = fs;
        let failures = 0;
        fs.openSync = (path, ...mode) => {
            const isReading = path.endsWith("/metrics") && mode.length === 0;
            if (!isReading || failures === 3) return openSync(path, ...mode);
            failures++;
            throw Object.assign(new Error("too many open files"), { code: "EMFILE" });
        };
    """
    script += END + "return [failures, job.status, events];"
    ended = run(script, tmp_path, f"{sys.executable} trial.py")
    assert ended == [3, "SUCCEEDED", ["report 1"]]


def test_a_trial_that_ends_while_nni_stops_does_not_count_as_ended(tmp_path):
    script = """
        const service = makeService("exit 0");
        const job = await startTrial(service);
        service.eventEmitter.removeAllListeners("metric"); // as NNI's stopExperiment
        await until(() => job.end);
        return (await service.getTrialJob(job.id)).status;
    """
    assert run(script, tmp_path) == "RUNNING"


HOOKS = """{
    prepare(job) { events.push(`prepare ${job.again ?? 0}`); },
    environment: () => ({ THERE: "n1" }),
    begun: (job) => job.again ? { place: "n1", time: 0 } : undefined,
    lost: async ({ again }) =>
        again === 2 ? undefined : { why: "n1 is lost", pause: 1, limit: LIMIT },
    cancel: async () => { events.push("cancel"); },
    close: async () => { events.push("close"); },
}"""


@pytest.mark.parametrize(
    ("limit", "again", "status"), [("undefined", 2, "SUCCEEDED"), (1, 1, "FAILED")]
)
def test_a_trial_elsewhere_waits_and_runs_again_after_a_loss(tmp_path, limit, again, status):
    script = END + "await service.cleanUp(); return [job.status, job.url, events, said];"
    command = '[ "$THERE" = n1 ] && [ -e "$NNI_OUTPUT_DIR/second" ]; r=$?;'
    command += '[ -e "$NNI_OUTPUT_DIR/first" ] && touch "$NNI_OUTPUT_DIR/second";'
    command += 'touch "$NNI_OUTPUT_DIR/first"; sleep 0.1; exit $r'
    hooks = HOOKS.replace("LIMIT", str(limit))
    ended, url, events, said = run(script, tmp_path, command, hooks=hooks)
    assert (ended, url.split(":")[1]) == (status, "//n1")
    times = [f"prepare {number}" for number in range(again + 1)]
    assert [event for event in events if event != "delete"] == [*times, "close"]
    assert events.count("delete") == again  # of its reports
    often = "" if limit == "undefined" else " of at most 1"
    assert [line.split(") ", 1)[1] for line in said] == [
        f"is run again ({number}{often}): n1 is lost" for number in range(1, again + 1)
    ]


NVIDIA_SMI = """#!/bin/sh
[ -e "$0.broken" ] && exit 9
echo '<nvidia_smi_log><attached_gpus>2</attached_gpus>'
echo '<gpu id="0"><processes><process_info></process_info></processes></gpu>'
echo '<gpu><utilization><gpu_util>0 %</gpu_util></utilization><processes></processes></gpu>'
"""


def test_the_gpus_that_are_free_are_read_from_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program = tmp_path / "nvidia-smi"
    program.write_text(NVIDIA_SMI)
    program.chmod(0o700)
    script = """
        const { GPUScheduler } = load("training_service/local/gpuScheduler.js");
        const gpus = new GPUScheduler();
        const ran = gpus.run();
        await until(() => gpus.gpuSummary);
        fs.writeFileSync(`${process.argv[3]}/nvidia-smi.broken`, "");
        await pause(100); // it keeps its last answer
        const none = new Map();
        const free = [gpus.getAvailableGPUIndices(false, none), gpus.getSystemGpuCount()];
        const error = await new GPUScheduler().run().catch(({ message }) => message);
        await gpus.stop();
        return [...free, error];
    """
    free, count, error = run(script, tmp_path)
    assert (free, count) == ([1], 2)
    assert "nvidia-smi" in error
