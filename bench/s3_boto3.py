"""The peer of `s3.py`: objects of 4 MiB through boto3, in threads. Reads what to do as JSON, prints the seconds.

For the interpreter that has boto3, so nothing of Fleece is imported. Its start and first connection are not counted.
"""

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

SIZE = 4 << 20


def main() -> None:
    import boto3
    import urllib3
    from botocore.config import Config

    urllib3.disable_warnings()
    job: dict[str, Any] = json.load(sys.stdin)
    config = Config(max_pool_connections=job["parallel"], s3={"addressing_style": "path"})
    client = boto3.client(
        "s3",
        endpoint_url=job["url"],
        aws_access_key_id=job["access-key"],
        aws_secret_access_key=job["secret"],
        region_name=job["region"],
        verify=job["certificate"] or True,
        config=config,
    )
    client.list_objects_v2(Bucket=job["bucket"], MaxKeys=1)
    keys: list[str] = job["keys"]
    bodies = [os.urandom(SIZE) for _ in range(16)] if job["what"] == "upload" else []

    def upload(number: int) -> None:
        client.put_object(Bucket=job["bucket"], Key=keys[number], Body=bodies[number % len(bodies)])

    def download(number: int) -> None:
        answer = client.get_object(Bucket=job["bucket"], Key=keys[number])
        if len(answer["Body"].read()) != SIZE:
            raise SystemExit("an object came short")

    with ThreadPoolExecutor(job["parallel"]) as threads:
        started, used = time.perf_counter(), time.process_time()
        list(threads.map(upload if job["what"] == "upload" else download, range(len(keys))))
        seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "cpu": time.process_time() - used}))


if __name__ == "__main__":
    main()
