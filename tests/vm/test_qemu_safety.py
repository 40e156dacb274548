"""What a guest, its template and its QEMU cannot do to the host; ports and screen as users reach them."""

import asyncio
import json
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from covey import errors, model
from covey.agent import guest as guest_agent
from covey.agent import hypervisor, qcow2, qemu_disk, qemu_machine, qemu_process
from tests.support import guest

FOREIGN = "/etc/passwd"
ROOT = "72 6f 6f 74"  # how that file begins, as qemu-io shows bytes


@pytest.fixture(scope="module")
def host() -> Iterator[guest.Host]:
    with guest.host() as made:
        yield made


@pytest.fixture(scope="module")
def machine(host: guest.Host) -> hypervisor.Plan:
    """A VM of two layers that is up, with a known screen password and two forwards."""
    forwards = (model.Forward(name="web", guest_port=80), model.Forward(name="echo", guest_port=7007))
    image = guest.image(layers=("base.qcow2", "extra.qcow2"))
    plan = host.plan(image_=image, vnc_password="s3cr3t-longer", forwards=forwards)

    async def boot() -> None:
        async with host.hypervisor() as driver:
            await guest.boot(driver, plan)

    asyncio.run(boot())
    return plan


def pid_of(host: guest.Host, plan: hypervisor.Plan) -> int:
    (pid,) = [found.pid for found in qemu_process.find() if found.directory == f"{host.root}/{plan.instance}.1"]
    return pid


async def info_of(host: guest.Host, plan: hypervisor.Plan) -> model.VmInfo:
    async with host.hypervisor() as driver:
        info = await driver.info(plan.instance, plan.epoch)
    assert info is not None
    return info


async def inside(host: guest.Host, plan: hypervisor.Plan, text: str) -> tuple[int, bytes]:
    """Run a line in the guest: its exit code and output."""
    place = qemu_disk.Place(host.root, plan.instance, 1)
    talk = guest_agent.Guest(place.guest, place.user)
    try:
        status = await talk.shell(text, "test", timeout_s=30)
    finally:
        talk.close()
    return status.code, guest_agent.decoded(status.out)


# ---- QEMU itself -----------------------------------------------------------------------------------------------


def test_qemu_is_nobody_and_may_nothing(host: guest.Host, machine: hypervisor.Plan) -> None:
    lines = Path(f"/proc/{pid_of(host, machine)}/status").read_text().splitlines()
    status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    assert status["NoNewPrivs"] == ["1"]
    assert status["Seccomp"] == ["2"]
    assert status["CapEff"] == ["0000000000000000"]
    if os.geteuid() == 0:
        users = {int(user) for user in status["Uid"]}
        assert len(users) == 1
        assert min(users) >= 1_879_100_000
        assert not status["Groups"]


def test_qemu_cannot_write_its_layers(host: guest.Host, machine: hypervisor.Plan) -> None:
    layers = {str(Path(layer).resolve()) for layer in machine.image.layers}
    seen = set()
    for entry in Path(f"/proc/{pid_of(host, machine)}/fd").iterdir():
        if (target := str(entry.readlink())) in layers:
            flags = (entry.parent.parent / "fdinfo" / entry.name).read_text().splitlines()[1].split()[1]
            assert int(flags, 8) & os.O_ACCMODE == os.O_RDONLY
            seen.add(target)
    assert seen == layers


async def test_each_vm_has_a_user_of_its_own(host: guest.Host, machine: hypervisor.Plan) -> None:
    plans = [host.plan(), host.plan()]
    async with host.hypervisor() as driver:
        await asyncio.gather(*(driver.prepare(plan) for plan in plans))
        records = [qemu_disk.Place(host.root, plan.instance, 1).record() for plan in [*plans, machine]]
        users = {record.user for record in records if record is not None}
        assert len(users) == 3 if os.geteuid() == 0 else users == {None}
        for plan in plans:
            await driver.destroy(plan.instance, 1)


# ---- templates that lie ----------------------------------------------------------------------------------------


def hostile(path: Path, **options: str) -> Path:
    words = [word for name, value in options.items() for word in (f"-{name}", value)]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *words, str(path), "16M"], check=True)
    return path


