/* Names of a folder and the metadata of many of its entries, one call each, encoded as they stand in an archive.
 *
 * pxar/filesystem.py is the only user; pxar/filesystem_python.py is the readable form, the oracle and the fallback.
 * What is read, in which order, and which errors count: docs/formats.md, "File metadata". Every call releases the GIL
 * once, for all its system calls; Python objects are made at the end.
 */

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030b0000
#endif
#define PY_SSIZE_T_CLEAN
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <Python.h>
#include <dirent.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

#define ITEM_ENTRY 0xd5956474e588acefULL
#define ITEM_XATTR 0x0dab0229b57dcd03ULL
#define ITEM_ACL_USER 0x2ce8540a457d55b8ULL
#define ITEM_ACL_GROUP 0x136e3eceb04c03abULL
#define ITEM_ACL_GROUP_OBJ 0x10868031e9582876ULL
#define ITEM_ACL_DEFAULT 0xbbbb13415a6896f5ULL
#define ITEM_ACL_DEFAULT_USER 0xc89357b40532cd1fULL
#define ITEM_ACL_DEFAULT_GROUP 0xf90a8a5816038ffeULL
#define ITEM_FCAPS 0x2da9dd9db5f7fb67ULL
#define ITEM_QUOTA_PROJID 0xe07540e82f7d1cbbULL
#define HEADER_SIZE 16
#define ENTRY_SIZE (HEADER_SIZE + 40)
#define FLAGS_OFFSET (HEADER_SIZE + 8)
#define MISSING UINT64_MAX

/* The bits of pxar/features.py that say what is read. */
#define FEATURE_FAT 0xe000ULL
#define FEATURE_XATTRS 0x10000000ULL
#define FEATURE_ACL 0x20000000ULL
#define FEATURE_FCAPS 0x80000000ULL
#define FEATURE_QUOTA_PROJID 0x100000000ULL

#define GETFLAGS 0x80086601UL           /* FS_IOC_GETFLAGS; the kernel writes an int */
#define FSGETXATTR 0x801c581fUL         /* FS_IOC_FSGETXATTR */
#define FAT_GET_ATTRIBUTES 0x80047210UL /* FAT_IOCTL_GET_ATTRIBUTES */

/* The kernel allocates and clears a buffer of the size that is asked for, so 64 KiB are asked for only where needed. */
#define SMALL 1024
#define LARGE 65536
#define NAME_LIMIT 255
/* What readers take of one: name, NUL and value. */
#define XATTR_LIMIT (255 + 65536)
/* Extended attributes of one entry together; readers take 64 MiB of metadata. */
#define XATTRS_LIMIT (60u << 20)
/* How often an entry may change its type under us before it is left alone. */
#define ATTEMPTS 4

/* ---- a growing buffer; `failed` once memory has run out ---- */

typedef struct {
    char *data;
    size_t used, room;
    int failed;
} Bytes;

static char *
extend(Bytes *bytes, size_t length)
{
    if (bytes->failed) return NULL;
    if (bytes->room - bytes->used < length) {
        size_t room = bytes->room * 2 > bytes->used + length ? bytes->room * 2 : bytes->used + length + SMALL;
        char *data = realloc(bytes->data, room);
        if (!data) {
            bytes->failed = 1;
            return NULL;
        }
        bytes->data = data;
        bytes->room = room;
    }
    bytes->used += length;
    return bytes->data + bytes->used - length;
}

static void
append(Bytes *bytes, const void *data, size_t length)
{
    char *place = extend(bytes, length);
    if (place && length) memcpy(place, data, length);
}

static void
put64(Bytes *bytes, uint64_t value)
{
    value = htole64(value);
    append(bytes, &value, sizeof value);
}

static void
put_header(Bytes *bytes, uint64_t type, size_t content)
{
    put64(bytes, type);
    put64(bytes, HEADER_SIZE + content);
}

/* ---- what is found out about one entry ---- */

typedef struct Reader Reader;

typedef struct {
    const Reader *reader;     /* that found this, once there are metadata */
    int code;    /* 0, the errno of opening it, or minus the errno of reading its attributes */
    int warning; /* E2BIG: extended attributes were left out */
    int fd;      /* kept open if asked for, else -1 */
    mode_t mode;
    off_t size;
    dev_t dev, rdev;
    ino_t ino;
    nlink_t nlink;
    size_t meta, meta_length; /* in Reader.out */
    size_t target, target_length;
    int has_target;
} Found;

/* Of one thread. */
struct Reader {
    uint64_t features;
    int skip_e2big, keep_open;
    Bytes out;                           /* metadata and targets, one after the other */
    Bytes access, standard, fcaps, list; /* raw values of the current entry; `standard` is the default ACL */
    int has_access, has_standard, has_fcaps;
    char small[SMALL], name_list[SMALL];
};

static void
reader_free(Reader *reader)
{
    free(reader->out.data);
    free(reader->access.data);
    free(reader->standard.data);
    free(reader->fcaps.data);
    free(reader->list.data);
}

static int
reader_failed(const Reader *reader)
{
    return reader->out.failed || reader->access.failed || reader->standard.failed || reader->fcaps.failed ||
           reader->list.failed;
}

static void
take_stat(Reader *reader, Found *found, const struct stat *st)
{
    found->reader = reader;
    found->mode = st->st_mode;
    found->size = st->st_size;
    found->dev = st->st_dev;
    found->rdev = st->st_rdev;
    found->ino = st->st_ino;
    found->nlink = st->st_nlink;
    found->meta = reader->out.used;
    found->warning = 0;
    put_header(&reader->out, ITEM_ENTRY, ENTRY_SIZE - HEADER_SIZE);
    put64(&reader->out, st->st_mode);
    put64(&reader->out, 0); /* flags */
    put64(&reader->out, (uint64_t)st->st_uid | (uint64_t)st->st_gid << 32);
    put64(&reader->out, (uint64_t)(int64_t)st->st_mtim.tv_sec);
    put64(&reader->out, (uint32_t)st->st_mtim.tv_nsec);
    found->meta_length = ENTRY_SIZE;
}

