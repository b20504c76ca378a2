"""What the documents show works, and their links lead somewhere."""

import re
import subprocess
import sys

import nni
import pytest
import yaml
from conftest import ROOT
from documents import examples
from nni.algorithms.hpo.tpe_tuner import TpeTuner

from nnisearch.before import checks
from nnisearch.before import config as configuration
from nnisearch.before.space import check_space

DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


def anchors(path):
    """Return the names by which links reach the headings of a document, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(document):
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", document.read_text())
    for path, anchor in links:
        target = document.parent / path if path else document
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_each_kind_of_a_search_space_is_proposed_as_the_comment_says():
    space = yaml.safe_load(examples("docs/launcher.md", "yaml")[1])
    check_space(space)
    tuner = TpeTuner(seed=0)
    tuner.update_search_space(space)
    proposed = [tuner.generate_parameters(number) for number in range(60)]
    values = {key: [parameters[key] for parameters in proposed] for key in space}
    assert set(values["batch_size"]) == {16, 32, 64}
    assert set(values["layers"]) == {1, 2, 3, 4}
    assert all(0.5 <= value <= 0.95 for value in values["momentum"])
    assert all(sum(low <= lr < 10 * low for lr in values["lr"]) > 15 for low in (0.001, 0.01))
    assert {round(value, 6) for value in values["dropout"]} == {0, 0.1, 0.2, 0.3, 0.4, 0.5}
    assert {type(value) for value in values["dropout"]} == {float}
    assert all(0.1 <= value <= 10 and round(value * 10, 6) % 1 == 0 for value in values["decay"])
    assert min(values["shift"]) < 0 < max(values["shift"])
    assert {value["_name"] for value in values["head"]} == {"linear", "mlp"}
    assert all(8 <= value["width"] <= 64 for value in values["head"] if "width" in value)


@pytest.mark.parametrize("proposed", [{"batch-size": 16}, {"batch_size": 16.0}])
def test_the_example_refuses_a_key_that_it_does_not_read_and_a_float_for_an_integer(
    proposed, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["trial.py"])
    monkeypatch.setattr(nni, "get_next_parameter", lambda: proposed)
    with pytest.raises((ValueError, TypeError), match=r"batch.size"):
        exec(examples("docs/launcher.md", "python")[0], {})


def test_a_script_that_starts_a_search_writes_its_configuration(tmp_path):
    code = examples("docs/launcher.md", "python")[1]
    (tmp_path / "trial.py").touch()
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    config, lines = configuration.load(tmp_path / "config.json")
    assert lines == checks.check(config) == []
    assert config.trial_command == "python3 trial.py"
    assert config.trial_code_directory == str(tmp_path)
    assert (config.trial_concurrency, config.max_trial_number) == (2, 4)
    assert config.tuner.class_args == {"optimize_mode": "minimize"}
