"""What only a real etcd can show: TLS, passwords, lost replies, a full store, and the care of a cluster."""

import asyncio
import contextlib
import pathlib
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from covey import errors, world
from covey.decide import permission
from covey.store import base, etcd, etcd_endpoints
from tests.support import certificates, proxy
from tests.support import etcd as etcd_server

REAL = world.System()


@pytest.fixture(scope="module")
def cluster() -> Iterator[etcd_server.Cluster]:
    with etcd_server.running() as running:
        yield running


@pytest.fixture
async def store(cluster: etcd_server.Cluster) -> AsyncIterator[etcd.Etcd]:
    async with connected(cluster.endpoints) as made:
        yield made


@contextlib.asynccontextmanager
async def connected(
    endpoints: list[str],
    *,
    attempt_s: float = 2.0,
    timeout_s: float = 10.0,
    tls: etcd_endpoints.Tls | None = None,
    login: etcd_endpoints.Login | None = None,
) -> AsyncIterator[etcd.Etcd]:
    store = etcd.Etcd(endpoints, world=REAL, attempt_s=attempt_s, timeout_s=timeout_s, tls=tls, login=login)
    try:
        yield store
    finally:
        await store.close()


def put(key: str, value: bytes = b"") -> base.Txn:
    return base.Txn((base.absent(key),), (base.Put(key, value),))


def fresh() -> str:
    return f"/{REAL.token()}"


async def soon(store: etcd.Etcd, txn: base.Txn) -> base.Outcome:
    """Commit, again as long as it was certainly not applied: a channel that was refused pauses before it connects. What
    writes no guarded key is committed again when it is unsure, too."""
    repeatable = not (txn.compares and txn.then)
    async with asyncio.timeout(60):
        while True:
            try:
                return await store.commit(txn)
            except errors.Unavailable:
                pass
            except errors.Unsure:
                if not repeatable:
                    raise


async def first_batch(store: base.Store, key: str, revision: int) -> base.Batch:
    async with asyncio.timeout(60), contextlib.aclosing(store.watch(key, "", revision)) as watch:  # type: ignore[type-var]
        async for batch in watch:
            return batch
        raise AssertionError("the watch ended by itself")


@pytest.mark.parametrize("form", ["{0}", "http://{0}", "http://localhost:{1}", "127.0.0.1:1,{0}", " {0} , {0}"])
async def test_endpoints_as_people_write_them(cluster: etcd_server.Cluster, form: str) -> None:
    """A name may have several addresses (localhost: IPv6 where nobody listens, and IPv4), a list dead members."""
    endpoint = form.format(cluster.endpoints[0], cluster.members[0].client_port)
    async with connected([endpoint], attempt_s=5) as store:
        assert (await store.commit(put(fresh()))).succeeded