/* ---- extended attributes ---- */

static int
starts(const char *name, const char *prefix)
{
    return strncmp(name, prefix, strlen(prefix)) == 0;
}

/* Appends the value of `name` to `to`; its length, or minus an errno with `to` as it was. */
static ssize_t
get_value(Reader *reader, int fd, const char *name, Bytes *to)
{
    ssize_t length = fgetxattr(fd, name, reader->small, SMALL);
    if (length >= 0) {
        append(to, reader->small, (size_t)length);
        return length;
    }
    if (errno != ERANGE) return -errno;
    size_t before = to->used;
    char *place = extend(to, LARGE);
    if (!place) return -ENOMEM;
    length = fgetxattr(fd, name, place, LARGE);
    if (length < 0) length = -errno;
    to->used = before + (length > 0 ? (size_t)length : 0);
    return length;
}

static int
is_skipped(int error)
{
    return error == ENODATA || error == EOPNOTSUPP || error == EBADF;
}

static int
read_xattrs(Reader *reader, int fd, const struct stat *st, Found *found)
{
    const char *names = reader->name_list;
    ssize_t length = flistxattr(fd, reader->name_list, SMALL);
    if (length == 0) return 0;
    if (length < 0 && errno == ERANGE) {
        reader->list.used = 0;
        char *place = extend(&reader->list, LARGE);
        if (!place) return ENOMEM;
        names = place;
        length = flistxattr(fd, place, LARGE);
    }
    if (length < 0) {
        if (errno == EOPNOTSUPP) return 0;
        if (errno != E2BIG || !reader->skip_e2big) return errno;
        found->warning = E2BIG;
        return 0;
    }
    for (const char *name = names, *end = names + length, *next; name < end; name = next) {
        const char *nul = memchr(name, 0, (size_t)(end - name));
        if (!nul) break;
        next = nul + 1;
        ssize_t size;
        if (!strcmp(name, "security.capability")) {
            if (!(reader->features & FEATURE_FCAPS)) continue;
            Bytes *to = &reader->fcaps;
            to->used = 0;
            size = get_value(reader, fd, name, to);
            reader->has_fcaps = size >= 0;
        } else if (!strcmp(name, "system.posix_acl_access")) {
            if (!(reader->features & FEATURE_ACL)) continue;
            reader->access.used = 0;
            size = get_value(reader, fd, name, &reader->access);
            reader->has_access = size >= 0;
        } else if (!strcmp(name, "system.posix_acl_default")) {
            if (!(reader->features & FEATURE_ACL) || !S_ISDIR(st->st_mode)) continue;
            reader->standard.used = 0;
            size = get_value(reader, fd, name, &reader->standard);
            reader->has_standard = size >= 0;
        } else if (starts(name, "user.") || starts(name, "trusted.") || !strcmp(name, "security.NTACL")) {
            if (nul - name > NAME_LIMIT) continue;
            size_t before = reader->out.used, name_length = (size_t)(next - name);
            put_header(&reader->out, ITEM_XATTR, 0);
            append(&reader->out, name, name_length);
            size = get_value(reader, fd, name, &reader->out);
            if (size >= 0 && (name_length + (size_t)size > XATTR_LIMIT || reader->out.used - found->meta > XATTRS_LIMIT))
                size = -E2BIG;
            if (size < 0) {
                reader->out.used = before;
            } else if (!reader->out.failed) {
                uint64_t whole = htole64(HEADER_SIZE + name_length + (size_t)size);
                memcpy(reader->out.data + before + 8, &whole, sizeof whole);
            }
        } else {
            continue;
        }
        if (size >= 0 || is_skipped((int)-size)) continue;
        if (size != -E2BIG || !reader->skip_e2big) return (int)-size;
        found->warning = E2BIG;
        break;
    }
    return 0;
}

/* ---- ACLs: u32 version, then u16 tag, u16 permissions, u32 id ---- */

#define ACL_HEADER 4
#define ACL_ENTRY 8

enum { USER_OBJ = 1, USER = 2, GROUP_OBJ = 4, GROUP = 8, MASK = 0x10, OTHER = 0x20 };

static int
acl_field(const Bytes *raw, size_t number, uint16_t *permissions, uint32_t *id)
{
    const char *entry = raw->data + ACL_HEADER + ACL_ENTRY * number;
    uint16_t tag;
    memcpy(&tag, entry, 2);
    memcpy(permissions, entry + 2, 2);
    memcpy(id, entry + 4, 4);
    *permissions = le16toh(*permissions) & 7;
    *id = le32toh(*id);
    return le16toh(tag);
}

static int
by_value(const void *left, const void *right)
{
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return a < b ? -1 : a > b;
}

/* Appends one item of `type` for each entry of kind `tag`, sorted by id and permissions. */
static int
put_named(Bytes *out, const Bytes *raw, size_t count, int tag, uint64_t type)
{
    uint64_t *named = malloc((count + 1) * sizeof *named);
    size_t taken = 0;
    if (!named) return ENOMEM;
    for (size_t i = 0; i < count; i++) {
        uint16_t permissions;
        uint32_t id;
        if (acl_field(raw, i, &permissions, &id) == tag) named[taken++] = (uint64_t)id << 16 | permissions;
    }
    qsort(named, taken, sizeof *named, by_value);
    for (size_t i = 0; i < taken; i++) {
        put_header(out, type, 16);
        put64(out, named[i] >> 16);
        put64(out, named[i] & 7);
    }
    free(named);
    return 0;
}

