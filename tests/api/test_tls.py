"""TLS on a real socket, with a certificate made for the test."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx
import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from server.settings import SettingsError, load
from tests.api.scripted_engine import serving


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def files(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A certificate for localhost and its key, plain and encrypted."""
    folder = tmp_path_factory.mktemp("tls")
    issued = authority.issue_cert("localhost", "127.0.0.1")
    certificate, key, encrypted = folder / "cert.pem", folder / "key.pem", folder / "encrypted.pem"
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    private = load_pem_private_key(issued.private_key_pem.bytes(), None)
    encrypted.write_bytes(
        private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"open sesame"))
    )
    return {"certificate": str(certificate), "key": str(key), "encrypted": str(encrypted)}


async def test_requests_over_tls(authority: trustme.CA, files: dict[str, str]) -> None:
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with serving(ssl_certfile=files["certificate"], ssl_keyfile=files["key"]) as port:
        async with httpx.AsyncClient(verify=trusting, base_url=f"https://localhost:{port}", timeout=60) as client:
            assert (await client.get("/health")).json() == {"status": "ok"}
            answer = await client.post("/v1/completions", json={"prompt": "Hi"})
            assert answer.json()["choices"][0]["text"] == "Hi"
            streamed = await client.post("/v1/completions", json={"prompt": "Hi", "stream": True})
            assert streamed.text.endswith("data: [DONE]\n\n")
        async with httpx.AsyncClient(base_url=f"https://localhost:{port}", timeout=60) as stranger:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await stranger.get("/health")
        async with httpx.AsyncClient(base_url=f"http://localhost:{port}", timeout=60) as plain:
            with pytest.raises(httpx.TransportError):
                await plain.get("/health")


def test_tls_settings_that_cannot_work_are_refused(files: dict[str, str], tmp_path: Path) -> None:
    good = {"ssl_certfile": files["certificate"], "ssl_keyfile": files["key"]}
    assert load(good).ssl_keyfile == files["key"]
    other = tmp_path / "other.pem"
    other.write_bytes(trustme.CA().issue_cert("localhost").private_key_pem.bytes())
    for wrong, key in (
        ({"ssl_keyfile": None}, "ssl_certfile"),
        ({"ssl_certfile": str(tmp_path / "absent.pem")}, "ssl_certfile"),
        ({"ssl_keyfile": str(other)}, "ssl_certfile"),
        ({"ssl_keyfile": files["encrypted"]}, "ssl_certfile"),
    ):
        with pytest.raises(SettingsError, match=rf"^{key}\b"):
            load({**good, **wrong})
