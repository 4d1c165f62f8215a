// Preloaded: counts the calls on files below one folder, and at one of them kills the process or fails, from there on
// writes short, or writes all of them down. Off until faults_begin; what it calls itself goes past the C library.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "faults.h"

static char below[4096];
int plan;
static int number, for_ever, record = -1;
static long at, calls;
static char first[64];
static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;

void faults_begin(const char* folder, int what, long call, int error, int every, int handle) {
    snprintf(below, sizeof below, "%s", folder);
    at = call, number = error, for_ever = every, record = handle, calls = 0, first[0] = 0;
    plan = what;
}

long faults_end(void) {
    below[0] = 0;
    return calls;
}

const char* faults_first(void) { return first; }  // the call that failed before all others

// Where `path`, or without one what `handle` is open on, stands; whether that is below the folder.
int found(int handle, const char* path, char* to) {
    if (!below[0]) return 0;
    const int error = errno;
    size_t used = 0;
    if (!path || path[0] != '/') {
        char link[32];
        snprintf(link, sizeof link, handle == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", handle);
        const long length = syscall(SYS_readlink, link, to, 4095);
        used = length > 0 ? length : 0;
    }
    to[used] = 0;
    if (path) snprintf(to + used, 4096 - used, used ? "/%s" : "%s", path);
    errno = error;
    const size_t length = strlen(below);
    return strncmp(to, below, length) == 0 && (to[length] == '/' || !to[length]);
}

// Counts a call; 0, or the errno that it shall fail with.
int step(const char* name) {
    pthread_mutex_lock(&guard);
    const long call = ++calls;
    const int hit = call == at || (for_ever && call > at);
    if (hit && plan == FAIL && !first[0]) snprintf(first, sizeof first, "%s", name);
    pthread_mutex_unlock(&guard);
    if (hit && plan == KILL)
        for (;;) syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
    return hit && plan == FAIL ? number : 0;
}

static void note(const char* name, long file, const char* path, const char* to, long offset, const void* data,
                 long bytes) {
    char line[9000];
    const int length = snprintf(line, sizeof line, "%s\t%ld\t%s\t%s\t%ld\t%ld\n", name, file, path, to, offset, bytes);
    syscall(SYS_write, record, line, length);
    for (long done = 0; data && done < bytes;) done += syscall(SYS_write, record, (const char*)data + done, bytes - done);
}

void faults_mark(long value) {
    if (plan == RECORD) note("mark", value, "", "", 0, 0, 0);
}

static long inode(int handle) {
    struct stat now;
    return syscall(SYS_fstat, handle, &now) ? -1 : (long)now.st_ino;
}

// While calls are written down they happen one after the other, each with its line.
#define BEGIN_RECORD() \
    if (plan == RECORD) pthread_mutex_lock(&guard)
#define END_RECORD() \
    if (plan == RECORD) pthread_mutex_unlock(&guard)
#define REFUSE(name) \
    do { \
        const int refused = step(name); \
        if (refused) return errno = refused, -1; \
    } while (0)

static int opened(const char* name, int folder, const char* path, int flags, mode_t mode) {
    REAL(int, "openat64", int, const char*, int, mode_t);
    char where[4096];
    if (!found(folder, path, where)) return real(folder, path, flags, mode);
    REFUSE(name);
    BEGIN_RECORD();
    const int missing = (flags & O_CREAT) && syscall(SYS_faccessat, AT_FDCWD, where, F_OK);
    const int handle = real(folder, path, flags, mode);
    if (plan == RECORD && handle >= 0 && missing) note("create", inode(handle), where, "", 0, 0, 0);
    END_RECORD();
    return handle;
}

#define MODE \
    mode_t mode = 0; \
    va_list more; \
    va_start(more, flags); \
    if (flags & (O_CREAT | __O_TMPFILE)) mode = va_arg(more, mode_t); \
    va_end(more)
int open(const char* path, int flags, ...) { MODE; return opened("open", AT_FDCWD, path, flags, mode); }
int open64(const char* path, int flags, ...) { MODE; return opened("open", AT_FDCWD, path, flags, mode); }
int openat(int folder, const char* path, int flags, ...) { MODE; return opened("open", folder, path, flags, mode); }
int openat64(int folder, const char* path, int flags, ...) { MODE; return opened("open", folder, path, flags, mode); }

DIR* opendir(const char* path) {
    REAL(DIR*, "opendir", const char*);
    char where[4096];
    const int refused = found(AT_FDCWD, path, where) ? step("opendir") : 0;
    if (refused) return errno = refused, NULL;
    return real(path);
}

DIR* fdopendir(int handle) {
    REAL(DIR*, "fdopendir", int);
    char where[4096];
    const int refused = found(handle, NULL, where) ? step("fdopendir") : 0;
    if (refused) return errno = refused, NULL;
    return real(handle);
}

int mkdir(const char* path, mode_t mode) {
    REAL(int, "mkdir", const char*, mode_t);
    char where[4096];
    if (!found(AT_FDCWD, path, where)) return real(path, mode);
    REFUSE("mkdir");
    BEGIN_RECORD();
    const int result = real(path, mode);
    if (plan == RECORD && !result) note("mkdir", 0, where, "", 0, 0, 0);
    END_RECORD();
    return result;
}

ssize_t read(int handle, void* data, size_t bytes) {
    REAL(ssize_t, "read", int, void*, size_t);
    char where[4096];
    if (found(handle, NULL, where)) REFUSE("read");
    return real(handle, data, bytes);
}

static ssize_t read_at(int handle, void* data, size_t bytes, off_t offset) {
    REAL(ssize_t, "pread64", int, void*, size_t, off_t);
    char where[4096];
    if (found(handle, NULL, where)) REFUSE("pread");
    return real(handle, data, bytes, offset);
}
ssize_t pread(int handle, void* data, size_t bytes, off_t offset) { return read_at(handle, data, bytes, offset); }
ssize_t pread64(int handle, void* data, size_t bytes, off_t offset) { return read_at(handle, data, bytes, offset); }

// How much of a write is taken; past the page cache it is whole pages.
static size_t taken(int handle, size_t bytes) {
    if (plan != SHORT || bytes < 2) return bytes;
    const size_t part = 1 + bytes / 3;
    if (!(fcntl(handle, F_GETFL) & O_DIRECT)) return part;
    return bytes > 4096 ? (part + 4095) / 4096 * 4096 : bytes;
}

ssize_t write(int handle, const void* data, size_t bytes) {
    REAL(ssize_t, "write", int, const void*, size_t);
    char where[4096];
    if (!found(handle, NULL, where)) return real(handle, data, bytes);
    REFUSE("write");
    BEGIN_RECORD();
    const off_t offset = lseek(handle, 0, SEEK_CUR);
    const ssize_t written = real(handle, data, taken(handle, bytes));
    if (plan == RECORD && written > 0) note("write", inode(handle), where, "", offset, data, written);
    END_RECORD();
    return written;
}

static ssize_t write_at(int handle, const void* data, size_t bytes, off_t offset) {
    REAL(ssize_t, "pwrite64", int, const void*, size_t, off_t);
    char where[4096];
    if (!found(handle, NULL, where)) return real(handle, data, bytes, offset);
    REFUSE("pwrite");
    BEGIN_RECORD();
    const ssize_t written = real(handle, data, taken(handle, bytes), offset);
    if (plan == RECORD && written > 0) note("write", inode(handle), where, "", offset, data, written);
    END_RECORD();
    return written;
}
ssize_t pwrite(int handle, const void* data, size_t n, off_t offset) { return write_at(handle, data, n, offset); }
ssize_t pwrite64(int handle, const void* data, size_t n, off_t offset) { return write_at(handle, data, n, offset); }

static int truncated(int handle, off_t bytes) {
    REAL(int, "ftruncate64", int, off_t);
    char where[4096];
    if (!found(handle, NULL, where)) return real(handle, bytes);
    REFUSE("ftruncate");
    BEGIN_RECORD();
    const int result = real(handle, bytes);
    if (plan == RECORD && !result) note("truncate", inode(handle), where, "", bytes, 0, 0);
    END_RECORD();
    return result;
}
int ftruncate(int handle, off_t bytes) { return truncated(handle, bytes); }
int ftruncate64(int handle, off_t bytes) { return truncated(handle, bytes); }

static int synced(const char* name, int handle, int (*real)(int)) {
    char where[4096];
    if (!found(handle, NULL, where)) return real(handle);
    REFUSE(name);
    BEGIN_RECORD();
    const int result = real(handle);
    if (plan == RECORD && !result) note("sync", inode(handle), where, "", 0, 0, 0);
    END_RECORD();
    return result;
}
int fsync(int handle) {
    REAL(int, "fsync", int);
    return synced("fsync", handle, real);
}
int fdatasync(int handle) {
    REAL(int, "fdatasync", int);
    return synced("fdatasync", handle, real);
}

static int renamed(int from_folder, const char* from, int to_folder, const char* to) {
    REAL(int, "renameat", int, const char*, int, const char*);
    char before[4096], after[4096];
    if (!found(from_folder, from, before) || !found(to_folder, to, after)) return real(from_folder, from, to_folder, to);
    REFUSE("rename");
    BEGIN_RECORD();
    const int result = real(from_folder, from, to_folder, to);
    if (plan == RECORD && !result) note("rename", 0, before, after, 0, 0, 0);
    END_RECORD();
    return result;
}
int rename(const char* from, const char* to) { return renamed(AT_FDCWD, from, AT_FDCWD, to); }
int renameat(int a, const char* from, int b, const char* to) { return renamed(a, from, b, to); }

static int linked(int from_folder, const char* from, int to_folder, const char* to, int flags) {
    REAL(int, "linkat", int, const char*, int, const char*, int);
    char before[4096], after[4096];
    if (!found(from_folder, from, before) || !found(to_folder, to, after))
        return real(from_folder, from, to_folder, to, flags);
    REFUSE("link");
    BEGIN_RECORD();
    const int result = real(from_folder, from, to_folder, to, flags);
    if (plan == RECORD && !result) note("link", 0, before, after, 0, 0, 0);
    END_RECORD();
    return result;
}
int link(const char* from, const char* to) { return linked(AT_FDCWD, from, AT_FDCWD, to, 0); }
int linkat(int a, const char* from, int b, const char* to, int flags) { return linked(a, from, b, to, flags); }

static int unlinked(int folder, const char* path, int flags) {
    REAL(int, "unlinkat", int, const char*, int);
    char where[4096];
    if (!found(folder, path, where)) return real(folder, path, flags);
    REFUSE("unlink");
    BEGIN_RECORD();
    const int result = real(folder, path, flags);
    if (plan == RECORD && !result) note("unlink", 0, where, "", 0, 0, 0);
    END_RECORD();
    return result;
}
int unlink(const char* path) { return unlinked(AT_FDCWD, path, 0); }
int unlinkat(int folder, const char* path, int flags) { return unlinked(folder, path, flags); }

int flock(int handle, int operation) {
    REAL(int, "flock", int, int);
    char where[4096];
    if (found(handle, NULL, where)) REFUSE("flock");
    return real(handle, operation);
}

int close(int handle) {  // a failed close has closed nevertheless
    REAL(int, "close", int);
    char where[4096];
    const int refused = found(handle, NULL, where) ? step("close") : 0;
    const int result = real(handle);
    if (refused) return errno = refused, -1;
    return result;
}
