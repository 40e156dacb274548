"""Requests to an S3 store, signed: AWS Signature Version 4 in the Authorization header.

Source: https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html. For the few requests that the S3
library does not offer (`s3_join`). Keys of this registry are made of unreserved characters and slashes, so that paths
are the same encoded and not.
"""

import datetime
import hashlib
import hmac
import urllib.parse
from collections.abc import Mapping
from typing import NamedTuple


class Credentials(NamedTuple):
    """Whose requests they are, and where. `token`: of temporary credentials, else ""."""

    key: str
    secret: str
    token: str
    region: str

    def __repr__(self) -> str:
        return f"Credentials({self.key}, region={self.region})"


def signed(
    mine: Credentials,
    method: str,
    url: str,
    headers: Mapping[str, str],
    body: bytes,
    now: datetime.datetime,
) -> dict[str, str]:
    """`headers` (their names in lower case) and what must be sent beside them."""
    parts = urllib.parse.urlsplit(url)
    stamp = now.strftime("%Y%m%dT%H%M%SZ")
    scope = f"{stamp[:8]}/{mine.region}/s3/aws4_request"
    digest = hashlib.sha256(body).hexdigest()
    sent = {**headers, "host": parts.netloc, "x-amz-content-sha256": digest, "x-amz-date": stamp}
    if mine.token:
        sent["x-amz-security-token"] = mine.token
    names = ";".join(sorted(sent))
    listed = "".join(f"{name}:{sent[name].strip()}\n" for name in sorted(sent))
    query = "&".join(sorted(parts.query.split("&"))) if parts.query else ""
    request = "\n".join((method, parts.path or "/", query, listed, names, digest))
    text = "\n".join(("AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(request.encode()).hexdigest()))
    key = b"AWS4" + mine.secret.encode()
    for step in scope.split("/"):
        key = hmac.digest(key, step.encode(), "sha256")
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    credential = f"Credential={mine.key}/{scope}"
    sent["authorization"] = f"AWS4-HMAC-SHA256 {credential}, SignedHeaders={names}, Signature={signature}"
    return sent
