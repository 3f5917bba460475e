from __future__ import annotations

import inspect
import pickle
from pathlib import Path

import pytest

from lading import errors
from lading.errors import LadingError

INSTANCES = [
    errors.AssetNotFoundError("a"),
    errors.ModelNotKnownError("a", " Did you mean 'b'?"),
    errors.ModelArchitectureNotKnownError("7b", "llama"),
    errors.ModelFamilyNotKnownError("f"),
    errors.NotSupportedError("m"),
    errors.SettingsError("m"),
    errors.QueryError("m"),
    errors.AssetCardError("card", "m"),
    errors.CardFileError(["one", "two"]),
    errors.ModelConfigError("qwen", "`num_layers` must be positive, but is -1"),
    errors.ModelCheckpointError(Path("/x"), "m"),
    errors.CheckpointNotFoundError(Path("/x"), "m"),
    errors.CorruptModelCheckpointError(Path("/x"), "m"),
    errors.ModelCheckpointMismatchError(Path("/x"), "m", ["missing: w"]),
    errors.DigestMismatchError(Path("/x"), "m", expected="a", found="b"),
    errors.FetchError("m"),
    errors.AddressError("m"),
    errors.CatalogError("m"),
    errors.CatalogOutdatedError("m", expected=2, found=1),
    errors.PolicyError("m"),
    errors.RefusedPickleError(Path("/x"), "m"),
    errors.ModelGatedError("a", "https://example.com"),
    errors.GangError("m", (1, 2)),
    errors.InternalError("m"),
    errors.TorchNotFoundError("m"),
]


def _all_errors() -> set[type[LadingError]]:
    return {c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, LadingError)}


def test_every_error_is_tried_here() -> None:
    assert {type(e) for e in INSTANCES} == _all_errors() - {LadingError}


@pytest.mark.parametrize("error", INSTANCES, ids=lambda e: type(e).__name__)
def test_errors_travel_between_ranks(error: LadingError) -> None:
    there = pickle.loads(pickle.dumps(error))
    assert type(there) is type(error)
    assert str(there) == str(error)
    assert there.__dict__ == error.__dict__


@pytest.mark.parametrize("error", INSTANCES, ids=lambda e: type(e).__name__)
def test_the_tree_in_the_docstring_is_the_tree(error: LadingError) -> None:
    line = next(line for line in (errors.__doc__ or "").splitlines() if f" {type(error).__name__} " in line)
    assert line.split(type(error).__name__)[1].split()[0] == str(error.exit_code)


def test_a_missing_checkpoint_is_a_missing_file() -> None:
    error = errors.CheckpointNotFoundError(Path("/x"), "No checkpoint is at /x")
    assert isinstance(error, FileNotFoundError)
    assert str(error) == "No checkpoint is at /x"


def test_a_refused_pickle_is_a_refusal_and_a_checkpoint_that_cannot_be_used() -> None:
    error = errors.RefusedPickleError(Path("/x"), "m")
    assert isinstance(error, errors.PolicyError)
    assert isinstance(error, errors.ModelCheckpointError)
    assert (error.path, error.exit_code) == (Path("/x"), 7)


@pytest.mark.parametrize("error", [errors.CorruptModelCheckpointError, errors.CheckpointNotFoundError])
def test_no_message_steers_a_terminal(error: type[errors.ModelCheckpointError]) -> None:
    found = error(Path("/x"), "tensor \x1b]0;title\x07\u202e\x9b31m\udc80:\nexpected 日本 naïve")
    expected = "tensor \\x1b]0;title\\x07\\u202e\\x9b31m\\udc80:\nexpected 日本 naïve"
    assert str(found) == found.message == str(pickle.loads(pickle.dumps(found))) == expected


def test_near_names_are_suggested() -> None:
    assert "'qwen3_0.6b'" in errors.did_you_mean("qwen3_06b", ["qwen3_0.6b", "llama"])
    assert errors.did_you_mean("zzz", ["qwen3_0.6b"]) == ""
