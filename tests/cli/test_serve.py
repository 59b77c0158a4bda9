"""The options of `sparse-context serve`, each in the setting that it is for."""

import dataclasses

import pytest

from sparse_context.server import run
from sparse_context.server.settings import Settings


@pytest.fixture
def served(command, monkeypatch):
    """Run `serve` up to where it would listen: its engine, its settings by name, and its port."""
    seen = []
    monkeypatch.setattr(run, "run", lambda *arguments: seen.append(arguments))

    def serve(*arguments):
        code, _, err = command("serve", *arguments)
        assert code == 0, err
        engine, settings, port = seen.pop()
        return engine, {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}, port

    return serve


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--served-model-name mine", {"name": "mine"}),
        ("--keep-high 0.75", {"keep_high": 0.75}),
        ("--keep-high 400", {"keep_high": 400}),
        ("--queue 3", {"queue": 3}),
        ("--deadline 7.5", {"deadline": 7.5}),
        ("--batch 2", {"batch": 2}),
        ("--max-body 3", {"body": 3 * 2**20}),
        ("--max-references 2", {"references": 2}),
        ("--max-megapixels 0.5", {"pixels": 500_000}),
        ("--max-output-megapixels 1.5", {"output_pixels": 1_500_000}),
    ],
)
def test_an_option_reaches_its_own_setting_and_no_other(served, options, expected):
    _, plain, _ = served()
    _, settings, _ = served(*options.split())
    assert {name: value for name, value in settings.items() if value != plain[name]} == expected


def test_defaults_are_those_of_the_settings_but_for_the_name(served):
    engine, settings, port = served()
    name = "sparse-context-embedded"
    assert settings == dataclasses.asdict(Settings(name)) | {
        "config": Settings(name).config,
        "output_pixels": 4_200_000,
    }
    assert port == 8000 and engine.cache.max_bytes == 256 * 2**20


def test_the_cache_has_the_size_that_is_asked_for_or_there_is_none(served):
    assert served("--cache", "3")[0].cache.max_bytes == 3 * 2**20
    assert served("--cache", "0")[0].cache is None


def test_a_key_is_that_of_the_file(served, tmp_path):
    (tmp_path / "key").write_text("0123456789abcdef\n")
    assert served("--api-key-file", tmp_path / "key")[1]["api_key"] == "0123456789abcdef"
