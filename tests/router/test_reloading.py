"""vllm_rvec.router.reloading: another configuration takes hold, and no request notices.

The parts are put together by `vllm-rvec route` itself, in this process; the signals are real.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
import watchfiles
from aiohttp import web

from vllm_rvec.cli.route import _Router
from vllm_rvec.router import bind_socket, hash_key, load_route_config, reloading

from .conftest import StandInEngine, begin_events, chat_event, sample_of
from .test_traffic import trusting, write_certificate

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable

    from .conftest import StartEngine

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"


@dataclass
class Route:
    """A running `route`."""

    file: Path
    url: str
    http: aiohttp.ClientSession
    task: asyncio.Task[None]

    async def metric(self, name: str, **labels: str) -> float:
        """One value of those that Prometheus reads; 0 where there is none."""
        async with self.http.get(self.url + "/metrics") as answer:
            text = await answer.text()
        return sample_of(text, f"vllm_rvec_router_{name}", labels)

    async def generation(self) -> float:
        """How often the configuration has been set."""
        return await self.metric("configuration_generation")

    async def failures(self) -> float:
        """How many attempts to reload it went wrong."""
        return await self.metric("configuration_reloads_total", result="failed")

    async def ask(self, model: str = "base", **headers: str) -> tuple[int, str | None]:
        """Ask for a completion: the status, and who answered."""
        async with self.http.post(self.url + CHAT, json={"model": model}, headers=headers) as got:
            await got.read()
            return got.status, got.headers.get("X-Rvec-Variant")

    def hang_up(self) -> None:
        """Ask for another look at the file."""
        os.kill(os.getpid(), signal.SIGHUP)


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 10) -> None:
    """Wait until it holds; fail after a deadline."""
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110 - it is elsewhere
            await asyncio.sleep(0.02)


def write(file: Path, text: str) -> None:
    """Put another file in place at once, as editors do."""
    aside = file.with_name(file.name + ".new")
    aside.write_text(text)
    aside.rename(file)


def configured(variants: dict[str, list[str]], **settings: Any) -> str:
    """A file of `route`: each variant with its upstreams' addresses."""
    said = {name: {"upstreams": [{"url": u} for u in urls]} for name, urls in variants.items()}
    return json.dumps({"variants": said, **settings})


