"""The OpenAPI document is complete."""

from __future__ import annotations

import json
import re

from tests.api.scripted_engine import make, open_client


async def test_openapi_is_complete() -> None:
    app = make()
    document = app.openapi()
    text = json.dumps(document)
    for reference in re.findall(r'"\$ref": "#/components/schemas/([^"]+)"', text):
        assert reference in document["components"]["schemas"]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert "422" not in operation["responses"], path
            assert ("requestBody" in operation) == (method == "post")
            for status, response in operation["responses"].items():
                if status != "200":
                    schema = response["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/ErrorEnvelope"}
    assert "text/event-stream" in document["paths"]["/v1/completions"]["post"]["responses"]["200"]["content"]
    async with open_client(app) as client:
        assert (await client.get("/openapi.json")).json() == document
        for path in ("/docs", "/redoc"):  # both would load scripts from elsewhere
            assert (await client.get(path)).status_code == 404