class TestLostReplies:
    """Safety S15: what a client may say about a write whose answer did not come."""

    @pytest.fixture
    async def between(self, cluster: etcd_server.Cluster) -> AsyncIterator[proxy.Proxy]:
        async with proxy.before(cluster.members[0].client_port) as made:
            yield made

    async def test_an_applied_write_whose_reply_is_lost_is_unsure(self, store: etcd.Etcd, between: proxy.Proxy) -> None:
        key = fresh()
        async with connected([between.address], attempt_s=0.5, timeout_s=2) as through:
            await through.range(key)
            await between.turn(proxy.Mood.MUTE)
            with pytest.raises(errors.Unsure):
                await through.commit(put(key))
            assert (await store.range(key)).total == 1, "it was applied, and nobody said otherwise"

    async def test_a_write_that_never_left_is_unavailable(self, store: etcd.Etcd, between: proxy.Proxy) -> None:
        key = fresh()
        async with connected([between.address], attempt_s=0.5, timeout_s=1) as through:
            await through.range(key)
            await between.turn(proxy.Mood.CLOSED)
            with pytest.raises(errors.Unavailable):
                await through.range(key)  # by now the broken connection was noticed: a write on it would be unsure
            began = time.monotonic()
            with pytest.raises(errors.Unavailable):
                await through.commit(put(key))
            assert time.monotonic() - began < 9.5, "the client's own time-out, not that of a call"
            await between.turn(proxy.Mood.HONEST)
            assert (await soon(through, put(key))).succeeded, "it was not applied, and it works again"

    async def test_a_connection_that_breaks_under_a_write(self, store: etcd.Etcd, between: proxy.Proxy) -> None:
        key = fresh()
        async with connected([between.address], attempt_s=5) as through:
            await through.range(key)
            await between.turn(proxy.Mood.MUTE)
            writing = asyncio.create_task(through.commit(put(key)))
            while (await store.range(key)).total == 0:
                await asyncio.sleep(0.01)
            await between.turn(proxy.Mood.CLOSED)
            with pytest.raises(errors.Unsure):
                await writing

    async def test_a_member_that_never_connects_makes_nothing_unsure(
        self, store: etcd.Etcd, cluster: etcd_server.Cluster, between: proxy.Proxy
    ) -> None:
        """A frozen member accepts connections and says nothing: no write was sent, so another member gets it."""
        await between.turn(proxy.Mood.DEAF)
        key = fresh()
        for n in range(4):  # whichever member each client begins with
            async with connected([between.address, cluster.endpoints[0]], attempt_s=0.5) as through:
                assert (await through.commit(put(f"{key}/{n}"))).succeeded

    async def test_reads_go_elsewhere(self, cluster: etcd_server.Cluster, between: proxy.Proxy) -> None:
        began_there = False
        while not began_there:  # with which member a client begins is chance
            async with connected([between.address, cluster.endpoints[0]], attempt_s=0.5) as through:
                began_there = through.admin.present == between.address
                await through.range("x")
                await between.turn(proxy.Mood.MUTE)
                began = time.monotonic()
                await asyncio.gather(*(through.range("x") for _ in range(20)))
                took_s = time.monotonic() - began
                assert through.admin.present == cluster.endpoints[0]
                await between.turn(proxy.Mood.HONEST)
        assert 0.4 < took_s < 9, "one attempt's time, once: twenty times would be ten seconds"

    async def test_an_unsure_batch_is_unsure_for_each(self, store: etcd.Etcd, between: proxy.Proxy) -> None:
        """Safety S23."""
        key = fresh()
        async with connected([between.address], attempt_s=0.5, timeout_s=2) as through:
            await through.range(key)
            await between.turn(proxy.Mood.MUTE)
            ends = await asyncio.gather(*(through.commit(put(f"{key}/{n}")) for n in range(60)), return_exceptions=True)
        assert {type(end) for end in ends} == {errors.Unsure}
        assert (await store.range(key + "/", key + "0", count_only=True)).total == 60

    async def test_a_watch_on_a_frozen_member_moves_on(
        self, store: etcd.Etcd, cluster: etcd_server.Cluster, between: proxy.Proxy
    ) -> None:
        key = fresh()
        async with connected([between.address, cluster.endpoints[0]], attempt_s=1) as through:
            revision = (await through.commit(put(key))).revision
            for _ in range(2):  # two watches begin at two members: one of them is at the proxy
                watch = through.watch(key, "", revision)
                assert (await anext(watch)).revision == revision
                await between.turn(proxy.Mood.DEAF)
                revision = (await store.commit(base.Txn((), (base.Put(key, b"again"),)))).revision
                async with asyncio.timeout(60):
                    assert (await anext(watch)).revision == revision
                await watch.aclose()  # type: ignore[attr-defined]
                await between.turn(proxy.Mood.HONEST)

    async def test_a_lease_is_lost_while_nobody_answers(self, between: proxy.Proxy) -> None:
        async with connected([between.address], attempt_s=0.5, timeout_s=2) as through:
            lease = await through.grant(2)
            keeping = asyncio.create_task(lease.keep_alive())
            await asyncio.sleep(0.2)
            await between.turn(proxy.Mood.MUTE)
            began = time.monotonic()
            with pytest.raises(errors.LeaseLost):
                await keeping
            assert time.monotonic() - began < 30
            assert lease.lost
            with pytest.raises(errors.Unavailable):
                await through.renew([lease.id])

    async def test_closing_in_the_middle_of_everything(self, between: proxy.Proxy) -> None:
        async with connected([between.address], attempt_s=5) as through:
            await through.range("x")
            await between.turn(proxy.Mood.MUTE)
            writing = asyncio.create_task(through.commit(put(fresh())))
            waiting = asyncio.create_task(through.commit(put("/x")))
            await asyncio.sleep(0.1)
        for task in (writing, waiting):
            with pytest.raises((errors.Unsure, errors.Unavailable)):
                await task


