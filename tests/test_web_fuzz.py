"""Requests made from the API's own schema: every answer is one that the schema tells of, and never a 5xx."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from dsd.web import ServeConfig, create_app

schemathesis = pytest.importorskip("schemathesis")

from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
]

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Lengths:
    """A matcher without a model: the schema is fuzzed here, not the denoiser."""

    config: dict[str, Any] = {"model": "lengths", "size": 16}  # noqa: RUF012

    def predict(self, pairs: Any, *, progress: bool = False) -> np.ndarray:
        return np.array([len(text) for _, text in pairs], np.float32)

    def score(self, images: Any, texts: Any) -> Any:
        raise NotImplementedError


APP = create_app(Lengths(), ServeConfig(max_body=2**20, hosts=("127.0.0.1", "localhost", "testserver")))
schema = schemathesis.openapi.from_asgi("/v1/openapi.json", APP)


@schema.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_no_request_is_a_fault(case: Any) -> None:
    answer = case.call()
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error["code"]
        assert error["message"]
    # that data which the schema allows is refused (no image, no words) is no fault
    case.validate_response(answer, checks=CHECKS)
