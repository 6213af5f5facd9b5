"""The OpenAPI document is accurate: requests that it allows get the responses it describes."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engines import running
from hypothesis import HealthCheck, given, settings
from serving_http import client_of, fake_service

from moefit.cli.serve import FollowSettings
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model
from moefit.serve.model import ServedModel
from moefit.server.app import create_app
from moefit.server.middleware import ServerSettings
from moefit.server.service import Service

HERE = {"Host": "localhost"}
OPERATIONS = {
    "/v1/completions": {"post"}, "/v1/chat/completions": {"post"}, "/v1/models": {"get"},
    "/v1/models/{name}": {"get"}, "/tokenize": {"post"}, "/detokenize": {"post"},
    "/tokenizer_info": {"get"}, "/health": {"get"}, "/version": {"get"}, "/metrics": {"get"},
    "/v1/memory": {"get", "post"}, "/v1/requests": {"get"}, "/v1/requests/cancel": {"post"},
    "/v1/responses": {"post"},
}  # fmt: skip


def test_openapi_lists_every_endpoint(served) -> None:
    with fake_service(served) as (service, _), client_of(service) as client:
        document = client.get("/openapi.json").json()
    assert {path: set(methods) for path, methods in document["paths"].items()} == OPERATIONS
    for methods in document["paths"].values():
        for operation in methods.values():
            assert "422" not in operation["responses"]
            shape = operation["responses"]["400"]["content"]["application/json"]["schema"]
            assert shape == {"$ref": "#/components/schemas/ErrorBody"}


@contextmanager
def over_a_stand_in(served: ServedModel, _: Path) -> Iterator[Service]:
    with fake_service(served, answers=4) as (service, engine):
        engine.max_model_len = 64
        yield service


@contextmanager
def over_the_engine(served: ServedModel, _: Path) -> Iterator[Service]:
    served.set_memory("4GiB")
    with running(served, max_model_len=64, max_concurrency=3) as engine:
        service = Service(engine, ServerSettings(name="reference", answers=4))
        yield service
        service.close()
    assert not engine.stats().running
    served.check()


TEMPLATE = (
    "{%- if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{{ m.content or '' }}{% endfor %}<assistant>{# <tool_call> #}"
)


@contextmanager
def with_everything_on(served: ServedModel, tmp_path: Path) -> Iterator[Service]:
    """A chat template with tools, drafts, kept prefixes, a growing cache, a budget that follows."""
    folder = tmp_path / "model"
    shutil.copytree(served.folder, folder)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": TEMPLATE}))
    on = {
        "speculate": "ngram", "prefix_cache": "on", "prefix_folder": tmp_path / "prefixes",
        "prefix_disk_bytes": 16 << 20, "max_concurrency": 3, "max_model_len": 160,
    }  # fmt: skip
    loading = LoadSettings(context=128, step_tokens=144, memory="4GiB")
    with load_model(folder, loading) as loaded, running(loaded, **on) as engine:
        service = Service(engine, ServerSettings(name="reference", answers=4))
        follow = FollowSettings(follows=False, least=None, most=None, headroom=1 << 20)
        service.follower = follow.follower(service)
        try:
            yield service
        finally:
            service.follower.close()
            service.close()
        assert not engine.stats().running
        loaded.check()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["positive", "negative"])  # what the document allows, or not
@pytest.mark.parametrize("over", [over_a_stand_in, over_the_engine, with_everything_on])
def test_responses_match_openapi(served, over, mode: str, tmp_path) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    found = pytest.importorskip("schemathesis.specs.openapi.checks")
    # Some values can be refused only for what they mean here: a prompt that does not fit, say. And
    # unknown fields that are null count as absent.
    excluded = [found.positive_data_acceptance, found.negative_data_rejection]
    wanted = schemathesis.GenerationMode(mode)
    with over(served, tmp_path) as service:
        schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(service), headers=HERE)
        operations = [one.ok() for one in schema.get_all_operations()]
        assert {one.path for one in operations} == OPERATIONS.keys()
        for operation in operations:
            if mode == "negative" and operation.method == "get":
                continue  # nothing is sent that could be wrong

            @given(case=operation.as_strategy(wanted))
            @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
            def ask(case: Any) -> None:
                case.call_and_validate(headers=HERE, excluded_checks=excluded, timeout=600)

            ask()
