"""The rules for Inductor: every one is in force while the mode compiles, and one that lapses is an error."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from pytest_batchinv.patches import registry, rules
from pytest_batchinv.patches.registry import Version, torch_version
from pytest_batchinv.patches.rules import Rule, RuleError

from pytest_batchinv import batch_invariant_mode


def value_of(rule: Rule):
    value = import_module(rule.module)
    for part in rule.name.split("."):
        value = getattr(value, part)
    return value


def test_this_torch_has_exactly_the_settings_that_the_rules_say():
    rules.check(torch_version())
    assert sum(rule.exists_in(torch_version()) for rule in rules.RULES) >= 16


def test_every_rule_is_in_force_in_a_compilation_and_none_outside():
    here = [rule for rule in rules.RULES if rule.exists_in(torch_version())]
    before = [value_of(rule) for rule in here]
    seen = []

    class UsersPass(torch._inductor.custom_graph_pass.CustomGraphPass):
        def __call__(self, graph):
            seen.append([value_of(rule) for rule in here])

        def uuid(self):
            return "what-is-in-force"

    with torch._inductor.config.patch(post_grad_custom_post_pass=UsersPass(), force_disable_caches=True):
        with batch_invariant_mode():
            torch.compile(lambda x: (x + 1).mean(-1))(torch.rand(3, 41))
            assert [value_of(rule) for rule in here] == before
    assert seen == [[rule.value for rule in here]]
    assert [value_of(rule) for rule in here] == before


@pytest.mark.parametrize(
    "planted, sentence",
    [
        (Rule("renamed_by_torch", True, "a test"), "has no setting renamed_by_torch, but the rule for it says every version"),
        (Rule("triton.gone", True, "a test", torch=">=2.11"), "has no setting triton.gone, but the rule for it says >=2.11"),
        (Rule("split_reductions", False, "a test", torch=">=99"), "has a setting split_reductions, but the rule .* >=99"),
    ],
)
def test_a_rule_whose_setting_is_not_where_it_should_be_is_an_error(monkeypatch, planted, sentence):
    monkeypatch.setattr(rules, "RULES", (*rules.RULES, planted))
    with pytest.raises(RuleError, match=sentence), batch_invariant_mode():
        pass


def test_a_rule_is_for_the_versions_of_its_range():
    rule = Rule("x", True, "a test", torch=">=2.13")
    assert [rule.exists_in(Version(v)) for v in ("2.11.0+cu130", "2.13.0+cpu", "2.15.0")] == [False, True, True]


def test_each_rule_has_a_name_of_its_own_and_a_reason():
    assert len({rule.name for rule in rules.RULES}) == len(rules.RULES)
    assert all(len(rule.reason) > 10 for rule in rules.RULES)


def test_the_command_prints_every_patch_every_rule_and_who_holds_entries():
    done = subprocess.run([sys.executable, "-P", "-m", "pytest_batchinv.patches"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for row in registry.status():
        assert re.search(rf"^  {row.name}: {row.state}$", done.stdout, re.MULTILINE)
    for rule in rules.RULES:
        expected = re.escape(repr(rule.value)) if rule.exists_in(torch_version()) else "not there"
        assert re.search(rf"^  {re.escape(rule.name)}: {expected}$", done.stdout, re.MULTILINE)
    assert "dispatcher entries of the table that others hold" in done.stdout


def test_the_docs_list_every_rule_and_every_patch_as_they_are():
    text = (Path(__file__).parents[2] / "docs" / "patches.md").read_text()
    for rule in rules.RULES:
        assert f"| `{rule.name}` | `{rule.value!r}` | {rule.torch or 'all'} | {rule.reason} |" in text
    for name, reason in rules.LEFT_ALONE.items():
        assert f"* {name}: {reason}." in text
    for row in registry.status():
        assert f"| `{row.name}`" in text
