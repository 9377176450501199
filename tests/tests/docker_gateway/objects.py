"""Objects of S3, put and got: large ones, in parts, by chunks with signatures, and under odd names."""

import os
import sys

import boto3
from botocore.config import Config

NAMES = [
    "plain", "a b", "a//b", "/lead", "end/", "..", "./x/../y", "a+b%20c%2Fd", "\u00fc/\u00f6?x=1&y=2", 'q"<>{}|\\^`',
    "tab\tx", "#fragment", "x;y=z,$@!*'()",
]


def main(endpoint, size):
    config = Config(s3={"addressing_style": "path"})
    credentials = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    s3 = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", config=config, **credentials)
    bucket = f"objects-{os.getpid()}"
    s3.create_bucket(Bucket=bucket)

    def same(key, body):
        assert s3.get_object(Bucket=bucket, Key=key)["Body"].read() == body, key

    for name in NAMES:
        s3.put_object(Bucket=bucket, Key=name, Body=name.encode())
        same(name, name.encode())
    listed = sorted(each["Key"] for each in s3.list_objects_v2(Bucket=bucket)["Contents"])
    assert listed == sorted(NAMES), listed
    large = os.urandom(1 << 20) * (int(size) >> 20)
    s3.put_object(Bucket=bucket, Key="large", Body=large)
    same("large", large)
    assert s3.head_object(Bucket=bucket, Key="large")["ContentLength"] == len(large)
    assert s3.get_object(Bucket=bucket, Key="large", Range="bytes=5-14")["Body"].read() == large[5:15]
    part = large[: 6 << 20]
    upload = s3.create_multipart_upload(Bucket=bucket, Key="parts")["UploadId"]
    number = {"Bucket": bucket, "Key": "parts", "UploadId": upload}
    parts = [{"PartNumber": n, "ETag": s3.upload_part(PartNumber=n, Body=part, **number)["ETag"]} for n in (1, 2)]
    s3.complete_multipart_upload(MultipartUpload={"Parts": parts}, **number)
    same("parts", part * 2)
    for name in [*NAMES, "large", "parts"]:
        s3.delete_object(Bucket=bucket, Key=name)
    s3.delete_bucket(Bucket=bucket)
    print("all objects are what they were")


main(*sys.argv[1:])
