"""A server as a process: new versions under load, signals, addresses, and how it ends."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
import server_process
import yaml
from fake_model import publish, served
from places import REPO
from server_process import until

from s2s_serve.errors import UserError
from s2s_serve.server import openapi
from s2s_serve.server.command import parse
from s2s_serve.server.settings import Settings, token_for

BODY = {"histories": [{"item_id": [120]}, {"item_id": [130]}], "k": 3}


# ------------------------------------------------------------------------------- new versions


def test_no_request_is_lost_or_mixed_while_versions_change(tmp_path):
    publish(tmp_path, 1)
    versions = []

    async def ask(client, until_version):
        while not versions or versions[-1] < until_version:
            answer = (await client.post("/v1/recommend", json=BODY)).raise_for_status().json()
            versions.append(answer["version"])
            # The scores of the fake model tell which version made them.
            for result in answer["results"]:
                assert result["scores"] == [answer["version"] + 1 / (2 + n) for n in range(3)]

    async def load(address):
        async with httpx.AsyncClient(base_url=address, timeout=20) as client:
            callers = [asyncio.create_task(ask(client, 5)) for _ in range(8)]
            for version in (2, 3, 4, 5):
                await asyncio.sleep(0.25)
                publish(tmp_path, version)
            await asyncio.gather(*callers)

    with server_process.process(tmp_path, "poll=0.05", seconds=0.002) as (_, address):
        asyncio.run(load(address))
        metrics = httpx.get(f"{address}/metrics").text
    assert set(versions) == {1, 2, 3, 4, 5}
    assert len(versions) > 40
    assert (
        f's2s_serve_requests_total{{route="/v1/recommend",status="200"}} {len(versions)}' in metrics
    )
    assert 's2s_serve_reloads_total{result="loaded"} 5' in metrics


def test_a_broken_version_keeps_the_old_one_and_is_told(tmp_path, capsys):
    publish(tmp_path, 1)
    with server_process.app(tmp_path) as app:
        publish(tmp_path, 901)
        until(lambda: app.versions.failure)
        sentence = f"{tmp_path}/versions/901/manifest.json: expected 1 file, found none"
        assert app.ask("GET", "/readyz").json() == {
            "ready": True,
            "version": 1,
            "failure": sentence,
        }
        assert app.ask("POST", "/v1/recommend", json=BODY).json()["version"] == 1
        assert 's2s_serve_reloads_total{result="failed"} 1' in app.ask("GET", "/metrics").text
        (tmp_path / "current.json").write_text("no")
        until(lambda: "current.json" in (app.versions.failure or ""))
        # An older version is a change, too: somebody went back.
        publish(tmp_path, 3)
        until(lambda: app.model.version == 3)
        publish(tmp_path, 2)
        until(lambda: app.model.version == 2)
        assert app.versions.failure is None
    told = capsys.readouterr().err.splitlines()
    assert told[0] == f"the newest version cannot be loaded, version 1 still answers: {sentence}"
    assert "current.json" in told[1]
    assert re.fullmatch(r"version 3 answers now, instead of 1; loaded in \d+\.\d s", told[2])
    assert len(told) == 4


def test_an_export_that_was_made_again_is_loaded(tmp_path, capsys):
    """Its version has the number of the one that was removed."""

    def make(text):
        version = tmp_path / "export/versions/1"
        version.mkdir(parents=True)
        (version / "manifest.json").write_text(text)
        publish(tmp_path / "export", 1)

    loads = []

    def counted(directory):
        loads.append((directory / "versions/1/manifest.json").read_text())
        return served()

    make("one")
    with server_process.app(tmp_path / "export", load=counted) as app:
        shutil.rmtree(tmp_path / "export")
        until(lambda: app.versions.failure)
        make("two")
        until(lambda: loads == ["one", "two"])
        until(lambda: app.versions.failure is None)
        # The same version, whose number was written once more.
        publish(tmp_path / "export", 1)
        time.sleep(0.1)
        assert loads == ["one", "two"]
    told = capsys.readouterr().err.splitlines()
    assert any(line.startswith("version 1 answers now, which was made again; ") for line in told)


def test_a_version_that_is_no_number_is_told_and_never_loaded(tmp_path):
    publish(tmp_path, 1)
    loads = []

    def counted(directory):
        loads.append(directory)
        return served()

    with server_process.app(tmp_path, load=counted) as app:
        publish(tmp_path, "1")
        until(lambda: app.versions.failure or len(loads) > 1)
        assert "current.json: expected a version of at least 1, found '1'" in app.versions.failure
    assert len(loads) == 1


def test_requests_before_the_first_version_are_told_to_wait(tmp_path):
    app = server_process.App(tmp_path)
    try:
        answer = app.ask("GET", "/readyz")
        assert (answer.status_code, answer.json()["ready"]) == (503, False)
        assert app.ask("GET", "/healthz").status_code == 200
        answer = app.ask("POST", "/v1/recommend", json=BODY)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
    finally:
        app.end()


# ------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_requests_in_flight(tmp_path, number):
    publish(tmp_path, 1)

    async def ask(process, address):
        async with httpx.AsyncClient(base_url=address, timeout=20) as client:
            # Other rules, so that each is a call of its own: the last one waits for three others.
            bodies = [{**BODY, "k": k} for k in (1, 2, 3, 4)]
            asked = [asyncio.create_task(client.post("/v1/recommend", json=b)) for b in bodies]
            while "waiting_requests 3" not in (await client.get("/metrics")).text:
                await asyncio.sleep(0.01)
            process.send_signal(number)
            answers = await asyncio.gather(*asked)
            assert [len(a.json()["results"][1]["items"]) for a in answers] == [1, 2, 3, 4]
        with pytest.raises(httpx.ConnectError):
            await httpx.AsyncClient().get(address)

    with server_process.process(tmp_path, seconds=0.3) as (process, address):
        asyncio.run(ask(process, address))
        assert process.wait(20) == 0
        assert process.stderr.read() == ""


def test_an_idle_connection_does_not_keep_a_server_that_was_told_to_end(tmp_path):
    publish(tmp_path, 1)
    with server_process.process(tmp_path) as (process, address):
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 20) as idle, httpx.Client() as client:
            client.get(f"{address}/healthz").raise_for_status()
            began = time.monotonic()
            process.terminate()
            assert process.wait(20) == 0
            assert time.monotonic() - began < 5
            assert idle.recv(1) == b""


def test_a_second_signal_does_not_wait(tmp_path):
    publish(tmp_path, 1)
    head = "POST /v1/recommend HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    with (
        server_process.process(tmp_path, "timeout=60", seconds=30) as (process, address),
        contextlib.ExitStack() as callers,
    ):
        # Other rules, so that they are not joined into one call.
        for k in (1, 2):
            content = b'{"histories":[{"item_id":[1]}],"k":%d}' % k
            place = ("127.0.0.1", int(address.split(":")[2]))
            caller = callers.enter_context(socket.create_connection(place, 20))
            caller.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        # One is answered, the other one waits.
        until(lambda: "waiting_requests 1" in httpx.get(f"{address}/metrics").text)
        process.terminate()
        time.sleep(0.3)
        assert process.poll() is None
        process.terminate()
        assert process.wait(10) == 0


# ------------------------------------------------------------------------------- slow callers


def test_a_body_that_does_not_come_is_given_up(tmp_path):
    publish(tmp_path, 1)
    with (
        server_process.app(tmp_path, timeout=0.3) as app,
        server_process.in_thread(app.asgi) as address,
        socket.create_connection(("127.0.0.1", int(address.split(":")[2])), 10) as caller,
    ):
        head = "POST /v1/recommend HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        caller.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        answer = b""
        while b"}" not in answer:
            answer += caller.recv(4096)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"within 0.3 s, found 1 bytes" in answer


# ------------------------------------------------------------------------------- the command


def command(*words, token=None, module="s2s_serve", then="python -m s2s_serve"):
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPO)}
    if token is not None:
        env["S2S_SERVE_TOKEN"] = token
    ended = subprocess.run(
        [sys.executable, "-m", module, *map(str, words)],
        capture_output=True,
        text=True,
        env=env,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in ended.stderr
    return ended.returncode, ended.stdout, ended.stderr


def test_a_port_in_use_is_told(tmp_path):
    publish(tmp_path, 1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = command(tmp_path, "--port", port)
    assert (code, out) == (2, "")
    assert err == (
        f"error: --port: 127.0.0.1:{port} cannot be used (Address already in use); give another --port "
        f"or --host, or --port 0 for a free port\n"
    )


def test_a_host_that_others_reach_needs_a_token(tmp_path, monkeypatch):
    sentence = (
        "--host: {} can be reached from other machines, so a token is needed; set the environment "
        "variable S2S_SERVE_TOKEN"
    )
    code, out, err = command(tmp_path, "--host", "0.0.0.0", "--port", 0)
    assert (code, out, err) == (2, "", f"error: {sentence.format('0.0.0.0')}\n")
    for token in ("", "secret"):
        monkeypatch.setenv("S2S_SERVE_TOKEN", token)
        for host in ("0.0.0.0", "::", "192.0.2.1", "localhost.invalid"):
            if token:
                assert token_for(Settings(host=host)) == "secret"
                continue
            with pytest.raises(UserError, match=f"^{re.escape(sentence.format(host))}$"):
                token_for(Settings(host=host))
        # Where only this machine can call, a token may be asked for, too.
        for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
            assert token_for(Settings(host=host)) == (token or None)


def test_an_address_of_another_machine_is_told(tmp_path):
    # An address for documentation, which no machine has.
    code, _, err = command(tmp_path, "--host", "192.0.2.1", "--port", 0, token="secret")
    assert code == 2
    assert err.startswith("error: --port: 192.0.2.1:0 cannot be used (Cannot assign requested")
    code, _, err = command(tmp_path, "--host", "a b", "--port", 0, token="secret")
    assert (code, err) == (2, "error: --host: expected an address of this machine, found a b\n")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--port", "70000"], "--port: expected 0 to 65535, found 70000"),
        (["--timeout", "0"], "--timeout: expected a number above 0, found 0.0"),
        (["--timeout", "nan"], "--timeout: expected a number above 0, found nan"),
        (["--max_k", "-1"], "--max_k: expected a number above 0, found -1"),
        (["--search", "x"], "argument --search: invalid choice: 'x'"),
        (["--max_k", "x"], "argument --max_k: invalid int value: 'x'"),
        (["--max", "1"], "unrecognized arguments: --max 1"),
    ],
)
def test_wrong_options_are_told(words, sentence, capsys):
    from s2s_serve.server.command import main

    assert main(["somewhere", *words]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {sentence}")
    assert told.count("\n") == 1


def test_both_commands_have_the_same_options():
    code, shown, _ = command("--help")
    assert code == 0
    own = set(re.findall(r"^  (--\w+) ", shown, re.MULTILINE))
    code, shown, _ = command("serve", "--help", module="s2s_jax")
    assert code == 0
    assert set(re.findall(r"(--\w+) ", shown)) - {"--help"} == own
    assert len(own) == 14


def test_without_the_packages_of_the_server_the_command_says_what_to_install(tmp_path):
    hide = "import sys; sys.modules['uvicorn'] = None\n"
    code = f"{hide}from s2s_serve.server.command import main; sys.exit(main([{str(tmp_path)!r}]))"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr == (
        "error: the server needs the package uvicorn, which is not installed; run pip install with "
        "s2s-serve[server], or with s2s-jax[serve]\n"
    )


def test_importing_the_client_needs_no_package_of_the_server():
    packages = ["starlette", "uvicorn", "uvloop", "msgspec", "prometheus_client", "httptools"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({packages}))\n"
        "import s2s_serve, s2s_serve.server.command, s2s_serve.server.settings"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(REPO)})


def test_the_image_and_the_deployment_use_options_and_routes_that_exist():
    serve = (REPO / "s2s_serve" / "Dockerfile").read_text()
    words = json.loads(re.search(r"^CMD (.*)$", serve, re.MULTILINE)[1])
    assert parse(words)[1].host == "0.0.0.0"
    documents = yaml.safe_load_all((REPO / "launch" / "serve.yaml").read_text())
    deployment = next(each for each in documents if each["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    directory, settings = parse(container["args"])
    assert (settings.host, settings.port) == ("0.0.0.0", container["ports"][0]["containerPort"])
    assert str(directory) == container["volumeMounts"][0]["mountPath"]
    assert container["env"][0]["name"] == "S2S_SERVE_TOKEN"
    # The pod is not killed before the server has given up its slowest request.
    waits = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > waits + 2 * settings.timeout
    described = json.loads(openapi.document())["paths"]
    for probe in ("livenessProbe", "readinessProbe"):
        # Probes have no token.
        assert described[container[probe]["httpGet"]["path"]]["get"]["security"] == []
