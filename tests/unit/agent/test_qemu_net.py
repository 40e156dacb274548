"""Which ports are forwarded, and reading back what QEMU made of them."""

import pytest

from covey import errors, model
from covey.agent import qemu_net

SPEC = model.Spec(
    template=model.TemplateId("t"),
    template_name="t",
    tag="v",
    version=0,
    digest=model.Digest("d"),
    arch=model.Arch.AMD64,
)
# QEMU 7.2's answer to "info usernet"
USERNET = """Hub -1 (net0):\r
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r
  TCP[ESTABLISHED]   22       127.0.0.1 18080       10.0.2.15    80     0     0\r
  TCP[HOST_FORWARD]  15       127.0.0.1 18080       10.0.2.15    80     0     0\r
  TCP[HOST_FORWARD]  16       127.0.0.1 40001       10.0.2.15    80     0     0\r
  TCP[HOST_FORWARD]  17       127.0.0.1 40002       10.0.2.15    22     0     0\r
"""


def rule(name: str, guest_port: int, host_port: int = 0, **more: str) -> model.Forward:
    return model.Forward(name=name, guest_port=guest_port, host_port=host_port, **more)


def spec(*forwards: model.Forward) -> model.Spec:
    return model.Spec(
        template=SPEC.template,
        template_name="t",
        tag="v",
        version=0,
        digest=SPEC.digest,
        arch=SPEC.arch,
        forwards=forwards,
    )


def test_the_templates_ports_unless_the_instance_says_otherwise() -> None:
    assert qemu_net.forwards(SPEC, "http:80, ssh:22:2222", "10.1.1.1") == (
        rule("http", 80, host_ip="10.1.1.1"),
        rule("ssh", 22, 2222, host_ip="10.1.1.1"),
    )
    own = rule("web", 8080, 9090, host_ip="127.0.0.1")
    assert qemu_net.forwards(spec(own), "http:80", "10.1.1.1") == (own,)


@pytest.mark.parametrize(
    "wrong",
    [
        rule("x", 0),
        rule("x", 70000),
        rule("x", 80, -1),
        rule("x", 80, protocol="udp"),
        rule("x", 80, host_ip="::1"),
        rule("x", 80, host_ip="127.0.0.1,restrict=off"),
    ],
)
def test_what_cannot_be_forwarded_is_said(wrong: model.Forward) -> None:
    with pytest.raises(errors.HypervisorError, match="port forwarding x"):
        qemu_net.forwards(spec(wrong), "", "127.0.0.1")


def test_a_template_with_nonsense() -> None:
    with pytest.raises(errors.HypervisorError, match="'http' is not name:guest_port"):
        qemu_net.forwards(SPEC, "http", "127.0.0.1")


def test_host_ports_are_read_back_each_for_its_own_rule() -> None:
    wanted = (rule("any", 80), rule("fixed", 80, 18080), rule("ssh", 22), rule("absent", 99))
    assert [(found.name, found.host_port) for found in qemu_net.found(wanted, USERNET)] == [
        ("any", 40001),
        ("fixed", 18080),
        ("ssh", 40002),
    ]


def test_a_refused_port_names_the_rule() -> None:
    said = "qemu: -netdev user,...: Could not set up host forwarding rule 'tcp:127.0.0.1:2222-:22'"
    assert "port forwarding ssh: host port 2222 on 127.0.0.1 is taken" in qemu_net.refused(
        said, [rule("ssh", 22, 2222)]
    )
    assert qemu_net.refused("something else", []) == ""