static int
put_acl(Bytes *out, const Bytes *raw, int is_default)
{
    uint64_t owner = MISSING, group = MISSING, other = MISSING, mask = MISSING;
    uint32_t version;
    int error;

    if (raw->failed) return ENOMEM;
    if (raw->used < ACL_HEADER || (raw->used - ACL_HEADER) % ACL_ENTRY) return EINVAL;
    memcpy(&version, raw->data, 4);
    if (le32toh(version) != 2) return EINVAL;
    size_t count = (raw->used - ACL_HEADER) / ACL_ENTRY;
    for (size_t i = 0; i < count; i++) {
        uint16_t permissions;
        uint32_t id;
        switch (acl_field(raw, i, &permissions, &id)) {
        case USER_OBJ: owner = permissions; break;
        case GROUP_OBJ: group = permissions; break;
        case MASK: mask = permissions; break;
        case OTHER: other = permissions; break;
        case USER:
        case GROUP: break;
        default: return EINVAL;
        }
    }
    if (is_default && (owner != MISSING || group != MISSING || other != MISSING || mask != MISSING)) {
        put_header(out, ITEM_ACL_DEFAULT, 32);
        put64(out, owner);
        put64(out, group);
        put64(out, other);
        put64(out, mask);
    }
    error = put_named(out, raw, count, USER, is_default ? ITEM_ACL_DEFAULT_USER : ITEM_ACL_USER);
    if (!error) error = put_named(out, raw, count, GROUP, is_default ? ITEM_ACL_DEFAULT_GROUP : ITEM_ACL_GROUP);
    if (!error && !is_default && mask != MISSING && group != MISSING) {
        put_header(out, ITEM_ACL_GROUP_OBJ, 8);
        put64(out, group);
    }
    return error;
}

/* ---- inode flags and project ---- */

static int
is_unsupported(int error)
{
    return error == ENOTTY || error == ENOSYS || error == EBADF || error == EOPNOTSUPP || error == EINVAL;
}

static const struct {
    uint32_t bit;
    uint64_t flag;
} CHATTR[] = {
    {0x20, 0x10000},      {0x80, 0x20000},      {0x04, 0x40000},    {0x00800000, 0x80000},     {0x40, 0x100000},
    {0x00010000, 0x200000}, {0x10, 0x400000}, {0x08, 0x800000}, {0x400, 0x1000000}, {0x20000000, 0x2000000},
};

static int
read_flags(Reader *reader, int fd, uint64_t *flags)
{
    uint32_t chattr[2] = {0}, fat = 0; /* by its number the ioctl gives a long, and some FUSE servers do */

    if (ioctl(fd, GETFLAGS, chattr) == 0) {
        for (size_t i = 0; chattr[0] && i < sizeof CHATTR / sizeof *CHATTR; i++)
            if (chattr[0] & CHATTR[i].bit) *flags |= CHATTR[i].flag;
    } else if (!is_unsupported(errno)) {
        return errno;
    }
    if (!(reader->features & FEATURE_FAT)) return 0;
    if (ioctl(fd, FAT_GET_ATTRIBUTES, &fat) == 0) {
        *flags |= (fat & 0x02 ? 0x2000 : 0) | (fat & 0x04 ? 0x4000 : 0) | (fat & 0x20 ? 0x8000 : 0);
    } else if (!is_unsupported(errno)) {
        return errno;
    }
    return 0;
}

static int
read_project(Reader *reader, int fd, uint32_t *project)
{
    uint32_t answer[7] = {0}; /* struct fsxattr: the project is its fourth word */

    if (!(reader->features & FEATURE_QUOTA_PROJID)) return 0;
    if (ioctl(fd, FSGETXATTR, answer) == 0)
        *project = answer[3];
    else if (!is_unsupported(errno))
        return errno;
    return 0;
}

/* Reads what an open regular file or folder has besides `st` and appends it to the metadata; 0 or an errno. */
static int
read_attributes(Reader *reader, int fd, const struct stat *st, Found *found)
{
    Bytes *out = &reader->out;
    uint64_t flags = 0;
    uint32_t project = 0;
    int error = 0;

    reader->has_access = reader->has_standard = reader->has_fcaps = 0;
    if (reader->features & FEATURE_XATTRS) {
        error = read_xattrs(reader, fd, st, found);
        if (!error && reader->has_access) error = put_acl(out, &reader->access, 0);
        if (!error && reader->has_standard) error = put_acl(out, &reader->standard, 1);
        if (!error && reader->has_fcaps) {
            put_header(out, ITEM_FCAPS, reader->fcaps.used);
            append(out, reader->fcaps.data, reader->fcaps.used);
        }
    }
    if (!error) error = read_flags(reader, fd, &flags);
    if (!error) error = read_project(reader, fd, &project);
    if (error) return error;
    if (project) {
        put_header(out, ITEM_QUOTA_PROJID, 8);
        put64(out, project);
    }
    if (out->failed) return ENOMEM;
    if (flags) {
        flags = htole64(flags);
        memcpy(out->data + found->meta + FLAGS_OFFSET, &flags, sizeof flags);
    }
    found->meta_length = out->used - found->meta;
    return 0;
}

/* ---- opening ---- */

static int
is_opened(mode_t mode)
{
    return S_ISREG(mode) || S_ISDIR(mode);
}

