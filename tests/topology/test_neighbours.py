"""Nodes help each other: many pull a new template at once, and about one copy of it leaves the registry."""

from tests.support import pulling

MIB = 1 << 20
TEMPLATE_BYTES = 32 * MIB


def test_many_nodes_pull_a_new_template_and_one_copy_leaves_the_registry() -> None:
    with pulling.running(nodes=5, line_bytes_s=8 * MIB) as fleet:
        fleet.start()
        fleet.pull(fleet.push(TEMPLATE_BYTES))
        assert TEMPLATE_BYTES <= fleet.registry_bytes() <= 1.5 * TEMPLATE_BYTES