@pytest.mark.parametrize("position", ["base", "top"])
async def test_a_layer_that_names_a_file_of_the_host_is_refused(
    host: guest.Host, tmp_path: Path, position: str
) -> None:
    evil = str(hostile(tmp_path / "evil.qcow2", F="raw", b=FOREIGN))
    layers = (evil,) if position == "base" else ("base.qcow2", evil)
    plan = host.plan(image_=guest.image(layers=layers))
    async with host.hypervisor() as driver:
        with pytest.raises(errors.HypervisorError, match=r"evil.qcow2: backing file: .*/etc/passwd"):
            await driver.prepare(plan)
        assert await guest.phase(driver, plan) is None


async def test_the_spelled_out_chain_wins_over_a_header(host: guest.Host, tmp_path: Path) -> None:
    """Even if the check were passed by, QEMU opens what the command line says and nothing else."""
    evil = hostile(tmp_path / "evil.qcow2", F="raw", b=FOREIGN)
    machine = qemu_machine.Machine(
        binary="qemu", kvm=False, instance=model.InstanceId("x"), directory="/x", cloud="", name="",
        vcpu=1, ram_mb=64, netdev="", disk=str(tmp_path / "top.qcow2"), layers=(str(evil),),
    )  # fmt: skip
    hostile(tmp_path / "top.qcow2")
    words = qemu_machine.command(machine)
    chain = words[words.index("-blockdev") + 1]
    read = ["qemu-io", "-r", "-c", "read -v 0 32", "json:" + json.dumps(_without_options(json.loads(chain)))]
    shown = (await asyncio.to_thread(subprocess.run, read, capture_output=True, text=True, check=True)).stdout
    assert ROOT not in shown
    trusting = ["qemu-io", "-r", "-f", "qcow2", "-c", "read -v 0 32", str(evil)]
    leaked = (await asyncio.to_thread(subprocess.run, trusting, capture_output=True, text=True, check=True)).stdout
    assert ROOT in leaked, "this image does not even try"


def _without_options(node: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in node.items() if name not in ("node-name", "discard")}


async def test_the_guest_sees_every_layer(host: guest.Host, machine: hypervisor.Plan) -> None:
    assert (await asyncio.to_thread(guest.page, await info_of(host, machine)))["layer"] == guest.LAYER_TEXT


def test_headers_of_our_own_layers_pass() -> None:
    directory = guest.template()
    files = [directory / "base.qcow2", directory / "extra.qcow2"]
    assert qcow2.check_chain(files, ["base.qcow2", "extra.qcow2"]).backing == "base.qcow2"
    with pytest.raises(errors.Refused, match=r"foreign file 'base\.qcow2'"):
        qcow2.check_chain(files, ["other.qcow2", "extra.qcow2"])
    with pytest.raises(errors.Refused, match="base layer may have none"):
        qcow2.check_chain(files[1:])


# ---- ports -----------------------------------------------------------------------------------------------------


async def test_a_taken_host_port_is_said_plainly(host: guest.Host) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        plan = host.plan(forwards=(model.Forward(name="ssh", guest_port=22, host_port=port),))
        async with host.hypervisor() as driver:
            await driver.prepare(plan)
            with pytest.raises(
                errors.HypervisorError, match=f"port forwarding ssh: host port {port} on 127.0.0.1 is taken"
            ):
                await driver.start(plan.instance, 1)
            assert await guest.phase(driver, plan) is hypervisor.Phase.ENDED
            await driver.destroy(plan.instance, 1)


async def test_free_host_ports_are_different_and_reported(host: guest.Host, machine: hypervisor.Plan) -> None:
    forwards = (await info_of(host, machine)).forwards
    assert [(rule.name, rule.guest_port, rule.host_ip) for rule in forwards] == [
        ("web", 80, "127.0.0.1"),
        ("echo", 7007, "127.0.0.1"),
    ]
    assert len({rule.host_port for rule in forwards} - {0}) == 2


async def test_the_guest_cannot_reach_the_hosts_loopback(host: guest.Host, machine: hypervisor.Plan) -> None:
    """10.0.2.2 is the host's 127.0.0.1. Forwarded ports go on working, and as root the way out does too."""
    with socket.create_server(("127.0.0.1", 0)) as service:
        service.settimeout(0.2)
        port = service.getsockname()[1]
        await inside(host, machine, f"nc -w 3 10.0.2.2 {port} </dev/null")
        with pytest.raises(TimeoutError):
            service.accept()
    assert "boot_id" in await asyncio.to_thread(guest.page, await info_of(host, machine))
    if os.geteuid() == 0:
        with socket.create_server(("0.0.0.0", 0)) as outside:  # noqa: S104  reached by the host's other address
            address, port = _other_address(), outside.getsockname()[1]
            outside.settimeout(60)
            reaching = asyncio.ensure_future(inside(host, machine, f"nc -w 3 {address} {port} </dev/null"))
            connection, _peer = await asyncio.to_thread(outside.accept)
            connection.close()
            await reaching