/* Somebody holds a lease on the file (Samba does): wait until the kernel has taken it back, but only for a file. */
static int
open_leased(int dir_fd, const char *name)
{
    struct stat st;
    char path[32];
    int fd = -1, error = EAGAIN, handle = openat(dir_fd, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);

    if (handle < 0) return -1;
    if (fstat(handle, &st) == 0 && S_ISREG(st.st_mode)) {
        snprintf(path, sizeof path, "/proc/self/fd/%d", handle);
        fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
        error = errno;
    }
    close(handle);
    errno = error;
    return fd;
}

static int
open_to_read(int dir_fd, const char *name)
{
    /* O_NONBLOCK: a FIFO put in the place of a file must not hold us up. */
    int flags = O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NOCTTY | O_NONBLOCK | O_NOATIME;
    for (;;) {
        int fd = openat(dir_fd, name, flags);
        if (fd >= 0) return fd;
        if (errno == EINTR) continue;
        if (errno == EPERM && flags & O_NOATIME) {
            flags &= ~O_NOATIME; /* it is for owners only */
            continue;
        }
        return errno == EAGAIN ? open_leased(dir_fd, name) : -1;
    }
}

/* An open regular file or folder; closes it unless it is kept. 0, or 1 if it is something else. */
static int
look_inside(Reader *reader, int fd, Found *found)
{
    struct stat st;

    if (fstat(fd, &st) < 0) {
        found->code = errno;
    } else if (!is_opened(st.st_mode)) {
        close(fd);
        return 1;
    } else {
        take_stat(reader, found, &st);
        found->code = -read_attributes(reader, fd, &st, found);
    }
    if (reader->keep_open && !found->code)
        found->fd = fd;
    else
        close(fd);
    return 0;
}

static int
take_target(Reader *reader, int dir_fd, const char *name, Found *found)
{
    size_t before = reader->out.used;
    char *place = extend(&reader->out, PATH_MAX);
    if (!place) return ENOMEM;
    ssize_t length = readlinkat(dir_fd, name, place, PATH_MAX);
    int error = length < 0 ? errno : 0;
    found->target = before;
    found->target_length = length < 0 ? 0 : (size_t)length;
    found->has_target = 1;
    reader->out.used = before + found->target_length;
    return error;
}

/* Anything but a regular file or folder; not opened, devices and FIFOs would notice. 0, or 1 if it is a file now. */
static int
look_outside(Reader *reader, int dir_fd, const char *name, Found *found)
{
    struct stat st;
    int fd = -1, result = 0;

    if (reader->keep_open) {
        fd = openat(dir_fd, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
        found->code = fd < 0 || fstat(fd, &st) < 0 ? errno : 0;
    } else {
        found->code = fstatat(dir_fd, name, &st, AT_SYMLINK_NOFOLLOW) < 0 ? errno : 0;
    }
    if (!found->code && is_opened(st.st_mode)) result = 1;
    if (!found->code && !result) {
        take_stat(reader, found, &st);
        if (S_ISLNK(st.st_mode)) {
            found->code = fd < 0 ? take_target(reader, dir_fd, name, found) : take_target(reader, fd, "", found);
            if (found->code == EINVAL) result = 1; /* no symlink any more */
        }
    }
    if (!found->code && !result)
        found->fd = fd;
    else if (fd >= 0)
        close(fd);
    return result;
}

/* `type` is the d_type of the listing, a hint what to expect; DT_UNKNOWN is always right. */
static void
look_at(Reader *reader, int dir_fd, const char *name, int type, Found *found)
{
    size_t before = reader->out.used;
    int refused = ESTALE;

    for (int attempt = 0; attempt < ATTEMPTS; attempt++) {
        struct stat st;
        reader->out.used = before;
        memset(found, 0, sizeof *found);
        found->fd = -1;
        if (type == DT_UNKNOWN) {
            if (fstatat(dir_fd, name, &st, AT_SYMLINK_NOFOLLOW) < 0) {
                found->code = errno;
                return;
            }
            type = IFTODT(st.st_mode);
        }
        if (type == DT_REG || type == DT_DIR) {
            int fd = open_to_read(dir_fd, name);
            if (fd >= 0) {
                if (!look_inside(reader, fd, found)) break;
            } else if (errno == ELOOP || errno == ENXIO || errno == ENODEV) {
                refused = errno; /* a symlink, socket or device now? */
            } else {
                found->code = errno;
                return;
            }
        } else if (!look_outside(reader, dir_fd, name, found)) {
            break;
        }
        type = DT_UNKNOWN;
        found->code = refused;
    }
    if (found->code) reader->out.used = before;
}

/* ---- Python ---- */

/* Steals `value` into `tuple`; -1 if there is none. */
static int
set_item(PyObject *tuple, Py_ssize_t index, PyObject *value)
{
    return value ? PyTuple_SetItem(tuple, index, value) : -1;
}

static PyObject *
result_of(const Found *found)
{
    if (found->code) return PyLong_FromLong(found->code);
    const Reader *reader = found->reader;
    const char *data = reader->out.data;
    PyObject *target = Py_None;
    if (found->has_target)
        target = PyBytes_FromStringAndSize(data + found->target, (Py_ssize_t)found->target_length);
    else
        Py_INCREF(target);
    PyObject *tuple = target ? PyTuple_New(reader->keep_open ? 10 : 9) : NULL;
    if (!tuple) {
        Py_XDECREF(target);
        return NULL;
    }
    if (set_item(tuple, 7, target) < 0 || set_item(tuple, 0, PyLong_FromUnsignedLong(found->mode)) < 0 ||
        set_item(tuple, 1, PyBytes_FromStringAndSize(data + found->meta, (Py_ssize_t)found->meta_length)) < 0 ||
        set_item(tuple, 2, PyLong_FromLongLong(found->size)) < 0 ||
        set_item(tuple, 3, PyLong_FromUnsignedLongLong(found->dev)) < 0 ||
        set_item(tuple, 4, PyLong_FromUnsignedLongLong(found->ino)) < 0 ||
        set_item(tuple, 5, PyLong_FromUnsignedLongLong(found->nlink)) < 0 ||
        set_item(tuple, 6, PyLong_FromUnsignedLongLong(found->rdev)) < 0 ||
        set_item(tuple, 8, PyLong_FromLong(found->warning)) < 0 ||
        (reader->keep_open && set_item(tuple, 9, PyLong_FromLong(found->fd)) < 0)) {
        Py_DECREF(tuple);
        return NULL;
    }
    return tuple;
}

/* A name as it stands in a folder, or NULL with ValueError or TypeError set. */
static const char *
checked_name(PyObject *object)
{
    char *name;
    if (PyBytes_AsStringAndSize(object, &name, NULL) < 0) return NULL;
    if (!*name || strchr(name, '/')) {
        PyErr_SetString(PyExc_ValueError, "an entry's name is not empty and has no slash");
        return NULL;
    }
    return name;
}

static PyObject *
scan(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *sequence, *items, *results = NULL;
    const char *types;
    Py_ssize_t type_count;
    unsigned long long features;
    int dir_fd, skip;

    if (!PyArg_ParseTuple(args, "iOKz#p", &dir_fd, &sequence, &features, &types, &type_count, &skip)) return NULL;
    items = PySequence_Tuple(sequence);
    if (!items) return NULL;
    Py_ssize_t count = PyTuple_Size(items);
    Reader *reader = calloc(1, sizeof *reader);
    const char **names = calloc((size_t)count + 1, sizeof *names);
    Found *found = calloc((size_t)count + 1, sizeof *found);
    if (!reader || !names || !found) {
        PyErr_NoMemory();
        goto done;
    }
    if (types && type_count != count) {
        PyErr_SetString(PyExc_ValueError, "there is one type per name");
        goto done;
    }
    for (Py_ssize_t i = 0; i < count; i++)
        if (!(names[i] = checked_name(PyTuple_GetItem(items, i)))) goto done;
    reader->features = features;
    reader->skip_e2big = skip;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < count && !reader_failed(reader); i++)
        look_at(reader, dir_fd, names[i], types ? types[i] : DT_UNKNOWN, &found[i]);
    Py_END_ALLOW_THREADS
    if (reader_failed(reader)) {
        PyErr_NoMemory();
        goto done;
    }
    results = PyList_New(count);
    for (Py_ssize_t i = 0; results && i < count; i++) {
        PyObject *result = result_of(&found[i]);
        if (!result || PyList_SetItem(results, i, result) < 0) Py_CLEAR(results);
    }
done:
    if (reader) reader_free(reader);
    free(reader);
    free(names);
    free(found);
    Py_DECREF(items);
    return results;
}

