/* The two inner loops of change detection: which files are unchanged, and their entries as they stand in an archive.
 *
 * pxar/runs.py is the only user, and has the readable form, the oracle and the fallback. Both functions stop in front of
 * whatever is not the usual case, and leave that to their caller.
 */

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030b0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <endian.h>
#include <stdint.h>
#include <string.h>

#define ITEM_FILENAME 0x16701121063917b3ULL
#define ITEM_PAYLOAD_REF 0x419d3d6bc4ba977eULL
#define HEADER_SIZE 16
#define REFERENCE_SIZE 32 /* of a whole PAYLOAD_REF */
#define ROW_SIZE 24
#define ENTRY_V1_SIZE 48 /* of the shortest metadata */
#define MAX_METADATA (64 << 20)
#define MAX_NAME 4096
/* Longer names are compared by name. */
#define MAX_COMPARED 255
#define TYPE_MASK 0170000
#define TYPE_FILE 0100000
/* Bytes of entries that are enough for one call. */
#define ENOUGH (256 << 10)

static void
put64(char *to, uint64_t value)
{
    value = htole64(value);
    memcpy(to, &value, sizeof value);
}

static uint64_t
get64(const char *from)
{
    uint64_t value;
    memcpy(&value, from, sizeof value);
    return le64toh(value);
}

/* An integer of 0 to 2^63 - 1 in `*value`; 0 if it is none. */
static int
natural(PyObject *object, int64_t *value)
{
    *value = object && PyLong_Check(object) ? PyLong_AsLongLong(object) : -1;
    if (*value < 0) PyErr_Clear();
    return *value >= 0;
}

static int
bytes_of(PyObject *object, char **data, Py_ssize_t *size)
{
    return object && PyBytes_Check(object) && PyBytes_AsStringAndSize(object, data, size) == 0;
}

/* ---- SipHash-2-4 ---- */

#define ROTATED(value, bits) ((value) << (bits) | (value) >> (64 - (bits)))
#define ROUND                                   \
    do {                                        \
        v0 += v1, v1 = ROTATED(v1, 13) ^ v0;    \
        v0 = ROTATED(v0, 32), v2 += v3;         \
        v3 = ROTATED(v3, 16) ^ v2, v0 += v3;    \
        v3 = ROTATED(v3, 21) ^ v0, v2 += v1;    \
        v1 = ROTATED(v1, 17) ^ v2;              \
        v2 = ROTATED(v2, 32);                   \
    } while (0)

static uint64_t
siphash24(const char *data, size_t size)
{
    const uint64_t key0 = 0x83ac3f1cfbb450dbULL, key1 = 0xaa4f1b6879369fbdULL;
    uint64_t v0 = key0 ^ 0x736f6d6570736575ULL, v1 = key1 ^ 0x646f72616e646f6dULL;
    uint64_t v2 = key0 ^ 0x6c7967656e657261ULL, v3 = key1 ^ 0x7465646279746573ULL;
    char last[8] = {0};
    size_t whole = size - size % 8;

    for (size_t at = 0; at <= whole; at += 8) {
        uint64_t word;
        if (at < whole) {
            word = get64(data + at);
        } else {
            memcpy(last, data + whole, size - whole);
            last[7] = (char)size;
            word = get64(last);
        }
        v3 ^= word;
        ROUND;
        ROUND;
        v0 ^= word;
    }
    v2 ^= 0xff;
    ROUND;
    ROUND;
    ROUND;
    ROUND;
    return v0 ^ v1 ^ v2 ^ v3;
}

/* ---- comparing ---- */

typedef struct {
    PyObject *name, *meta, *size;
    int64_t length; /* of the content */
} File;

/* Whether `found`, an entry of a scan, is a plain file with one name and nothing to warn of. */
static int
is_plain_file(PyObject *found, File *file)
{
    int64_t mode, nlink, warning;

    if (!found || !PyTuple_Check(found) || PyTuple_Size(found) < 9) return 0;
    if (!natural(PyTuple_GetItem(found, 0), &mode) || (mode & TYPE_MASK) != TYPE_FILE) return 0;
    if (!natural(PyTuple_GetItem(found, 5), &nlink) || nlink != 1) return 0;
    if (!natural(PyTuple_GetItem(found, 8), &warning) || warning) return 0;
    file->meta = PyTuple_GetItem(found, 1);
    file->size = PyTuple_GetItem(found, 2);
    return natural(file->size, &file->length);
}