def is_watched(folder: Path) -> bool:
    """Whether this process has the kernel tell it of changes in a folder."""
    inode = f"ino:{folder.stat().st_ino:x} "
    for info in Path("/proc/self/fdinfo").iterdir():
        with suppress(OSError):
            if any(inode in line for line in info.read_text().splitlines() if "inotify" in line):
                return True
    return False


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def never_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what the kernel tells counts."""
    monkeypatch.setattr(reloading, "LOOK_MILLISECONDS", 60_000)


async def start(
    file: Path, http: aiohttp.ClientSession, stack: AsyncExitStack, *, is_watching: bool = True
) -> Route:
    """Run `route` until the test ends."""
    listener = bind_socket("127.0.0.1", 0)
    settings = load_route_config(file)
    router = _Router(file, lambda: load_route_config(file), listener, None, None)
    task = asyncio.create_task(router.run(settings, as_json=True))

    async def end() -> None:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    stack.push_async_callback(end)
    scheme = "http" if settings.tls is None else "https"
    route = Route(file, f"{scheme}://127.0.0.1:{listener.getsockname()[1]}", http, task)

    async def is_ready() -> bool:
        if task.done():
            task.result()
        is_told = signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL
        return is_told and (not is_watching or is_watched(file.parent))

    await until(is_ready)
    return route


@pytest.fixture
async def file(engine: StandInEngine, tmp_path: Path) -> Path:
    """One variant."""
    file = tmp_path / "route.yaml"
    file.write_text(configured({"base": [engine.url]}))
    return file


@pytest.fixture
async def route(
    never_looks: None, file: Path, http: aiohttp.ClientSession, stack: AsyncExitStack
) -> Route:
    return await start(file, http, stack)


async def follows(route: Route, change: Callable[[], None]) -> None:
    """See that a change to the file, which adds the variant `new`, is taken in."""
    before = await route.generation()
    assert (await route.ask("new"))[0] == 404
    change()
    await until(lambda: is_generation(route, before + 1))
    assert await route.ask("new") == (200, "new")
    assert await route.ask("base") == (200, "base")


async def is_generation(route: Route, expected: float) -> bool:
    return await route.generation() == expected


async def test_a_file_that_is_written_anew_is_read(route: Route, engine: StandInEngine) -> None:
    """The generation tells; what is read is what is there in the end."""
    assert await route.generation() == 1
    text = configured({"base": [engine.url], "new": [engine.url]})
    await follows(route, lambda: void(route.file.write_text(text)))
    assert await route.metric("configuration_reloads_total", result="ok") == 1


def void(_: object) -> None:
    """Have a change give nothing."""


async def test_a_file_that_takes_the_old_ones_place_is_read(
    route: Route, engine: StandInEngine
) -> None:
    """So do editors write: aside, then renamed. Again and again."""
    text = configured({"base": [engine.url], "new": [engine.url]})
    await follows(route, lambda: write(route.file, text))
    write(route.file, configured({"base": [engine.url]}))
    await until(lambda: is_generation(route, 3))
    await follows(route, lambda: write(route.file, text))


@pytest.mark.usefixtures("never_looks")
@pytest.mark.parametrize("folder", ["etc", ".venv"])
async def test_a_config_map_of_kubernetes_is_followed(
    engine: StandInEngine,
    tmp_path: Path,
    http: aiohttp.ClientSession,
    stack: AsyncExitStack,
    folder: str,
) -> None:
    """There the file is a link through `..data`, which is swapped for another one; each time."""
    mount = tmp_path / folder
    mount.mkdir()

    def put(version: str, text: str) -> None:
        (mount / version).mkdir()
        (mount / version / "route.yaml").write_text(text)
        (mount / "..data_tmp").symlink_to(version)
        (mount / "..data_tmp").rename(mount / "..data")

    old = configured({"base": [engine.url]})
    new = configured({"base": [engine.url], "new": [engine.url]})
    put("..1", old)
    (mount / "route.yaml").symlink_to("..data/route.yaml")
    route = await start(mount / "route.yaml", http, stack)
    await follows(route, lambda: put("..2", new))
    for part in (mount / "..1" / "route.yaml", mount / "..1"):  # Kubernetes clears it away
        part.unlink() if part.is_file() else part.rmdir()
    put("..3", old)
    await until(lambda: is_generation(route, 3))
    await follows(route, lambda: put("..4", new))


async def test_another_file_of_the_folder_changes_nothing(route: Route) -> None:
    """Nor does the same text once more; SIGHUP reads it in any case."""
    (route.file.parent / "other.yaml").write_text("x")
    write(route.file, route.file.read_text())
    await asyncio.sleep(0.3)
    assert await route.generation() == 1
    route.hang_up()
    await until(lambda: is_generation(route, 2))


async def test_a_change_before_the_watch_began_is_seen(
    file: Path,
    engine: StandInEngine,
    http: aiohttp.ClientSession,
    stack: AsyncExitStack,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody tells of it, nor do network file systems: the file is looked at all the same."""
    monkeypatch.setattr(reloading, "LOOK_MILLISECONDS", 100)
    real = watchfiles.awatch

    def watch_late(*_paths: Path, **options: Any) -> AsyncIterator[Any]:
        write(file, configured({"base": [engine.url], "new": [engine.url]}))
        return real("/proc/self/fdinfo", **options)  # not told of anything

    monkeypatch.setattr(reloading, "awatch", watch_late)
    route = await start(file, http, stack, is_watching=False)
    await until(lambda: is_generation(route, 2))
    assert await route.ask("new") == (200, "new")


