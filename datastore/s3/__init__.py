"""S3: the client for buckets, and a datastore's chunks and files in one with a local cache in front.

    endpoint.py                    `Endpoint`: where a provider is and how it wants to be talked to
    signer.py, xml.py              the signature of a request; the XML of answers
    wire.py, http.py               an HTTP/1.1 connection with pinned certificates; a pool of them, over httpx
    bodies.py                      memory of answers, used again
    pacing.py                      token buckets and the gate that adapts to throttling
    calls.py                       one request, and what its answer means
    link.py                        `EndpointLink`: attempts, waits, time-outs, clocks, counted requests
    objects.py, client.py          objects, and `S3Client`: get, put, list, delete in one bucket
    keys.py                        object keys of a datastore, and back
    counters.py, counter_file.py   what it cost, and what a store has cost so far
    paging.py, errors.py           listings that must end; what can go wrong

    opening.py                     `S3Settings`, `open_store`: a datastore in a bucket
    lifecycle.py                   `create_store`, `destroy_store`
    chunks.py, meta.py             `S3ChunkStore`, `S3MetaStore`: see `datastore.interface`
    cache.py, cache_files.py       which chunks are kept here; what their files say about objects
    cache_growth.py                what other processes have put into the cache
    sweep.py, sweep_cache.py       garbage collection: what is unused goes, from the bucket and from the cache
    probe.py                       what an endpoint and a bucket can do
    refresh.py, reconcile.py       metadata fetched anew; what is here compared with what is in the bucket
    chunk_locks.py, state.py, in_use.py   who may do what: chunks, the folder, the whole store
    listing.py                     chunks compared with the bucket's listing
    versions.py                    what is not current any more in buckets with versioning
    unknown.py, settling.py        deletes that may still happen, and what is stored meanwhile
    pending.py                     deletes that must be done later

The rules (R2, R14, ...) that comments name are those of docs/s3-rules.md, which this package follows.
"""