async def test_without_a_fence_the_guest_gets_no_way_out(host: guest.Host) -> None:
    plan = host.plan()
    async with host.hypervisor(nft="no-such-program") as driver:
        info = await guest.boot(driver, plan)
    with socket.create_server(("0.0.0.0", 0)) as service:  # noqa: S104  reached by either address
        service.settimeout(0.2)
        for address in ("10.0.2.2", _other_address()):
            await inside(host, plan, f"nc -w 2 {address} {service.getsockname()[1]} </dev/null")
        with pytest.raises(TimeoutError):
            service.accept()
    assert "boot_id" in await asyncio.to_thread(guest.page, info)
    async with host.hypervisor() as driver:
        await driver.destroy(plan.instance, 1)


def _other_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])


# ---- the screen ------------------------------------------------------------------------------------------------


async def test_the_screen_asks_for_its_password(host: guest.Host, machine: hypervisor.Plan) -> None:
    info = await info_of(host, machine)
    assert info.vnc_password == "s3cr3t-l"  # VNC knows eight characters
    assert await _vnc_login(info.vnc_port, b"wrong") != 0
    assert await _vnc_login(info.vnc_port, b"s3cr3t-l") == 0


async def _vnc_login(port: int, password: bytes) -> int:
    """RFC 6143: version, security type 2, the challenge encrypted with the password; 0 is welcome."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(90):
            assert (await reader.readexactly(12)).startswith(b"RFB 003.008")
            writer.write(b"RFB 003.008\n")
            (count,) = await reader.readexactly(1)
            assert await reader.readexactly(count) == b"\x02", "VNC authentication is the only way in"
            writer.write(b"\x02")
            writer.write(await asyncio.to_thread(_des, password, await reader.readexactly(16)))
            (result,) = struct.unpack(">I", await reader.readexactly(4))
            return int(result)
    finally:
        writer.close()


def _des(password: bytes, challenge: bytes) -> bytes:
    """DES as VNC does it, each byte of the key with its bits reversed; by openssl, as Python has none."""
    key = bytes(int(f"{byte:08b}"[::-1], 2) for byte in password.ljust(8, b"\0"))
    words = ["openssl", "enc", "-des-ecb", "-nopad", "-provider", "legacy", "-provider", "default", "-K", key.hex()]
    return subprocess.run(words, input=challenge, capture_output=True, check=True).stdout


# ---- a disk that boots by itself -------------------------------------------------------------------------------


async def test_a_template_without_kernel_boots_from_its_disk(host: guest.Host, tmp_path: Path) -> None:
    """The firmware runs the disk's first sector, which here says one word on the serial console and halts."""
    word = b"covey boots\r\n"
    # mov dx,0x3f8; mov si,text; next: lodsb; out dx,al; loop next; hlt; jmp $
    code = (
        bytes.fromhex("31c08ed8fc baf803 be177c b9") + struct.pack("<H", len(word)) + bytes.fromhex("acee e2fc f4ebfd")
    )
    sector = (code.ljust(0x17, b"\0") + word).ljust(510, b"\0") + b"\x55\xaa"
    (tmp_path / "disk.raw").write_bytes(sector.ljust(1 << 20, b"\0"))
    convert = ["qemu-img", "convert", "-O", "qcow2", str(tmp_path / "disk.raw"), str(tmp_path / "disk.qcow2")]
    await asyncio.to_thread(subprocess.run, convert, check=True)
    image = hypervisor.Image(digest=model.Digest("sha256:" + "1" * 64), layers=(str(tmp_path / "disk.qcow2"),))
    plan = host.plan(image_=image, vram_mb=128)
    async with host.hypervisor() as driver:
        await driver.prepare(plan)
        await driver.start(plan.instance, 1)

        async def said() -> bool:
            return word.strip() in (await driver.console(plan.instance, 1))

        await guest.until("the disk's boot sector has spoken", said)
        assert await driver.info(plan.instance, 1) is None  # there is no guest agent
        await driver.destroy(plan.instance, 1)
