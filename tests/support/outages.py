"""Outages of a cloud in the lab, by name, and one way to run them under load.

    load = outages.run(cloud, url, outages.FAULTS["controller kill -9"], label="kill", mix=(open_load.Kind.GET,))

A fault is a context: it happens at its begin and is over at its end; what it is of (the leader, a controller) is chosen
at the begin. `run` gives the load a quiet time before, some seconds under the fault, and some after it.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from tests.support import lab_cloud, open_load

Fault = Callable[[lab_cloud.Cloud], contextlib.AbstractContextManager[object]]


@contextlib.contextmanager
def _killed(cloud: lab_cloud.Cloud, program: lab_cloud.Program) -> Iterator[None]:
    program.kill()
    yield
    program.start()
    cloud.wait_ready(program)


@contextlib.contextmanager
def _frozen(cloud: lab_cloud.Cloud, program: lab_cloud.Program) -> Iterator[None]:
    program.stop()
    yield
    program.cont()
    cloud.wait_ready(program)


@contextlib.contextmanager
def _isolated(cloud: lab_cloud.Cloud, program: lab_cloud.Program) -> Iterator[None]:
    cloud.lab.isolate(program.host.name)
    yield
    cloud.lab.heal()
    cloud.wait_ready(program)


@contextlib.contextmanager
def _without_quorum(cloud: lab_cloud.Cloud, program: lab_cloud.Program) -> Iterator[None]:
    for member in cloud.members:
        cloud.lab.cut(program.host.name, member.host.name)
    yield
    cloud.lab.heal()
    cloud.wait_ready(program)


@contextlib.contextmanager
def _restarted_in_turn(cloud: lab_cloud.Cloud) -> Iterator[None]:
    """Each controller is asked to end (SIGTERM), started again, and green before the next one's turn."""
    for controller in cloud.controllers:
        controller.term()
        controller.wait()
        controller.start()
        cloud.wait_ready(controller)
    yield


FAULTS: Mapping[str, Fault] = {
    "controller kill -9": lambda cloud: _killed(cloud, cloud.controllers[0]),
    "controller SIGSTOP": lambda cloud: _frozen(cloud, cloud.controllers[0]),
    "controller's cable out": lambda cloud: _isolated(cloud, cloud.controllers[0]),
    "controller cut off from etcd": lambda cloud: _without_quorum(cloud, cloud.controllers[0]),
    "rolling restart": _restarted_in_turn,
    "etcd leader kill -9": lambda cloud: _killed(cloud, cloud.leader()),
    "etcd leader SIGSTOP": lambda cloud: _frozen(cloud, cloud.leader()),
    "etcd leader isolated": lambda cloud: _isolated(cloud, cloud.leader()),
}


def run(
    cloud: lab_cloud.Cloud,
    url: str,
    fault: Fault,
    *,
    label: str,
    mix: Sequence[open_load.Kind],
    quiet_s: float = 1.0,
    under_s: float = 3.0,
    after_s: float = 1.0,
    patience_s: float = open_load.CLIENT_S,
) -> open_load.Load:
    """The load with the fault in its midst, its last answer included. The load remembers when the fault
    began, and by when it had. `patience_s` is each client's."""
    with open_load.running(cloud, url, label=label, mix=mix, patience_s=patience_s) as load:
        load.wait(quiet_s)
        load.fault_at_s = load.now_s
        with fault(cloud):
            load.fault_has_come_s = load.now_s
            load.wait(under_s)
        load.wait(after_s)
    return load
