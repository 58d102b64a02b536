"""The datastore: its bytes (blobs, chunks, indexes, manifests) and its rules (names, locks, order of writes).

docs/formats.md describes the bytes. They lie in a local folder, or in a bucket with a cache in front (`s3/`).

    store.py, creation.py, tree.py `Datastore`: create, open, remove; its folders; what is in it
    session.py, reader.py          one snapshot being written; one being read
    interface.py                   `ChunkStore`, `MetaStore`, `Backend`: what a backend is
    local_backend.py, local_chunks.py, local_meta.py   the local folder's
    names.py                       `Namespace`, `Group`, `Snapshot`, archive names, each checked
    codec.py, sha256.py            `ChunkCodec`: plain bytes to blobs and back; digests of many chunks at once
    blob.py                        the container of a chunk or small file
    fixed_index.py, dynamic_index.py, manifest.py   one format each
    prune.py, filters.py           which snapshots stay; which groups are meant
    gc.py, gc_status.py            garbage collection and its result
    gc_indexes.py, marked.py, sweep.py   its parts: finding indexes, digests it has marked, removal in a local folder
    usage_history.py               how full a store was after each collection
    upid.py                        the names of tasks
    changes.py                     notes, protection, owners, namespaces
    digests.py                     `DigestSet`: millions of digests, packed
    locks.py, files.py             locks that PBS respects; files that are whole or absent
    errors.py                      what can go wrong

Nothing is imported here: NumPy and cryptography cost start-up time.
"""
