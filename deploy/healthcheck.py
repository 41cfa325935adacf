"""The container's health check: exit code 0 if `/health` answers 200 on the port that the server listens on."""

from __future__ import annotations

import os
import ssl
import sys
import urllib.error
import urllib.request


def healthy(port: str, *, tls: bool) -> bool:
    """Whether the server in this container is alive. Its certificate is not checked: this is the loopback."""
    context = ssl.create_default_context() if tls else None
    if context is not None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    url = f"{'https' if tls else 'http'}://127.0.0.1:{port}/health"
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), *([urllib.request.HTTPSHandler(context=context)] if context else [])
    )
    try:
        with opener.open(url, timeout=4) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    sys.exit(not healthy(os.environ.get("ENTRGI_PORT", "8000"), tls="ENTRGI_SSL_CERTFILE" in os.environ))
