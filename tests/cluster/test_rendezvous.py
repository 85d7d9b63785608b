"""Processes that meet before JAX connects them; here they are threads on the loopback interface."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from s2s_jax.cluster.place import Place
from s2s_jax.cluster.rendezvous import listen, meet
from s2s_jax.errors import LostHostError, UserError


@pytest.fixture
def port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def run(*places: Place, reach: float = 5, start: float = 5):
    """The outcome of each: an error, or None if it continues."""
    with ThreadPoolExecutor(len(places)) as pool:
        return [each.exception() for each in [pool.submit(meet, p, reach, start) for p in places]]


def at(port: int, host: int, hosts: int) -> Place:
    return Place(f"localhost:{port}", hosts, host, None, by_hand=True)


def test_all_processes_continue_when_all_are_there(port):
    assert run(*(at(port, host, 4) for host in (3, 1, 0, 2))) == [None] * 4


def test_two_processes_with_one_number_are_reported(port):
    errors = run(at(port, 0, 3), at(port, 1, 3), at(port, 1, 3))
    assert all(isinstance(e, UserError) for e in errors), errors
    assert all("S2S_JAX_HOST: two processes have 1" in str(e) for e in errors)


def test_other_numbers_of_hosts_are_told(port):
    errors = run(at(port, 0, 2), at(port, 2, 3))
    assert all(isinstance(e, UserError) for e in errors), errors
    assert all("S2S_JAX_NUM_HOSTS: host 2 has 3, host 0 has 2" in str(e) for e in errors)


def test_who_is_missing_is_told_to_all(port):
    errors = run(at(port, 0, 4), at(port, 2, 4), start=1)
    assert all(isinstance(e, LostHostError) for e in errors), errors
    assert all("of 4 hosts (S2S_JAX_NUM_HOSTS), 1, 3 did not connect" in str(e) for e in errors)


def test_no_answer(port):
    (error,) = run(at(port, 1, 2), reach=1)
    assert isinstance(error, LostHostError)
    assert "no answer from host 0" in str(error)
    assert "refused" in str(error)
    unknown = Place("nowhere.invalid:99", 2, 1, None, by_hand=True)
    (error,) = run(unknown, reach=1)
    assert isinstance(error, LostHostError)
    assert "nowhere.invalid:99" in str(error)
    (error,) = run(unknown._replace(host=0, coordinator=f"nowhere.invalid:{port}"), reach=1)
    assert isinstance(error, LostHostError)
    assert "host 0 cannot reach itself" in str(error)


def test_a_port_that_is_taken():
    with listen(0) as server:
        taken = server.getsockname()[1]
        (error,) = run(at(taken, 0, 2))
        assert isinstance(error, UserError)
        assert f"port {taken}" in str(error)


def test_what_is_not_ours_is_neither_answered_nor_believed(port, monkeypatch):
    """A web server at the coordinator's address, and connections of other programs."""
    monkeypatch.setattr("s2s_jax.cluster.rendezvous._HELLO_TIMEOUT", 0.5)
    with listen(0) as stranger:

        def answer():
            connection, _ = stranger.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        (error,) = run(at(stranger.getsockname()[1], 1, 2), reach=1)
        assert isinstance(error, LostHostError)
        thread.join()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, at(port, 0, 2), 5, 10)
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"s2s_jax x y\n", b""):
            while True:
                try:
                    with socket.create_connection(("localhost", port)) as knock:
                        knock.sendall(words)
                    break
                except ConnectionRefusedError:
                    assert not first.done()
        assert pool.submit(meet, at(port, 1, 2), 5, 5).exception() is None
        assert first.exception() is None


def test_one_that_was_started_again_takes_its_place(port):
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, at(port, 0, 3), 5, 10)
        gone = None
        while gone is None:
            try:
                gone = socket.create_connection(("localhost", port))
            except ConnectionRefusedError:
                assert not first.done()
        with gone:
            gone.sendall(b"s2s_jax 1 3\n")
            assert gone.recv(100) == b"s2s_jax here\n"
        again = pool.submit(meet, at(port, 1, 3), 5, 5)
        meet(at(port, 2, 3), 5, 5)
        assert again.exception() is None
        assert first.exception() is None
