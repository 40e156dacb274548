"""Signed requests, and what S3 takes to be joined."""

import datetime
import urllib.parse

import pytest
from botocore import auth, awsrequest, credentials  # type: ignore[import-untyped]

from covey.registry import s3_join, s3_sign

NOW = datetime.datetime(2013, 5, 24, tzinfo=datetime.UTC)
MIB = 1 << 20


def test_the_example_of_the_specification_is_signed_as_there() -> None:
    """https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html, "Example: GET Object"."""
    mine = s3_sign.Credentials("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "", "us-east-1")
    url = "https://examplebucket.s3.amazonaws.com/test.txt"
    sent = s3_sign.signed(mine, "GET", url, {"range": "bytes=0-9"}, b"", NOW)
    assert sent["authorization"].endswith("f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41")
    assert mine.secret not in repr(mine) and mine.secret not in str(sent)


@pytest.mark.parametrize("query", ["uploads=", "partNumber=7&uploadId=a%2Fb%3D", "uploadId=x"])
def test_another_implementation_signs_the_same(query: str) -> None:
    mine = s3_sign.Credentials("key", "secret", "token", "eu-west-3")
    url = f"http://127.0.0.1:9000/bucket/uploads/aa/data.bb?{query}"
    headers = {"x-amz-copy-source": "/bucket/uploads/aa/data.cc"}
    now = datetime.datetime.now(datetime.UTC)
    sent = s3_sign.signed(mine, "PUT", url, headers, b"<xml/>", now)
    plain = url.partition("?")[0]
    request = awsrequest.AWSRequest(
        "PUT", plain, headers, b"<xml/>", params=dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    )
    signer = auth.S3SigV4Auth(credentials.Credentials("key", "secret", "token"), "s3", "eu-west-3")
    request.context["timestamp"] = sent["x-amz-date"]
    request.headers["X-Amz-Date"] = sent["x-amz-date"]
    request.headers["X-Amz-Security-Token"] = "token"
    request.headers["X-Amz-Content-SHA256"] = sent["x-amz-content-sha256"]
    theirs = signer.signature(signer.string_to_sign(request, signer.canonical_request(request)), request)
    assert sent["authorization"].endswith(f"Signature={theirs}")


@pytest.mark.parametrize(
    ("sizes", "fits"),
    [
        ([], False),
        ([0], False),
        ([1], True),
        ([5 * MIB, 1], True),
        ([5 * MIB - 1, 1], False),
        ([100 << 30], True),
        ([5 * MIB] * 10_000, True),
        ([5 * MIB] * 10_001, False),
    ],
)
def test_what_the_store_can_join(sizes: list[int], fits: bool) -> None:
    assert s3_join.fits([s3_join.Source(f"k{number}", size) for number, size in enumerate(sizes)]) is fits


def test_pieces_follow_each_other_and_none_is_too_small_or_too_large() -> None:
    sizes = [(1 << 30) + 1, 5 * MIB, 5 << 30, 3]
    pieces = s3_join.pieces([s3_join.Source(f"k{number}", size) for number, size in enumerate(sizes)])
    for number, size in enumerate(sizes):
        mine = [piece for piece in pieces if piece.key == f"k{number}"]
        assert [piece.start for piece in mine] == [0, *(piece.end for piece in mine[:-1])]
        assert mine[-1].end == size
    assert all(5 * MIB <= piece.end - piece.start <= 1 << 30 for piece in pieces[:-1])
