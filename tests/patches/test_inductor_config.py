"""Inductor's settings: every one is in force while the mode compiles, and one that lapses is an error."""

import re
import subprocess
import sys
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import pytest
import torch

from pytest_batchinv import batch_invariant_mode
from pytest_batchinv.patches import inductor_config, registry
from pytest_batchinv.patches.inductor_config import Setting, SettingError
from pytest_batchinv.patches.registry import Version, torch_version


def value_of(setting: Setting):
    return attrgetter(setting.name)(import_module(setting.module))


def test_this_torch_has_exactly_the_settings_that_the_list_says():
    inductor_config.check(torch_version())
    assert sum(setting.exists_in(torch_version()) for setting in inductor_config.SETTINGS) >= 16


def test_every_setting_is_in_force_in_a_compilation_and_none_outside():
    here = [setting for setting in inductor_config.SETTINGS if setting.exists_in(torch_version())]
    before = [value_of(setting) for setting in here]
    seen = []

    class UsersPass(torch._inductor.custom_graph_pass.CustomGraphPass):
        def __call__(self, graph):
            seen.append([value_of(setting) for setting in here])

        def uuid(self):
            return "what-is-in-force"

    with torch._inductor.config.patch(post_grad_custom_post_pass=UsersPass(), force_disable_caches=True):
        with batch_invariant_mode():
            torch.compile(lambda x: (x + 1).mean(-1))(torch.rand(3, 41))
            assert [value_of(setting) for setting in here] == before
    assert seen == [[setting.value for setting in here]]
    assert [value_of(setting) for setting in here] == before


@pytest.mark.parametrize(
    "planted, sentence",
    [
        (Setting("renamed_by_torch", True, "a test"), "has no setting renamed_by_torch, but .* says every version has it"),
        (Setting("triton.gone", True, "a test", torch=">=2.11"), "has no setting triton.gone, but .* says >=2.11"),
        (Setting("split_reductions", False, "a test", torch=">=99"), "has a setting split_reductions, but .* says >=99"),
    ],
)
def test_a_setting_that_is_not_where_it_should_be_is_an_error(monkeypatch, planted, sentence):
    monkeypatch.setattr(inductor_config, "SETTINGS", (*inductor_config.SETTINGS, planted))
    with pytest.raises(SettingError, match=sentence), batch_invariant_mode():
        pass


def test_a_setting_is_for_the_versions_of_its_range():
    setting = Setting("x", True, "a test", torch=">=2.13")
    assert [setting.exists_in(Version(v)) for v in ("2.11.0+cu130", "2.13.0+cpu", "2.15.0")] == [False, True, True]


def test_the_command_prints_every_patch_every_setting_and_who_holds_entries():
    done = subprocess.run([sys.executable, "-P", "-m", "pytest_batchinv.patches"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for row in registry.status():
        assert re.search(rf"^  {row.name}: {row.state}$", done.stdout, re.MULTILINE)
    for setting in inductor_config.SETTINGS:
        expected = re.escape(repr(setting.value)) if setting.exists_in(torch_version()) else "not there"
        assert re.search(rf"^  {re.escape(setting.name)}: {expected}$", done.stdout, re.MULTILINE)
    assert "dispatcher entries of the table that others hold" in done.stdout


def test_the_docs_list_every_setting_and_every_patch_as_they_are():
    text = (Path(__file__).parents[2] / "docs" / "patches.md").read_text()
    for setting in inductor_config.SETTINGS:
        assert f"| `{setting.name}` | `{setting.value!r}` | {setting.torch or 'all'} | {setting.reason} |" in text
    for row in registry.status():
        assert f"| `{row.name}`" in text