static PyObject *
one_result(Reader *reader, Found *found)
{
    PyObject *result = NULL;
    if (reader_failed(reader))
        PyErr_NoMemory();
    else
        result = result_of(found);
    if (!result && found->fd >= 0) close(found->fd);
    reader_free(reader);
    free(reader);
    return result;
}

static PyObject *
open_entry(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *object;
    unsigned long long features;
    int dir_fd, skip, type;
    Found found = {.fd = -1};

    if (!PyArg_ParseTuple(args, "iOKip", &dir_fd, &object, &features, &type, &skip)) return NULL;
    const char *name = checked_name(object);
    if (!name) return NULL;
    Reader *reader = calloc(1, sizeof *reader);
    if (!reader) return PyErr_NoMemory();
    reader->features = features;
    reader->skip_e2big = skip;
    reader->keep_open = 1;
    Py_BEGIN_ALLOW_THREADS
    look_at(reader, dir_fd, name, type, &found);
    Py_END_ALLOW_THREADS
    return one_result(reader, &found);
}

static PyObject *
describe(PyObject *Py_UNUSED(module), PyObject *args)
{
    unsigned long long features;
    int fd, skip;
    struct stat st;
    Found found = {.fd = -1};

    if (!PyArg_ParseTuple(args, "iKp", &fd, &features, &skip)) return NULL;
    Reader *reader = calloc(1, sizeof *reader);
    if (!reader) return PyErr_NoMemory();
    reader->features = features;
    reader->skip_e2big = skip;
    Py_BEGIN_ALLOW_THREADS
    if (fstat(fd, &st) < 0) {
        found.code = errno;
    } else {
        take_stat(reader, &found, &st);
        if (is_opened(st.st_mode)) found.code = -read_attributes(reader, fd, &st, &found);
    }
    Py_END_ALLOW_THREADS
    return one_result(reader, &found);
}

/* ---- listing ---- */

typedef struct {
    size_t offset; /* of the name in the arena */
    uint16_t length;
    uint8_t type;
} Listed;

typedef struct {
    const char *name;
    uint16_t length;
    uint8_t type;
} Sorted;

static int
by_name(const void *left, const void *right)
{
    const Sorted *a = left, *b = right;
    int order = memcmp(a->name, b->name, a->length < b->length ? a->length : b->length);
    return order ? order : (int)a->length - (int)b->length;
}

