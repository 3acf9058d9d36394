"""What stores take for a request, in numbers: those that their makers publish, and round ones where they do not."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SERVICES", "Service"]


@dataclass(frozen=True, slots=True)
class Service:
    """A store as the model has it. Times in seconds, rates in requests and in bytes a second."""

    name: str
    about: str
    put_seconds: float
    get_seconds: float
    list_seconds: float
    delete_seconds: float
    puts_a_second: float
    gets_a_second: float
    rank_bytes_a_second: float
    total_bytes_a_second: float
    keys_a_page: int = 1000
    keys_a_delete: int = 1000
    whole_bytes: int | None = None  # what is longer goes up in parts
    part_bytes: int = 8 << 20  # as `stores.object` cuts them
    appendable: bool = False


S3 = Service(
    "s3",
    "an object store as S3, all keys of the run in one partition of its index",
    put_seconds=0.040,
    get_seconds=0.020,
    list_seconds=0.080,
    delete_seconds=0.150,  # of a thousand
    # https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance.html
    puts_a_second=3_500.0,
    gets_a_second=5_500.0,
    rank_bytes_a_second=1.25e9,  # one of eight GPUs behind 100 Gbit/s
    total_bytes_a_second=1.0e12,
    whole_bytes=8 << 20,
)
PARALLEL_FS = Service(
    "pfs",
    "a parallel file system with one metadata server",
    put_seconds=0.004,  # create, fsync, rename
    get_seconds=0.0005,
    list_seconds=0.005,
    delete_seconds=0.0005,
    puts_a_second=20_000.0,
    gets_a_second=60_000.0,
    rank_bytes_a_second=2.0e9,
    total_bytes_a_second=1.0e12,
    keys_a_delete=1,
    appendable=True,
)
SERVICES = {service.name: service for service in (S3, PARALLEL_FS)}
