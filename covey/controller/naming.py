"""Names of VMs from ``name_template``. Pure: the same instance has the same name at every poll."""

import re

from covey import model

PREFIX = "covey-"
_LIMIT = 80  # longer names break an agent of one CI server
_VARIABLE = re.compile(r"\$(template_name|template_id|instance_id|node_id|node_name|tag|ts)\b")


def vm_name(instance: model.Instance, node_name: str) -> str:
    """The prefix and the template with its variables filled in; without a template the instance's id."""
    values = {
        "template_name": instance.spec.template_name,
        "template_id": instance.spec.template,
        "instance_id": instance.id,
        "node_id": instance.node,
        "node_name": node_name,
        "tag": instance.spec.tag,
        "ts": str(instance.created_ns),
    }
    text = _VARIABLE.sub(lambda found: values[found.group(1)], instance.spec.name_template) or instance.id
    return (PREFIX + text)[:_LIMIT]