/* Collects the names behind `fd`, each with a NUL, sorted in `*sorted` (to be freed); their number, or minus an errno. */
static ssize_t
read_names(int fd, Bytes *arena, Sorted **sorted)
{
    struct {
        uint64_t ino;
        int64_t offset;
        uint16_t length;
        uint8_t type;
    } head;
    enum { NAME = 19, BLOCK = 65536 };
    Bytes listed = {0};
    ssize_t result = -ENOMEM;
    char *block = malloc(BLOCK);

    if (!block) goto done;
    if (lseek(fd, 0, SEEK_SET) < 0) {
        result = -errno;
        goto done;
    }
    for (;;) {
        long length = syscall(SYS_getdents64, fd, block, BLOCK);
        if (length < 0) {
            result = -errno;
            goto done;
        }
        if (length == 0) break;
        for (long at = 0; at + NAME < length; at += head.length) {
            memcpy(&head, block + at, NAME);
            if (head.length <= NAME || at + head.length > length) break;
            const char *name = block + at + NAME;
            size_t size = strnlen(name, head.length - NAME);
            if ((size == 1 && name[0] == '.') || (size == 2 && name[0] == '.' && name[1] == '.')) continue;
            Listed item = {arena->used, (uint16_t)size, head.type};
            append(arena, name, size);
            append(arena, "", 1);
            append(&listed, &item, sizeof item);
        }
    }
    if (arena->failed || listed.failed) goto done;
    size_t count = listed.used / sizeof(Listed);
    *sorted = malloc((count + 1) * sizeof **sorted);
    if (!*sorted) goto done;
    for (size_t i = 0; i < count; i++) {
        const Listed *item = (const Listed *)listed.data + i;
        (*sorted)[i] = (Sorted){arena->data + item->offset, item->length, item->type};
    }
    qsort(*sorted, count, sizeof **sorted, by_name);
    /* A name that is removed and made again while the folder is read may be listed twice. */
    size_t kept = 0;
    for (size_t i = 0; i < count; i++)
        if (!kept || by_name(&(*sorted)[kept - 1], &(*sorted)[i])) (*sorted)[kept++] = (*sorted)[i];
    result = (ssize_t)kept;
done:
    free(block);
    free(listed.data);
    return result;
}