/* Whether the file's entry stands at `at` of `data`; then where its payload lies. */
static int
stands_at(const File *file, const char *data, Py_ssize_t size, int64_t at, int64_t *offset)
{
    char *name, *meta, head[HEADER_SIZE];
    Py_ssize_t name_size, meta_size;

    if (!bytes_of(file->name, &name, &name_size) || !bytes_of(file->meta, &meta, &meta_size)) return 0;
    if (name_size > MAX_COMPARED || at < 0 || at > size) return 0;
    if (size - at < HEADER_SIZE + name_size + 1 + meta_size + REFERENCE_SIZE) return 0;
    data += at;
    put64(head, ITEM_FILENAME);
    put64(head + 8, (uint64_t)(HEADER_SIZE + name_size + 1));
    if (memcmp(data, head, HEADER_SIZE)) return 0;
    data += HEADER_SIZE;
    if (memcmp(data, name, (size_t)name_size) || data[name_size]) return 0;
    data += name_size + 1;
    if (memcmp(data, meta, (size_t)meta_size)) return 0;
    data += meta_size;
    uint64_t place = get64(data + HEADER_SIZE);
    put64(head, ITEM_PAYLOAD_REF);
    put64(head + 8, REFERENCE_SIZE);
    if (memcmp(data, head, HEADER_SIZE) || get64(data + HEADER_SIZE + 8) != (uint64_t)file->length) return 0;
    *offset = (int64_t)place;
    return place <= INT64_MAX;
}

static PyObject *
compare(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *names, *scanned, *positions, *cache;
    const char *data;
    Py_ssize_t index, turn, size;
    long long base, start, end;
    int64_t gap = -1;

    if (!PyArg_ParseTuple(args, "O!O!nO!ny#LO!LL", &PyList_Type, &names, &PyList_Type, &scanned, &index, &PyList_Type,
                          &positions, &turn, &data, &size, &base, &PyList_Type, &cache, &start, &end))
        return NULL;
    Py_ssize_t count = PyList_Size(names), last = PyList_Size(positions);
    if (PyList_Size(scanned) < count) count = PyList_Size(scanned);
    if (index < 0 || turn < 0) {
        PyErr_SetString(PyExc_ValueError, "below zero");
        return NULL;
    }
    for (; index < count && turn < last; index++, turn++) {
        File file = {.name = PyList_GetItem(names, index)};
        int64_t at, offset;
        if (!is_plain_file(PyList_GetItem(scanned, index), &file)) break;
        if (!natural(PyList_GetItem(positions, turn), &at)) break;
        if (!stands_at(&file, data, size, at - base, &offset)) break;
        if (file.length > INT64_MAX - HEADER_SIZE || offset > INT64_MAX - HEADER_SIZE - file.length) break;
        if (offset != end) {
            gap = offset;
            break;
        }
        end += HEADER_SIZE + file.length;
        PyObject *place = PyLong_FromLongLong(offset - start);
        PyObject *entry = place ? PyTuple_Pack(5, file.name, file.meta, file.size, place, Py_None) : NULL;
        Py_XDECREF(place);
        if (!entry) return NULL;
        int failed = PyList_Append(cache, entry);
        Py_DECREF(entry);
        if (failed) return NULL;
    }
    return Py_BuildValue("nnLL", index, turn, end, (long long)gap);
}

/* ---- encoding ---- */

typedef struct {
    char *name, *meta;
    Py_ssize_t name_size, meta_size;
    int64_t size, offset;
} Entry;

