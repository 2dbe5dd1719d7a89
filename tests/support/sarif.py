"""What SARIF's own schema says of a log, and what GitHub asks beyond it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema

# The OASIS committee's schema, as the npm package @microsoft/jest-sarif 1.0.0-beta.0 carries it.
SCHEMA = json.loads(Path(__file__).with_name("sarif-2.1.0-rtm.5.schema.json").read_text())
VALIDATOR = jsonschema.Draft4Validator(SCHEMA)
LEVELS = {"error", "warning", "note"}


def checked(text):
    """The log's run, after everything that the standard and GitHub say of any log was checked."""
    log = json.loads(text)
    VALIDATOR.validate(log)
    (run,) = log["runs"]
    driver = run["tool"]["driver"]
    rules = driver["rules"]
    assert log["version"] == "2.1.0"
    for descriptor in (*rules, *driver["notifications"]):
        assert re.fullmatch(r"[A-Z][A-Za-z]+", descriptor["name"])
        assert 0 < len(descriptor["shortDescription"]["text"]) <= 1024
        assert 0 < len(descriptor["fullDescription"]["text"]) <= 1024
        assert descriptor["help"]["text"]
        assert descriptor["properties"]["precision"] in ("very-high", "high", "medium", "low")
        assert descriptor["properties"]["problem.severity"] in ("error", "warning", "recommendation")
        assert len(descriptor["properties"]["tags"]) <= 20
    assert len({rule["id"] for rule in rules}) == len(rules)
    hashes = []
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in LEVELS
        assert result["message"]["text"].endswith(".")
        (location,) = result["locations"]
        place = location["physicalLocation"]
        uri = place["artifactLocation"]["uri"]
        assert run["artifacts"][place["artifactLocation"]["index"]]["location"]["uri"] == uri
        assert re.fullmatch(r"(?:[A-Za-z0-9._~/-]|%[0-9A-F]{2})+", uri), "RFC 3986, with no scheme"
        assert not uri.startswith("/")
        assert ".." not in uri.split("/")
        assert place["region"]["startLine"] >= 1
        (module,) = location["logicalLocations"]
        assert module["fullyQualifiedName"].endswith(module["name"])
        hashes.append(result["partialFingerprints"]["primaryLocationLineHash"])
        assert re.fullmatch(r"[0-9a-f]{16}:1", hashes[-1])
    assert len(set(hashes)) == len(hashes), "GitHub would take them for one"
    (invocation,) = run["invocations"]
    assert invocation["executionSuccessful"] == (invocation["exitCode"] < 2)
    known = {notice["id"] for notice in driver["notifications"]}
    assert {notice["descriptor"]["id"] for notice in invocation.get("toolExecutionNotifications", ())} <= known
    return run
