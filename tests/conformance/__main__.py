"""`python -m tests.conformance [CLIENT ...]`: the conformance matrix (`make conformance`).

Each client is a folder here: `check.py`, and the pinned `requirements.txt` of its own environment, or `check.mjs` and
the `package-lock.json` of one for Node.js. The server runs
the bundled models behind an API key; clients that generate requests by the thousand get one with tighter limits. Exit
status 0 when every client passed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen

import httpx
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from demo import bundled_model_path
from tests.conformance.matrix import Row, line, markdown
from tests.support.serving import ROOT, served

FOLDER = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "conformance"
PAGE = ROOT / "docs" / "conformance.md"
INSTALL_SECONDS = 1800


@dataclass(frozen=True)
class Client:
    """A folder of checks, the seconds it may take, and flags of the server it wants, in which `{out}` is the folder for
    what it leaves."""

    name: str
    seconds: float = 600
    flags: tuple[str, ...] = ()


# Schemathesis sends thousands of requests with the largest values that the document allows: the limits bound the work
# of each, and the document shows them, so no route has to be left out.
SMALL = ("--max-model-len", "128", "--max-trajectories", "4", "--max-score-pairs", "8")
CLIENTS = (
    Client("openai", flags=("--batch-dir", "{out}")),
    Client("langchain"),
    Client("litellm"),
    Client("vercel"),
    Client("cohere"),
    Client("lm_eval", 900),
    Client("guidellm", 900),
    Client("trl", 900),
    Client("schemathesis", 1800, SMALL),
    Client("golden", 1200),
)


def main() -> int:
    """Run the clients named, or all; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("client", nargs="*", help=f"of {', '.join(client.name for client in CLIENTS)}; none: all")
    names = parser.parse_args().client
    clients = [client for client in CLIENTS if not names or client.name in names]
    if unknown := set(names) - {client.name for client in clients}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows: list[Row] = []
    with Progress(*columns) as progress:
        for client in clients:
            task = progress.add_task(client.name, total=None)

            def tell(row: Row, task: TaskID = task) -> None:
                progress.update(task, total=row.expected or None, completed=len(row.checks))

            rows.append(outcome(client, tell))
            progress.stop_task(task)
            progress.console.print(f"{client.name} {rows[-1].version}: {rows[-1].result}, {rows[-1].seconds:.0f} s")
            for failure in rows[-1].failures:
                progress.console.print(f"  {failure}", markup=False, soft_wrap=True)
    print(line(rows))
    if not names:
        PAGE.write_text(markdown(rows), "utf-8")
    return 0 if all(row.passed for row in rows) else 1


def outcome(client: Client, tell: Callable[[Row], None]) -> Row:
    """Run one client against a server of its own. Whatever goes wrong is written into the row."""
    row = Row(client.name)
    out = BUILD / "out" / client.name
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        command = command_of(client.name, out / "install.log")
        key = secrets.token_hex(16)
        if command[0] == sys.executable:
            _run(client, command, out, row, tell, {})
        else:
            flags = [flag.format(out=out) for flag in client.flags]
            with served("--api-key", key, *flags, log=out / "server.log") as server:
                _run(client, command, out, row, tell, facts(server.url, key))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        row.trouble = f"{type(error).__name__}: {error}"
    row.seconds = round(time.monotonic() - started, 1)
    return row


def command_of(client: str, log: Path) -> list[str]:
    """What runs a client's checks in its environment below `build/conformance`, made if what it needs has changed; the
    installer's output goes to `log`. A client that needs nothing runs in ours. Raises CalledProcessError,
    TimeoutExpired, and FileNotFoundError without Node.js."""
    own, folder = FOLDER / client, BUILD / "environments" / client
    python, stamp = folder / "bin" / "python", folder / "installed"
    pinned = next((own / name for name in ("requirements.txt", "package-lock.json") if (own / name).exists()), None)
    if pinned is None:
        return [sys.executable, str(own / "check.py")]
    if pinned.suffix == ".json":  # Node.js looks for packages in the folders above a program
        installs = [["npm", "ci", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund"]]
        command = ["node", str(folder / "check.mjs")]
        shutil.copytree(own, folder, dirs_exist_ok=True)
    else:
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        installs = [[sys.executable, "-m", "venv", "--clear", str(folder)], [*pip, "-r", str(pinned)]]
        command = [str(python), str(own / "check.py")]
    wanted = hashlib.sha256(pinned.read_bytes() + sys.version.encode()).hexdigest()
    if not stamp.exists() or stamp.read_text("utf-8") != wanted:
        stamp.unlink(missing_ok=True)
        with log.open("ab") as output:
            for install in installs:
                subprocess.run(install, check=True, stdout=output, stderr=output, timeout=INSTALL_SECONDS)
        stamp.write_text(wanted, "utf-8")
    return command


def facts(url: str, key: str) -> dict[str, str]:
    """What a client must know of the server, as environment variables (`shared/checks.py`)."""
    answer = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}, timeout=30).raise_for_status()
    models = {model["type"]: model["id"] for model in reversed(answer.json()["data"])}
    return {
        "CONFORMANCE_URL": url,
        "CONFORMANCE_KEY": key,
        "CONFORMANCE_MODEL": models["diffusion"],
        "CONFORMANCE_REWARD": models["reward"],
        "CONFORMANCE_TOKENIZER": str(bundled_model_path()),
    }


def _run(
    client: Client, command: list[str], out: Path, row: Row, tell: Callable[[Row], None], server: dict[str, str]
) -> None:
    # Only what the checks share is on the path: our own packages must not meet a client's. A client without an
    # environment of its own is ours.
    paths = [FOLDER / "shared"] if server else [FOLDER / "shared", ROOT]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("ENTRGI_", "PYTHON"))},
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(BUILD / "hf"),
        **server,
        "CONFORMANCE_OUT": str(out),
    }
    with (
        (out / "log").open("wb") as log,
        Popen(command, env=environment, cwd=out, stdout=PIPE, stderr=log, start_new_session=True) as process,
    ):

        def end(trouble: str | None = None) -> None:
            row.trouble = trouble
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(client.seconds, end, [f"not done within {client.seconds:g} s"])
        timer.start()
        try:
            for said in process.stdout or ():
                _hear(said, row)
                tell(row)
        except BaseException:  # a keyboard interrupt does not reach the client's process group
            end()
            raise
        finally:
            timer.cancel()
    if process.returncode and not row.failures:
        row.trouble = f"exit status {process.returncode}; see {(out / 'log').relative_to(ROOT)}"


def _hear(said: bytes, row: Row) -> None:
    """Take one line of a client's; what is not ours is the client library's own talk."""
    with contextlib.suppress(ValueError):
        data = json.loads(said)
        if isinstance(data, dict):
            row.version = data.get("version", row.version)
            row.expected = data.get("checks", row.expected)
            row.checks += [data] if "check" in data else []


if __name__ == "__main__":
    raise SystemExit(main())