/* Whether `object` is a file of the cache that can be written as it is, not before `earliest`. */
static int
is_writable(PyObject *object, int64_t base, int64_t earliest, Entry *entry)
{
    if (!object || !PyTuple_CheckExact(object) || PyTuple_Size(object) != 5) return 0;
    if (PyTuple_GetItem(object, 4) != Py_None) return 0;
    if (!bytes_of(PyTuple_GetItem(object, 0), &entry->name, &entry->name_size)) return 0;
    if (!bytes_of(PyTuple_GetItem(object, 1), &entry->meta, &entry->meta_size)) return 0;
    if (!natural(PyTuple_GetItem(object, 2), &entry->size)) return 0;
    if (!natural(PyTuple_GetItem(object, 3), &entry->offset)) return 0;
    if (entry->name_size < 1 || entry->name_size > MAX_NAME || entry->name[0] == '.') return 0;
    if (memchr(entry->name, '/', (size_t)entry->name_size) || memchr(entry->name, 0, (size_t)entry->name_size)) return 0;
    if (entry->meta_size < ENTRY_V1_SIZE || entry->meta_size > MAX_METADATA) return 0;
    if (entry->offset > INT64_MAX - base) return 0;
    entry->offset += base;
    return entry->offset >= earliest && entry->size <= INT64_MAX - HEADER_SIZE &&
           entry->offset <= INT64_MAX - HEADER_SIZE - entry->size;
}

static PyObject *
encode(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *entries, *result = NULL;
    Py_ssize_t first;
    long long base, position, earliest;
    size_t used = 0, room = 0, count = 0, row_room = 0;
    char *items = NULL, *rows = NULL;

    if (!PyArg_ParseTuple(args, "O!nLLL", &PyList_Type, &entries, &first, &base, &position, &earliest)) return NULL;
    Py_ssize_t total = PyList_Size(entries);
    if (first < 0 || base < 0 || position < 0) {
        PyErr_SetString(PyExc_ValueError, "below zero");
        return NULL;
    }
    for (Py_ssize_t index = first; index < total && used < ENOUGH; index++) {
        Entry entry;
        if (!is_writable(PyList_GetItem(entries, index), base, earliest, &entry)) break;
        size_t size = HEADER_SIZE + (size_t)entry.name_size + 1 + (size_t)entry.meta_size + REFERENCE_SIZE;
        if (used + size > room) {
            room = used + size + 64 * 1024;
            char *larger = PyMem_Realloc(items, room);
            if (!larger) goto no_memory;
            items = larger;
        }
        if (count == row_room) {
            row_room += 512;
            char *larger = PyMem_Realloc(rows, row_room * ROW_SIZE);
            if (!larger) goto no_memory;
            rows = larger;
        }
        char *row = rows + count++ * ROW_SIZE, *to = items + used;
        put64(row, siphash24(entry.name, (size_t)entry.name_size));
        put64(row + 8, (uint64_t)position + used);
        put64(row + 16, size);
        put64(to, ITEM_FILENAME);
        put64(to + 8, (uint64_t)(HEADER_SIZE + entry.name_size + 1));
        to += HEADER_SIZE;
        memcpy(to, entry.name, (size_t)entry.name_size);
        to += entry.name_size;
        *to++ = 0;
        memcpy(to, entry.meta, (size_t)entry.meta_size);
        to += entry.meta_size;
        put64(to, ITEM_PAYLOAD_REF);
        put64(to + 8, REFERENCE_SIZE);
        put64(to + 16, (uint64_t)entry.offset);
        put64(to + 24, (uint64_t)entry.size);
        used += size;
        earliest = entry.offset + HEADER_SIZE + entry.size;
    }
    result = Py_BuildValue("ny#y#L", (Py_ssize_t)count, items ? items : "", (Py_ssize_t)used, rows ? rows : "",
                           (Py_ssize_t)(count * ROW_SIZE), earliest);
    goto done;
no_memory:
    PyErr_NoMemory();
done:
    PyMem_Free(items);
    PyMem_Free(rows);
    return result;
}

static PyMethodDef methods[] = {
    {"compare", compare, METH_VARARGS, "compare(names, scanned, index, positions, turn, data, base, cache, start, end)"},
    {"encode", encode, METH_VARARGS, "encode(entries, first, base, position, earliest)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_runs", "Runs of unchanged files.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC
PyInit__runs(void)
{
    return PyModuleDef_Init(&module);
}
