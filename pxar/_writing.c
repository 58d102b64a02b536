/* Small files made many in one call, and large ones written with holes; the GIL is released around the system calls.
 *
 * pxar/writing.py is the only user, and has the same in Python: the readable form, the oracle and the fallback.
 */

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030b0000
#endif
#define PY_SSIZE_T_CLEAN
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <Python.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define BLOCK 4096
#define SET_OWNER 1
#define SET_MODE 2
#define SET_ID (S_ISUID | S_ISGID)
/* Of an ENTRY item: header, then mode, flags, uid, gid, seconds, nanoseconds. */
#define ENTRY_SIZE 56
#define MODE_AT 16
#define UID_AT 32
#define GID_AT 36
#define SECONDS_AT 40
#define NANOSECONDS_AT 48

typedef struct {
    const char *name;
    const unsigned char *entry;
    Py_buffer content;
    int held; /* `content` is to be released */
} File;

typedef struct {
    uint64_t ino;
    int32_t created, owner, mode, time;
} Written;

static uint64_t
u64(const unsigned char *at)
{
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return le64toh(value);
}

static uint32_t
u32(const unsigned char *at)
{
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return le32toh(value);
}

/* Each byte equals the one before it, and the first is zero. */
static int
is_zero(const char *data, size_t size)
{
    return data[0] == 0 && memcmp(data, data + 1, size - 1) == 0;
}

static int
write_all(int fd, const char *data, size_t size, off_t offset)
{
    while (size) {
        ssize_t done = pwrite(fd, data, size, offset);
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) return errno;
        data += done;
        size -= (size_t)done;
        offset += done;
    }
    return 0;
}

static int
write_with_holes(int fd, const char *data, size_t size, off_t offset)
{
    size_t start = 0, at = 0;
    while (at < size) {
        size_t end = at + BLOCK - (size_t)((offset + (off_t)at) % BLOCK);
        if (end > size) end = size;
        if (is_zero(data + at, end - at)) {
            int error = write_all(fd, data + start, at - start, offset + (off_t)start);
            if (error) return error;
            start = end;
        }
        at = end;
    }
    return write_all(fd, data + start, size - start, offset + (off_t)start);
}

static void
write_one(int dir_fd, const File *file, int how, unsigned mode_mask, unsigned plain_mode, Written *written)
{
    struct stat found;
    size_t size = (size_t)file->content.len;
    int fd = openat(dir_fd, file->name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC | O_NOCTTY, 0600);

    if (fd < 0) {
        written->created = errno;
        return;
    }
    written->created = write_with_holes(fd, file->content.buf, size, 0);
    if (!written->created && (fstat(fd, &found) < 0 || ((size_t)found.st_size != size && ftruncate(fd, file->content.len) < 0)))
        written->created = errno;
    if (written->created) {
        unlinkat(dir_fd, file->name, 0);
        close(fd);
        return;
    }
    written->ino = found.st_ino;
    uid_t uid = u32(file->entry + UID_AT);
    gid_t gid = u32(file->entry + GID_AT);
    if (how & SET_OWNER && (found.st_uid != uid || found.st_gid != gid) && fchown(fd, uid, gid) < 0) written->owner = errno;
    unsigned mode = plain_mode;
    if (how & SET_MODE) {
        mode = (unsigned)u64(file->entry + MODE_AT) & mode_mask;
        if (!(how & SET_OWNER) || written->owner) mode &= ~(unsigned)SET_ID;
    }
    if (fchmod(fd, mode) < 0) written->mode = errno;
    struct timespec times[2] = {{0, UTIME_OMIT},
                                {(time_t)u64(file->entry + SECONDS_AT), (long)u32(file->entry + NANOSECONDS_AT)}};
    if (futimens(fd, times) < 0) written->time = errno;
    close(fd);
}

/* One thread: a second one for every other file of a batch made restores half as slow again, on tmpfs and ext4, for both
 * of them wait for the lock of the same folder. */
static PyObject *
write_files(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *list, *answer = NULL;
    int dir_fd, how;
    unsigned mode_mask, plain_mode;
    Py_ssize_t count, ready = 0;
    File *files = NULL;
    Written *written;

    if (!PyArg_ParseTuple(args, "iO!iII", &dir_fd, &PyList_Type, &list, &how, &mode_mask, &plain_mode)) return NULL;
    count = PyList_Size(list);
    answer = PyBytes_FromStringAndSize(NULL, count * (Py_ssize_t)sizeof(Written));
    files = calloc((size_t)count + 1, sizeof(File));
    if (!answer || !files) {
        PyErr_NoMemory();
        goto failed;
    }
    written = (Written *)PyBytes_AsString(answer);
    memset(written, 0, (size_t)count * sizeof(Written));
    for (; ready < count; ready++) {
        Py_ssize_t length;
        File *file = &files[ready];
        if (!PyArg_ParseTuple(PyList_GetItem(list, ready), "yy#y*", &file->name, &file->entry, &length, &file->content))
            goto failed;
        file->held = 1;
        if (length != ENTRY_SIZE) {
            PyErr_SetString(PyExc_ValueError, "an ENTRY item has 56 bytes");
            ready++;
            goto failed;
        }
    }
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < count; i++) write_one(dir_fd, &files[i], how, mode_mask, plain_mode, &written[i]);
    Py_END_ALLOW_THREADS
    goto done;
failed:
    Py_XDECREF(answer);
    answer = NULL;
done:
    for (Py_ssize_t i = 0; files && i < ready; i++)
        if (files[i].held) PyBuffer_Release(&files[i].content);
    free(files);
    return answer;
}

static PyObject *
write_sparse(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer data;
    long long offset;
    int fd, error;

    if (!PyArg_ParseTuple(args, "iy*L", &fd, &data, &offset)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    error = write_with_holes(fd, data.buf, (size_t)data.len, (off_t)offset);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&data);
    if (error) {
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"write_files", write_files, METH_VARARGS, "write_files(dir_fd, files, how, mode_mask, plain_mode) -> packed results"},
    {"write_sparse", write_sparse, METH_VARARGS, "write_sparse(fd, data, offset)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_writing", "Contents of restored files.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC
PyInit__writing(void)
{
    return PyModuleDef_Init(&module);
}