@contextlib.contextmanager
def secured(directory: pathlib.Path) -> Iterator[etcd_server.Cluster]:
    """One member that wants a client certificate and a password; user `covey` may use /covey/ only."""
    with etcd_server.running(security=certificates.make(directory)) as cluster:
        cluster.ctl("user", "add", "root:secret")
        cluster.ctl("user", "grant-role", "root", "root")
        cluster.ctl("role", "add", "covey")
        cluster.ctl("role", "grant-permission", "covey", "readwrite", "--prefix", "/covey/")
        cluster.ctl("user", "add", "covey:pass")
        cluster.ctl("user", "grant-role", "covey", "covey")
        cluster.ctl("auth", "enable")
        cluster.login = "root:secret"
        yield cluster


def client_tls(cluster: etcd_server.Cluster) -> etcd_endpoints.Tls:
    files = cluster.security
    assert files is not None
    return etcd_endpoints.Tls(files.ca.read_bytes(), files.client_cert.read_bytes(), files.client_key.read_bytes())


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[etcd_server.Cluster]:
    with secured(tmp_path_factory.mktemp("certificates")) as cluster:
        yield cluster


class TestSecurity:
    """TLS with client certificates, and users with passwords."""

    @pytest.fixture
    def tls(self, secure: etcd_server.Cluster) -> etcd_endpoints.Tls:
        return client_tls(secure)

    async def test_everything_works(self, secure: etcd_server.Cluster, tls: etcd_endpoints.Tls) -> None:
        endpoints = [f"https://{secure.endpoints[0]}"]
        key = f"/covey{fresh()}"
        async with connected(endpoints, tls=tls, login=etcd_endpoints.Login("covey", "pass")) as store:
            revision = (await store.commit(put(key, b"1"))).revision
            assert (await first_batch(store, key, revision)).revision == revision
            lease = await store.grant(30)
            assert await store.renew([lease.id]) == {lease.id: 30.0}
            await lease.revoke()
        assert "1" in secure.ctl("get", "--print-value-only", key)

    async def test_a_token_that_the_member_forgot(self, tmp_path: pathlib.Path) -> None:
        """Tokens live in a member's memory: after its restart it knows none, and nobody above notices."""
        with secured(tmp_path) as cluster:
            login = etcd_endpoints.Login("covey", "pass")
            async with connected(cluster.endpoints, tls=client_tls(cluster), login=login) as store:
                key = f"/covey{fresh()}"
                revision = (await store.commit(put(key))).revision
                lease = await store.grant(30)
                watch = store.watch(key, "", revision)
                await anext(watch)
                for use in (
                    lambda: store.commit(base.Txn((), (base.Put(key, b""),))),
                    lambda: store.renew([lease.id]),
                    lambda: first_batch(store, key, revision),
                ):
                    cluster.members[0].terminate()
                    cluster.members[0].start()
                    await cluster.wait_ready()
                    await use()
                assert (await anext(watch)).revision == revision + 1
                await watch.aclose()  # type: ignore[attr-defined]

    @pytest.mark.parametrize("login", [None, etcd_endpoints.Login("covey", "wrong"), etcd_endpoints.Login("who", "x")])
    async def test_who_may_not_is_told_so_at_once(
        self, secure: etcd_server.Cluster, tls: etcd_endpoints.Tls, login: etcd_endpoints.Login | None
    ) -> None:
        async with connected(secure.endpoints, tls=tls, login=login) as store:
            async with asyncio.timeout(60):
                with pytest.raises(errors.Rejected):
                    await store.commit(put(f"/covey{fresh()}"))
                with pytest.raises(errors.Rejected):
                    await first_batch(store, "/covey/x", 1)

    async def test_keys_of_others_are_refused(self, secure: etcd_server.Cluster, tls: etcd_endpoints.Tls) -> None:
        async with connected(secure.endpoints, tls=tls, login=etcd_endpoints.Login("covey", "pass")) as store:
            with pytest.raises(errors.Rejected, match="permission denied"):
                await store.commit(put(fresh()))
            with pytest.raises(errors.Rejected, match="permission denied"):
                await first_batch(store, "/other", 1)

    async def test_without_a_client_certificate_nothing_is_sent(
        self, secure: etcd_server.Cluster, tls: etcd_endpoints.Tls
    ) -> None:
        async with connected(secure.endpoints, tls=tls._replace(cert=b"", key=b""), timeout_s=2) as store:
            with pytest.raises(errors.Unavailable):
                await store.range("x")

    async def test_a_server_that_cannot_prove_itself(
        self, secure: etcd_server.Cluster, tls: etcd_endpoints.Tls, tmp_path: pathlib.Path
    ) -> None:
        stranger = certificates.make(tmp_path).ca.read_bytes()
        async with connected(secure.endpoints, tls=tls._replace(ca=stranger), timeout_s=2) as store:
            with pytest.raises(errors.Unavailable):
                await store.range("x")