static PyObject *
list_folder(PyObject *Py_UNUSED(module), PyObject *args)
{
    int fd;
    Bytes arena = {0};
    Sorted *sorted = NULL;
    ssize_t count;
    PyObject *names = NULL, *types = NULL, *pair = NULL;

    if (!PyArg_ParseTuple(args, "i", &fd)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    count = read_names(fd, &arena, &sorted);
    Py_END_ALLOW_THREADS
    if (count < 0) {
        errno = (int)-count;
        PyErr_SetFromErrno(PyExc_OSError);
        goto done;
    }
    names = PyList_New(count);
    types = PyBytes_FromStringAndSize(NULL, count);
    if (!names || !types) goto done;
    char *type = PyBytes_AsString(types);
    for (ssize_t i = 0; i < count; i++) {
        PyObject *name = PyBytes_FromStringAndSize(sorted[i].name, sorted[i].length);
        if (!name || PyList_SetItem(names, i, name) < 0) goto done;
        type[i] = (char)sorted[i].type;
    }
    pair = PyTuple_Pack(2, names, types);
done:
    Py_XDECREF(names);
    Py_XDECREF(types);
    free(arena.data);
    free(sorted);
    return pair;
}

/* ---- whole trees ----
 *
 * One thread goes through the folders, in order. What lies in them it leaves to helpers, and becomes one when it has
 * nothing else to do. The Python thread that called is that one; helpers are threads of one call that know no Python.
 */

/* Folders the way leads through, open at the same time; deeper ones are not entered. */
#define DEPTH 32
/* Folders that are open because not all of their entries were looked at. */
#define AWAITED 64
/* Entries that a helper takes at a time. */
#define PORTION 32
#define HELPERS 7
#define STACK (256u << 10)

typedef struct {
    ssize_t parent; /* the folder it lies in, -1 for the start */
    const char *name;
    Found found;
    Bytes arena;
    Sorted *sorted;
    ssize_t count;
    Found *entries;
    int entered; /* the folders in it follow */
    /* Of these the lock is needed. */
    int fd;
    int users;    /* who looks at its entries, and who goes through its folders */
    ssize_t next; /* the first entry that nobody has taken */
} Seen;

typedef struct {
    int fd;
    ssize_t seen, next; /* number of the folder, -1 for the start; the next entry to look at */
} Open;

typedef struct {
    Reader *reader;
    dev_t device;
    ssize_t limit, used; /* entries */
    const char *last;    /* a folder with an entry of this name is not entered */
    const char **names;  /* folders in the start */
    ssize_t name_count;
    Seen *seen; /* room for `limit` */
    ssize_t count;
    Open open[DEPTH];
    int depth;
    int failed;
    Reader *helpers[HELPERS];
    pthread_t threads[HELPERS];
    int helper_count;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    ssize_t listed, working; /* folders to look into, and the first with entries that nobody has taken */
    int awaited, ended;
} Tree;

static void
tree_free(Tree *tree)
{
    for (ssize_t i = 0; i < tree->count; i++) {
        free(tree->seen[i].arena.data);
        free(tree->seen[i].sorted);
        free(tree->seen[i].entries);
    }
    free(tree->seen);
    for (int i = 0; i < HELPERS; i++) {
        if (tree->helpers[i]) reader_free(tree->helpers[i]);
        free(tree->helpers[i]);
    }
}

/* Somebody needs a folder no more; under the lock. */
static void
let_go(Tree *tree, Seen *seen)
{
    if (--seen->users || seen->next < seen->count) return;
    close(seen->fd);
    tree->awaited--;
}

/* Looks at some entries, with the lock held before and after, but not in between; 0 if there are none to look at. */
static int
look_at_some(Tree *tree, Reader *reader)
{
    while (tree->working < tree->listed && tree->seen[tree->working].next >= tree->seen[tree->working].count)
        tree->working++;
    if (tree->working == tree->listed) return 0;
    Seen *seen = &tree->seen[tree->working];
    ssize_t from = seen->next, end = from + PORTION < seen->count ? from + PORTION : seen->count;
    seen->next = end;
    seen->users++;
    pthread_mutex_unlock(&tree->lock);
    for (ssize_t i = from; i < end && !reader_failed(reader); i++) {
        const Sorted *entry = &seen->sorted[i];
        if (entry->type != DT_DIR) look_at(reader, seen->fd, entry->name, entry->type, &seen->entries[i]);
    }
    pthread_mutex_lock(&tree->lock);
    let_go(tree, seen);
    return 1;
}

typedef struct {
    Tree *tree;
    Reader *reader;
} Helper;

static void *
help(void *argument)
{
    Helper helper = *(Helper *)argument;
    Tree *tree = helper.tree;

    free(argument);
    pthread_mutex_lock(&tree->lock);
    for (;;) {
        if (look_at_some(tree, helper.reader)) continue;
        if (tree->ended) break;
        pthread_cond_wait(&tree->changed, &tree->lock);
    }
    pthread_mutex_unlock(&tree->lock);
    return NULL;
}

/* Starts up to `count` helpers; without any the caller does everything. */
static void
start_helpers(Tree *tree, int count)
{
    pthread_attr_t attributes;

    if (pthread_attr_init(&attributes)) return;
    pthread_attr_setstacksize(&attributes, STACK);
    for (int i = 0; i < count && i < HELPERS; i++) {
        Reader *reader = calloc(1, sizeof *reader);
        Helper *helper = malloc(sizeof *helper);
        if (reader && helper) {
            reader->features = tree->reader->features;
            reader->skip_e2big = tree->reader->skip_e2big;
            *helper = (Helper){tree, reader};
            if (!pthread_create(&tree->threads[i], &attributes, help, helper)) {
                tree->helpers[i] = reader;
                tree->helper_count++;
                continue;
            }
        }
        free(reader);
        free(helper);
        break;
    }
    pthread_attr_destroy(&attributes);
}

/* The next folder in `open`, or NULL. */
static const char *
next_folder(const Tree *tree, Open *open)
{
    if (open->seen < 0) return open->next < tree->name_count ? tree->names[open->next++] : NULL;
    const Seen *seen = &tree->seen[open->seen];
    while (open->next < seen->count) {
        const Sorted *entry = &seen->sorted[open->next++];
        if (entry->type == DT_DIR) return entry->name;
    }
    return NULL;
}

/* Lists an open folder, and whether it is entered; EAGAIN in `found` if it is not to be read like this. */
static void
list_names(Tree *tree, Seen *seen)
{
    int is_last = 0;

    seen->count = read_names(seen->fd, &seen->arena, &seen->sorted);
    if (seen->count < 0 || seen->count > tree->limit) {
        seen->found.code = EAGAIN;
        seen->count = 0;
        return;
    }
    tree->used += seen->count;
    seen->entries = calloc((size_t)seen->count + 1, sizeof *seen->entries);
    if (!seen->entries) {
        tree->failed = 1;
        seen->count = 0;
        return;
    }
    for (ssize_t i = 0; i < seen->count && !is_last; i++) is_last = !strcmp(seen->sorted[i].name, tree->last);
    seen->entered = !is_last && tree->depth < DEPTH;
}

/* Opens and lists the next folder. */
static void
read_folder(Tree *tree, const Open *open, const char *name)
{
    Reader *reader = tree->reader;
    Seen *seen = &tree->seen[tree->count++];

    seen->parent = open->seen;
    seen->name = name;
    tree->used++;
    reader->keep_open = 1;
    look_at(reader, open->fd, name, DT_DIR, &seen->found);
    reader->keep_open = 0;
    if (seen->found.code) return;
    seen->fd = seen->found.fd;
    if (!S_ISDIR(seen->found.mode) || seen->found.dev != tree->device)
        seen->found.code = EAGAIN;
    else
        list_names(tree, seen);
    if (seen->entered) tree->open[tree->depth++] = (Open){seen->fd, tree->count - 1, 0};
    pthread_mutex_lock(&tree->lock);
    tree->awaited++;
    seen->users = 1 + seen->entered;
    tree->listed = tree->count;
    let_go(tree, seen);
    if (seen->count) pthread_cond_signal(&tree->changed);
    while (tree->awaited > AWAITED && look_at_some(tree, reader)) {
    }
    pthread_mutex_unlock(&tree->lock);
}

static void
leave_folder(Tree *tree, const Open *open)
{
    if (open->seen < 0) return;
    pthread_mutex_lock(&tree->lock);
    let_go(tree, &tree->seen[open->seen]);
    pthread_mutex_unlock(&tree->lock);
}

/* Depth first, each folder before those in it, until all is done or enough. */
static void
read_tree(Tree *tree, int helpers)
{
    start_helpers(tree, helpers);
    while (tree->depth && tree->used < tree->limit && !tree->failed && !reader_failed(tree->reader)) {
        Open *open = &tree->open[tree->depth - 1];
        const char *name = next_folder(tree, open);
        if (name) {
            read_folder(tree, open, name);
        } else {
            leave_folder(tree, open);
            tree->depth--;
        }
    }
    pthread_mutex_lock(&tree->lock);
    tree->ended = 1;
    pthread_cond_broadcast(&tree->changed);
    while (look_at_some(tree, tree->reader)) {
    }
    pthread_mutex_unlock(&tree->lock);
    for (int i = 0; i < tree->helper_count; i++) {
        pthread_join(tree->threads[i], NULL);
        tree->failed |= reader_failed(tree->helpers[i]);
    }
    tree->failed |= reader_failed(tree->reader);
    /* The numbers of what is left are the answer's; its descriptors are not needed any more. */
    for (int i = tree->depth; i-- > 0;) leave_folder(tree, &tree->open[i]);
}

static PyObject *
seen_as_tuple(const Seen *seen)
{
    PyObject *names = PyList_New(seen->count), *entries = PyList_New(seen->count), *tuple = NULL, *found = NULL;
    PyObject *types = PyBytes_FromStringAndSize(NULL, seen->count);

    if (!names || !entries || !types || !(found = result_of(&seen->found))) goto done;
    char *type = PyBytes_AsString(types);
    for (ssize_t i = 0; i < seen->count; i++) {
        const Sorted *entry = &seen->sorted[i];
        PyObject *name = PyBytes_FromStringAndSize(entry->name, entry->length), *result;
        if (!name || PyList_SetItem(names, i, name) < 0) goto done;
        if (entry->type == DT_DIR) {
            result = Py_None;
            Py_INCREF(result);
        } else {
            result = result_of(&seen->entries[i]);
        }
        if (!result || PyList_SetItem(entries, i, result) < 0) goto done;
        type[i] = (char)entry->type;
    }
    tuple = Py_BuildValue("nyOOOOO", (Py_ssize_t)seen->parent, seen->name, found, names, types, entries,
                          seen->entered ? Py_True : Py_False);
done:
    Py_XDECREF(names);
    Py_XDECREF(entries);
    Py_XDECREF(types);
    Py_XDECREF(found);
    return tuple;
}

static PyObject *
scan_tree(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *sequence, *items = NULL, *folders = NULL, *rest = NULL, *answer = NULL;
    unsigned long long features, device;
    Py_ssize_t limit;
    const char *last;
    int dir_fd, skip, helpers;

    if (!PyArg_ParseTuple(args, "iOKpKnyi", &dir_fd, &sequence, &features, &skip, &device, &limit, &last, &helpers))
        return NULL;
    if (limit < 1 || limit > 1 << 24) {
        PyErr_SetString(PyExc_ValueError, "the limit of entries is out of range");
        return NULL;
    }
    if (!(items = PySequence_Tuple(sequence))) return NULL;
    Tree *tree = calloc(1, sizeof *tree);
    Reader *reader = calloc(1, sizeof *reader);
    Py_ssize_t count = PyTuple_Size(items);
    const char **names = calloc((size_t)count + 1, sizeof *names);
    /* Each folder is one of the entries that count. */
    if (!tree || !reader || !names || !(tree->seen = calloc((size_t)limit, sizeof *tree->seen))) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t i = 0; i < count; i++)
        if (!(names[i] = checked_name(PyTuple_GetItem(items, i)))) goto done;
    reader->features = features;
    reader->skip_e2big = skip;
    tree->reader = reader;
    tree->device = (dev_t)device;
    tree->limit = limit;
    tree->last = last;
    tree->names = names;
    tree->name_count = count;
    tree->open[0] = (Open){dir_fd, -1, 0};
    tree->depth = 1;
    pthread_mutex_init(&tree->lock, NULL);
    pthread_cond_init(&tree->changed, NULL);
    Py_BEGIN_ALLOW_THREADS
    read_tree(tree, helpers);
    Py_END_ALLOW_THREADS
    pthread_cond_destroy(&tree->changed);
    pthread_mutex_destroy(&tree->lock);
    if (tree->failed) {
        PyErr_NoMemory();
        goto done;
    }
    folders = PyList_New(tree->count);
    rest = PyList_New(tree->depth);
    for (ssize_t i = 0; folders && i < tree->count; i++) {
        PyObject *folder = seen_as_tuple(&tree->seen[i]);
        if (!folder || PyList_SetItem(folders, i, folder) < 0) Py_CLEAR(folders);
    }
    for (int i = 0; rest && i < tree->depth; i++) {
        PyObject *place = Py_BuildValue("nn", (Py_ssize_t)tree->open[i].seen, (Py_ssize_t)tree->open[i].next);
        if (!place || PyList_SetItem(rest, i, place) < 0) Py_CLEAR(rest);
    }
    if (folders && rest) answer = PyTuple_Pack(2, folders, rest);
done:
    Py_XDECREF(folders);
    Py_XDECREF(rest);
    if (tree) tree_free(tree);
    free(tree);
    if (reader) reader_free(reader);
    free(reader);
    free(names);
    Py_DECREF(items);
    return answer;
}