async def test_where_nothing_can_be_watched_there_is_still_sighup(
    file: Path,
    http: aiohttp.ClientSession,
    stack: AsyncExitStack,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The kernel has only so many watches; that ends no router."""

    async def watch_nothing(*paths: Path, **_options: Any) -> AsyncIterator[Any]:
        if paths:
            raise OSError("OS file watch limit reached")
        yield

    monkeypatch.setattr(reloading, "awatch", watch_nothing)
    route = await start(file, http, stack, is_watching=False)
    write(file, configured({"new": ["http://127.0.0.1:9"]}))
    route.hang_up()
    await until(lambda: is_generation(route, 2))
    assert "is read again on SIGHUP only: OS file watch limit reached" in caplog.text


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("variants: {base: {upstreams: [{ulr: sesame}]}}", "did you mean `url`?"),
        ("variants: [", "is not valid YAML"),
        ("", "`variants` is missing"),
        ("variants: {b: {upstreams: [{url: http://x, api_key_env: NO_KEY}]}}", "NO_KEY is not set"),
        (None, "can't be read"),
    ],
)
async def test_a_bad_file_changes_nothing_and_says_why(
    route: Route, caplog: pytest.LogCaptureFixture, bad: str | None, said: str
) -> None:
    """It is counted, quoted nowhere, and the next good one is taken in."""
    good = route.file.read_text()
    if bad is None:
        route.file.unlink()
    else:
        write(route.file, bad)
    await until(lambda: has_failed(route))
    assert await route.generation() == 1
    assert await route.ask() == (200, "base")
    assert "the old configuration stays" in caplog.text
    assert said in caplog.text
    assert "sesame" not in caplog.text
    assert "Traceback" not in caplog.text
    write(route.file, good)
    await until(lambda: is_generation(route, 2))


async def has_failed(route: Route) -> bool:
    return await route.failures() == 1


async def test_our_own_mistake_ends_no_router(
    route: Route, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What nobody thought of is logged with its traceback, and counted like a bad file."""

    def fail(*_: object) -> None:
        msg = "unthought of"
        raise RuntimeError(msg)

    monkeypatch.setattr("vllm_rvec.cli.route.upstreams_of", fail)
    route.hang_up()
    await until(lambda: has_failed(route))
    assert "RuntimeError: unthought of" in caplog.text
    assert await route.ask() == (200, "base")
    assert not route.task.done()


async def test_what_takes_a_restart_is_said(
    route: Route, engine: StandInEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """A changed admin key that silently did not hold would be worse than none."""
    changed = {"admin_key_sha256": hash_key("x"), "results": {"path": "r"}, "port": 1}
    with caplog.at_level(logging.WARNING):
        write(route.file, configured({"base": [engine.url]}, **changed))
        await until(lambda: is_generation(route, 2))
    assert "restart for what has changed in: port, admin_key_sha256, results" in caplog.text


async def test_keys_are_taken_in(route: Route, engine: StandInEngine) -> None:
    """From the swap on, who shows none is not let in."""
    assert await route.ask() == (200, "base")
    keys = {"team": {"sha256": hash_key("sesame")}}
    write(route.file, configured({"base": [engine.url]}, keys=keys))
    await until(lambda: is_generation(route, 2))
    assert (await route.ask())[0] == 401
    assert (await route.ask(Authorization="Bearer sesame"))[0] == 200


async def test_the_access_log_is_reopened_on_sighup(
    engine: StandInEngine,
    tmp_path: Path,
    http: aiohttp.ClientSession,
    stack: AsyncExitStack,
) -> None:
    """Logrotate moves it away, then tells: from then on no line goes to the old file."""
    file, log = tmp_path / "route.yaml", tmp_path / "access.jsonl"
    file.write_text(configured({"base": [engine.url]}, access_log="access.jsonl"))
    route = await start(file, http, stack, is_watching=False)
    await route.ask(**{"X-Request-Id": "one"})

    async def is_on_disk() -> bool:
        return '"one"' in log.read_text()

    await until(is_on_disk)
    log.rename(tmp_path / "access.jsonl.1")
    route.hang_up()

    async def is_reopened() -> bool:
        return log.exists()

    await until(is_reopened)
    await route.ask(**{"X-Request-Id": "two"})

    async def is_written() -> bool:
        return '"two"' in log.read_text()

    await until(is_written)
    old, new = (tmp_path / "access.jsonl.1").read_text(), log.read_text()
    assert '"one"' in old
    assert '"two"' not in old
    assert '"one"' not in new


async def test_certificates_are_read_again_on_sighup(
    engine: StandInEngine, tmp_path: Path, http: aiohttp.ClientSession, stack: AsyncExitStack
) -> None:
    """Renewed in the same files; one that does not fit its key, or a bad file, changes nothing."""
    one, two = (write_certificate(tmp_path, name) for name in ("one", "two"))
    used = {"certificate": tmp_path / "used.crt", "key": tmp_path / "used.key"}

    def use(certificate: str, key: str) -> None:
        used["certificate"].write_bytes(Path(certificate).read_bytes())
        used["key"].write_bytes(Path(key).read_bytes())

    use(one.certificate, one.key)
    file = tmp_path / "route.yaml"
    tls = {"certificate": "used.crt", "key": "used.key"}
    good = configured({"base": [engine.url]}, tls=tls)
    file.write_text(good)
    route = await start(file, http, stack, is_watching=False)

    async def status(trusted: ssl.SSLContext) -> int:
        close = {"Connection": "close"}
        async with http.get(route.url + "/livez", ssl=trusted, headers=close) as answer:
            return answer.status

    async def is_new() -> bool:
        with suppress(aiohttp.ClientConnectorCertificateError):
            return await status(trusting(two)) == 200
        return False

    assert await status(trusting(one)) == 200
    use(two.certificate, one.key)
    route.hang_up()
    await asyncio.sleep(0.3)
    assert await status(trusting(one)) == 200
    same = {"sha256": hash_key("x")}
    use(two.certificate, two.key)
    file.write_text(configured({"base": [engine.url]}, tls=tls, keys={"a": same, "b": same}))
    route.hang_up()
    await asyncio.sleep(0.3)
    assert await status(trusting(one)) == 200
    file.write_text(good)
    route.hang_up()
    await until(is_new)


# --- under load -------------------------------------------------------------------------------

SWAPS = 20
CLIENTS = 220
ENGINE_SECONDS = 0.5


@dataclass
class Load:
    """Which configurations there were, and which held for sure at each moment."""

    upstreams: list[dict[str, list[str]]] = field(default_factory=list)
    settled: int = 0
    is_over: bool = False
    answered: int = 0
    most_under_way: int = 0
    under_way: int = 0
    faults: list[str] = field(default_factory=list)

    def may_answer(self, began: int) -> set[str]:
        """Who may answer a request that began when this configuration held."""
        later = self.upstreams[began:]
        return {url for variants in later for urls in variants.values() for url in urls}


def slowly(name: str) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """An engine that takes its time, streams where it is asked to, and says who it is."""

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path == "/health":
            return web.Response()
        if b'"stream": true' not in await request.read():
            await asyncio.sleep(ENGINE_SECONDS)
            return web.json_response({"engine": name, "choices": []})
        response = await begin_events(request)
        for _ in range(5):
            await response.write(chat_event(name))
            await asyncio.sleep(ENGINE_SECONDS / 5)
        await response.write(b"data: [DONE]\n\n")
        return response

    return answer


async def keep_asking(load: Load, route: Route, number: int) -> None:
    """Be one client, whose key is always one that holds."""
    body = {"model": "assistant", "user": f"user-{number}", "stream": number % 2 == 0}
    while not load.is_over:
        began = load.settled
        # Each key holds for four configurations in a row.
        headers = {"Authorization": f"Bearer key-{began + 2}"}
        load.under_way += 1
        load.most_under_way = max(load.most_under_way, load.under_way)
        try:
            async with route.http.post(route.url + CHAT, json=body, headers=headers) as answer:
                text = await answer.text()
        except aiohttp.ClientError as exc:
            load.faults.append(repr(exc))
            continue
        finally:
            load.under_way -= 1
        load.answered += 1
        if answer.status != 200 or (body["stream"] and "[DONE]" not in text):
            load.faults.append(f"{answer.status} {text[-300:]}")
        elif not any(url in text for url in load.may_answer(began)):
            load.faults.append(f"of {began}, answered late: {text[-300:]}")


def next_configuration(step: int, urls: list[str]) -> tuple[dict[str, list[str]], str]:
    """Other weights, upstreams and keys; every second one has a variant more."""
    one, two, three, four = urls
    variants = {"base": [one, two] if step % 3 else [two], "enhanced@1": [(three, one)[step % 2]]}
    if step % 2:
        variants["canary"] = [four]
    weights = {name: 1 + (step * 7 + place) % 5 for place, name in enumerate(variants)}
    keys = {f"k{n}": {"sha256": hash_key(f"key-{n}")} for n in range(step, step + 4)}
    return variants, configured(variants, aliases={"assistant": {"split": weights}}, keys=keys)


async def test_no_request_is_lost_while_configurations_are_swapped(
    start_engine: StartEngine, tmp_path: Path, stack: AsyncExitStack
) -> None:
    """Under more than 200 of them; from the swap on, an upstream that was removed gets none."""
    engines = [await start_engine() for _ in range(4)]
    for engine in engines:
        engine.answer = slowly(engine.url)
    urls = [engine.url for engine in engines]
    file, load = tmp_path / "route.yaml", Load()
    variants, text = next_configuration(0, urls)
    load.upstreams.append(variants)
    file.write_text(text)
    http = await stack.enter_async_context(
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
    )
    route = await start(file, http, stack)
    clients = [asyncio.create_task(keep_asking(load, route, n)) for n in range(CLIENTS)]
    for step in range(1, SWAPS + 1):
        asked = load.answered
        variants, text = next_configuration(step, urls)
        load.upstreams.append(variants)
        write(file, text)
        await until(lambda step=step: is_generation(route, step + 1))  # type: ignore[misc]
        load.settled = step
        async with asyncio.timeout(10):
            while load.answered < asked + 20:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.01)
    load.is_over = True
    await asyncio.gather(*clients)
    assert load.faults == []
    assert load.most_under_way >= 200
    assert load.answered > SWAPS * 20
    assert await route.failures() == 0
    assert await route.metric("requests_in_flight") == 0
    assert (await route.ask(Authorization="Bearer key-2"))[0] == 401
