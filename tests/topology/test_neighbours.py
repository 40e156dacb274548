"""Nodes help each other: many pull a new template at once, and about one copy of it leaves the registry; a node that
dies in the middle of it is done without."""

from tests.support import pulling

MIB = 1 << 20
TEMPLATE_BYTES = 32 * MIB


def test_many_nodes_pull_a_new_template_and_one_copy_leaves_the_registry() -> None:
    with pulling.running(nodes=5, line_bytes_s=8 * MIB) as fleet:
        fleet.start()
        fleet.pull(fleet.push(TEMPLATE_BYTES))
        assert TEMPLATE_BYTES <= fleet.registry_bytes() <= 1.5 * TEMPLATE_BYTES


def test_when_the_node_dies_that_all_others_wait_for_the_next_one_goes_on_in_its_place() -> None:
    with pulling.running(nodes=4, line_bytes_s=8 * MIB) as fleet:
        fleet.start()
        ids = fleet.begin(fleet.push(TEMPLATE_BYTES), 4)
        fleet.cloud.until(lambda: fleet.registry_bytes() > TEMPLATE_BYTES // 4, what="a quarter has left the registry")
        first = min(ids)  # of those that were started at once, the one that the order begins with
        fleet.agent_of(first).kill()
        fleet.finish([id for id in ids if id != first])
        assert fleet.registry_bytes() <= 2 * TEMPLATE_BYTES


def test_while_no_registry_answers_a_node_pulls_all_of_it_from_another_one() -> None:
    """Manifest, config and layers; the controller knows the version from the first start."""
    with pulling.running(nodes=2, line_bytes_s=8 * MIB) as fleet:
        fleet.start()
        template = fleet.push(TEMPLATE_BYTES // 4)
        fleet.finish(fleet.begin(template, 1))
        fleet.cloud.registries[0].kill()
        fleet.finish(fleet.begin(template, 1))