async def test_a_transaction_that_only_compares_needs_a_quorum() -> None:
    """A member that is cut off from the others does not say how a key stands: it may have changed there (S21)."""
    key = fresh()
    with etcd_server.running(members=3) as cluster:
        left, *others = cluster.members
        async with connected([left.endpoint], attempt_s=1, timeout_s=2) as store:
            question = base.Txn((base.absent(key),), ())
            assert (await soon(store, question)) == base.Outcome(True, 1)
            for other in others:
                other.stop()
            try:
                with pytest.raises((errors.Unsure, errors.Unavailable)):
                    await store.commit(question)
            finally:
                for other in others:
                    other.cont()
            await cluster.wait_ready()
            written = await soon(store, base.Txn((), (base.Put(key, b""),)))
            assert (await soon(store, question)) == base.Outcome(False, written.revision)


class TestCare:
    """The administration of a cluster."""

    async def test_members_and_status(self, cluster: etcd_server.Cluster, store: etcd.Etcd) -> None:
        (member,) = await store.admin.members()
        (status,) = (await store.admin.statuses()).values()
        assert status is not None
        assert (member.name, member.learner) == ("m0", False)
        assert status.member_id == status.leader_id == member.id
        assert status.version.startswith("3.") and status.size_bytes > 0 and status.raft_term > 0
        assert status.revision == (await store.range("x")).revision

    async def test_a_learner_is_added_promoted_and_removed(self, tmp_path: pathlib.Path) -> None:
        with etcd_server.running() as cluster:
            newcomer = etcd_server.prepare(tmp_path, 1).members[0]
            async with connected([*cluster.endpoints, newcomer.endpoint]) as store:
                url = f"http://127.0.0.1:{newcomer.peer_port}"
                added = await store.admin.add_member([url])
                assert added.learner and added.peer_urls == (url,)
                newcomer.arguments = [
                    *newcomer.arguments,
                    "--name", "new", "--initial-cluster-state", "existing", "--initial-cluster",
                    f"m0=http://127.0.0.1:{cluster.members[0].peer_port},new={url}",
                ]  # fmt: skip
                newcomer.start()
                try:
                    async with asyncio.timeout(90):
                        while not await promoted(store, added.id):
                            await asyncio.sleep(0.1)
                    assert [member.learner for member in await store.admin.members()] == [False, False]
                    await store.admin.move_leader(added.id)
                    old = next(member.id for member in await store.admin.members() if member.id != added.id)
                    async with asyncio.timeout(90):
                        while not await leads(store, old):
                            await asyncio.sleep(0.1)
                    assert len(await store.admin.remove_member(added.id)) == 1
                    async with connected(cluster.endpoints) as remaining:
                        assert (await remaining.commit(put(fresh()))).succeeded
                finally:
                    newcomer.kill()

    async def test_a_member_that_does_not_answer(self, cluster: etcd_server.Cluster) -> None:
        nobody = f"127.0.0.1:{etcd_server.free_port()}"
        async with connected([*cluster.endpoints, nobody], attempt_s=0.5) as store:
            statuses = await store.admin.statuses()
            assert statuses[nobody] is None and statuses[cluster.endpoints[0]] is not None

    async def test_space_is_given_back(self, cluster: etcd_server.Cluster, store: etcd.Etcd) -> None:
        key = fresh()
        for _ in range(20):
            await store.commit(base.Txn((), (base.Put(key, b"x" * 1_000_000),)))
        await store.compact((await store.range(key)).revision)
        address = cluster.endpoints[0]
        before = await store.admin.status(address)
        async with asyncio.timeout(90):
            while (await store.admin.status(address)).used_bytes > before.size_bytes / 2:
                await store.commit(put(fresh()))  # etcd counts anew when it writes
                await asyncio.sleep(0.1)
        await store.admin.defragment(address)
        assert (await store.admin.status(address)).size_bytes < before.size_bytes / 2

    async def test_a_snapshot_can_be_restored(
        self, cluster: etcd_server.Cluster, store: etcd.Etcd, tmp_path: pathlib.Path
    ) -> None:
        key = fresh()
        await store.commit(put(key, b"kept"))
        size = await store.admin.snapshot(tmp_path / "snapshot.db")
        assert size == (tmp_path / "snapshot.db").stat().st_size
        assert [path.name for path in tmp_path.iterdir()] == ["snapshot.db"]
        restored = etcd_server.prepare(tmp_path / "restored")
        member = restored.members[0]
        peers = f"http://127.0.0.1:{member.peer_port}"
        (tmp_path / "restored").mkdir()
        cluster.ctl(
            "snapshot", "restore", str(tmp_path / "snapshot.db"), "--data-dir", str(tmp_path / "restored" / "m0"),
            "--name", "m0", "--initial-cluster", f"m0={peers}", "--initial-advertise-peer-urls", peers,
        )  # fmt: skip
        restored.start()
        try:
            await restored.wait_ready()
            async with connected(restored.endpoints) as other:
                assert (await other.range(key)).kvs[0].value == b"kept"
        finally:
            restored.kill()

    async def test_a_full_store_takes_no_writes_and_lets_go(self) -> None:
        """Safety S25: reads and deletions go on; after making room and disarming all is well."""
        with etcd_server.running(extra=["--quota-backend-bytes", str(16 << 20)]) as cluster:
            async with connected(cluster.endpoints) as store:
                key = fresh()
                with pytest.raises(errors.NoSpace):
                    for _ in range(40):
                        await store.commit(base.Txn((), (base.Put(key, b"x" * 1_000_000),)))
                assert [alarm.name for alarm in await store.admin.alarms()] == ["NOSPACE"]
                with pytest.raises(errors.NoSpace):
                    await store.commit(put(fresh()))
                assert (await store.range(key)).total == 1
                assert (await store.commit(base.Txn((), (base.Delete(key),)))).succeeded
                await store.compact((await store.range(key)).revision)
                await asyncio.sleep(0.5)  # compaction works in the background; defragmenting too early is harmless
                await store.admin.defragment(cluster.endpoints[0])
                await store.admin.disarm()
                assert await store.admin.alarms() == []
                assert (await store.commit(put(fresh()))).succeeded


