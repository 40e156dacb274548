"""How the registry's refusals and faults look on the OCI paths: the specification's error codes and statuses.

Source: OCI distribution specification 1.1, "Error Codes". DISK_FULL is our own code, with status 507.
"""

import functools
from collections.abc import Awaitable, Callable

from covey import answer, errors, serve
from covey.client import oci
from covey.registry import blobs, catalog, manifests


def error_body(fault: answer.Fault) -> bytes:
    """The specification's error document."""
    code = fault.code or "UNKNOWN"
    return answer.ascii_json({"errors": [{"code": code, "message": fault.message}]})


def as_oci_fault(error: Exception) -> answer.Fault | None:
    """The fault to answer with; None for what is not the registry's business."""
    match error:
        case blobs.NoSession():
            return answer.Fault(404, str(error), code="BLOB_UPLOAD_UNKNOWN")
        case blobs.WrongDigest():
            return answer.Fault(400, str(error), code="DIGEST_INVALID")
        case blobs.DiskFull():
            return answer.Fault(507, str(error), code="DISK_FULL")
        case catalog.Missing():
            return answer.Fault(404, str(error), code="MANIFEST_UNKNOWN")
        case catalog.BlobMissing():
            return answer.Fault(404, str(error), code="MANIFEST_BLOB_UNKNOWN")
        case catalog.BlobNeeded() | catalog.ManifestNeeded() | catalog.DeletesOff():
            return answer.Fault(405, str(error), code="UNSUPPORTED")
        case catalog.Changed():
            return answer.Fault(412, str(error), code="DENIED")
        case manifests.BadManifest():
            return answer.Fault(400, str(error), code="MANIFEST_INVALID")
        case errors.Refused():
            return answer.Fault(409, str(error), code="DENIED")
    return None


def oci_path(handler: Callable[[serve.Call], Awaitable[object]]) -> serve.Handler:
    """A handler below /v2/: names are checked before it runs, and what it raises becomes the specification's error."""

    @functools.wraps(handler)
    async def guarded(call: serve.Call) -> object:
        _check_names(call)
        try:
            return await handler(call)
        except errors.CoveyError as error:
            fault = as_oci_fault(error)
            if fault is None:
                raise
            raise fault from error

    return guarded


def _check_names(call: serve.Call) -> None:
    name = call.params.get("name", "a")
    if not oci.valid_name(name):
        text = f"repository name {name!r}: lower-case words of letters and digits, separated by '/', '.', '_' or '-'"
        raise answer.Fault(400, text, code="NAME_INVALID")
    digest = call.params.get("digest", call.query.get("digest"))
    if digest is not None and not oci.valid_digest(digest):
        raise answer.Fault(400, f"{digest!r} is not {oci.DIGEST_FORM}", code="DIGEST_INVALID")
    reference = call.params.get("reference")
    if reference is not None and not oci.valid_tag(reference) and not oci.valid_digest(reference):
        code = "DIGEST_INVALID" if ":" in reference else "MANIFEST_INVALID"
        raise answer.Fault(400, f"{reference!r} is neither a tag nor {oci.DIGEST_FORM}", code=code)
