"""Nodes help each other: eight of them pull a new template, and about one copy of it leaves the registry."""

from tests.support import pulling

MIB = 1 << 20


def test_many_nodes_pull_a_new_template_and_one_copy_leaves_the_registry() -> None:
    with pulling.running(nodes=6, line_bytes_s=8 * MIB) as fleet:
        fleet.start()
        template = fleet.push(48 * MIB)
        took = fleet.pull(template)
        sent = fleet.registry_bytes()
        print(took, sent / MIB)
        for a in fleet.cloud.agents:
            print(a.log()[-3000:])
        assert sent < 1.5 * 48 * MIB