async def promoted(store: etcd.Etcd, id: int) -> bool:
    """Try to give a learner its vote; it is refused until it has caught up."""
    try:
        await store.admin.promote_member(id)
    except (errors.Rejected, errors.Unsure):
        return False
    return True


async def leads(store: etcd.Etcd, id: int) -> bool:
    """Hand the lead to a member; whether all members say that it leads."""
    with contextlib.suppress(errors.Unavailable, errors.Unsure):
        await store.admin.move_leader(id)
    return {status and status.leader_id for status in (await store.admin.statuses()).values()} == {id}


class NoAdministrator:
    """etcd 3.5.30 and newer tell a member's status to the role root only."""

    present = "127.0.0.1:1"
    addresses = (present,)

    async def status(self, address: str) -> object:
        raise errors.Rejected("etcdserver: permission denied")


async def test_without_the_role_root_a_read_tells_where_the_store_is_in_its_life(store: etcd.Etcd) -> None:
    outcome = await soon(store, put(fresh()))
    whole = await store.origin(outcome.revision)
    store.admin = NoAdministrator()  # type: ignore[assignment]
    told = await store.origin(outcome.revision)
    assert (told.cluster, told.term, told.entries) == (whole.cluster, whole.term, 0)
    assert permission.restored(whole, told) == permission.restored(told, whole) == ""
    with pytest.raises(errors.Unavailable):
        await store.origin(outcome.revision + 1000)