static PyObject *
filesystem_type(PyObject *Py_UNUSED(module), PyObject *args)
{
    struct statfs answer;
    int fd, error;

    if (!PyArg_ParseTuple(args, "i", &fd)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    error = fstatfs(fd, &answer) < 0 ? errno : 0;
    Py_END_ALLOW_THREADS
    if (error) {
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return PyLong_FromUnsignedLong((uint32_t)answer.f_type);
}

static PyMethodDef methods[] = {
    {"scan", scan, METH_VARARGS, "scan(dir_fd, names, features, types, skip_e2big) -> list of results"},
    {"open_entry", open_entry, METH_VARARGS, "open_entry(dir_fd, name, features, type, skip_e2big) -> result with fd"},
    {"describe", describe, METH_VARARGS, "describe(fd, features, skip_e2big) -> result"},
    {"list_folder", list_folder, METH_VARARGS, "list_folder(fd) -> (sorted names, their d_types)"},
    {"scan_tree", scan_tree, METH_VARARGS,
     "scan_tree(dir_fd, names, features, skip_e2big, dev, limit, last) -> (folders, what is left)"},
    {"filesystem_type", filesystem_type, METH_VARARGS, "filesystem_type(fd) -> number of the file system's type"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_metadata", "Metadata of many files of a folder.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC
PyInit__metadata(void)
{
    return PyModuleDef_Init(&module);
}
