"""The start script of a VM: when it runs, and what its end means."""

import base64

import msgspec

from covey import model
from covey.agent import hypervisor, records
from covey.decide import convergence

_HANDLERS = {0: convergence.After.STOP, 1: convergence.After.KEEP, 2: convergence.After.DELETE}


def monitored(record: records.Record) -> bool:
    """Whether the VM counts as booted only after its script ended well."""
    return record.spec.script is not None and record.spec.script.monitored and not record.script_ended


def due_in_background(record: records.Record) -> bool:
    script = record.spec.script
    return script is not None and not script.monitored and not record.script_ended and bool(record.script)


def job(record: records.Record, script: model.Script) -> hypervisor.Job:
    text = base64.b64decode(record.script).decode("utf-8", "surrogateescape")
    return hypervisor.Job(text=text, timeout_s=float(script.timeout_s), after_network=script.condition == 0)


def ended(record: records.Record, script: model.Script, result: hypervisor.JobResult) -> records.Record:
    """The record after a monitored script: with its result, and failed when it did not end well."""
    told = msgspec.structs.replace(
        record,
        script_ended=True,
        result=model.ScriptResult(return_code=result.return_code, did_timeout=result.did_timeout, errors=result.errors),
        stdout=base64.b64encode(result.stdout).decode(),
        stderr=base64.b64encode(result.stderr).decode(),
    )
    if result.return_code == 0 and not result.did_timeout:
        return told
    why = (
        f"the start script did not end within {script.timeout_s} s"
        if result.did_timeout
        else f"the start script failed with return code {result.return_code}"
    )
    return msgspec.structs.replace(
        told,
        stage=convergence.Stage.FAILED,
        message=why,
        after=_HANDLERS.get(script.fail_handler, convergence.After.STOP),
    )
